"""How the cost of a step grows with the number of layers and of parameters."""

from __future__ import annotations

import math

from torch import nn, optim

import layerwise
from layerwise.rules import LayerAdaptive

from .networks import with_gradients
from .timing import Row, ratio

LAYERS = (10, 30, 100, 300, 1000, 3000, 10_000)
PARAMETERS = (10**5, 10**6, 10**7, 10**8)
AT_LAYERS, AT_PARAMETERS = 100, 1024
"""Layers while the parameters grow; parameters a layer while the layers grow."""


def extra(layers: int, parameters: int, rounds: int) -> Row:
    """Time a step of fused SGD with momentum on equal layers, bare and attached."""
    steps = []
    for attach in (False, True):
        model = with_gradients(nn.Sequential(*(nn.Linear(parameters // layers, 1, bias=False) for _ in range(layers))))
        optimizer = optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
        if attach:
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        steps.append(optimizer.step)
    row = ratio(steps[0], steps[1], rounds)
    return {**row, "more_ms": row["attached_ms"] - row["bare_ms"]}


def exponent(sizes: list[int], times: list[float]) -> float:
    """Return b of the least-squares line log t = a + b log n: 1 is linear growth."""
    x, y = [math.log(n) for n in sizes], [math.log(max(t, 1e-6)) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure(rounds: int) -> dict[str, Row]:
    """Print the tables and return their rows."""
    rows: dict[str, Row] = {}
    growths = [
        ("layers", [(n, n * AT_PARAMETERS) for n in LAYERS], f"of {AT_PARAMETERS:,} parameters"),
        ("parameters", [(AT_LAYERS, n) for n in PARAMETERS], f"in {AT_LAYERS} layers"),
    ]
    for what, sizes, rest in growths:
        print(f"\n{f'{what} {rest}':<39}{'bare ms':>9}{'more ms':>9}{'ratio':>7}")
        counts, more, bare = [], [], []
        for layers, parameters in sizes:
            count = layers if what == "layers" else parameters
            row = extra(layers, parameters, max(3, min(rounds, 30_000 * rounds // max(layers, parameters // 1000))))
            rows[f"growth, {count:,} {what}"] = row
            counts.append(count)
            more.append(row["more_ms"])
            bare.append(row["bare_ms"])
            print(f"{count:<39,}{row['bare_ms']:>9.3f}{row['more_ms']:>9.3f}{row['ratio']:>7.3f}", flush=True)
        fitted = {"bare": exponent(counts, bare), "more": exponent(counts, more)}
        rows[f"growth, exponent of {what}"] = {**fitted, "target": 1.0}
        print(f"fitted exponent: bare {fitted['bare']:.2f}, what attaching adds {fitted['more']:.2f} (target 1)")
    return rows
