"""Measure how far the places of a factor lead apart, per optimizer: the table of `docs/places.md`.

    python docs/measure_places.py            # prints the table
    python docs/measure_places.py --write    # and puts it into the page

Three linear layers learn a smooth function for 20 steps in float64, each step with a mini-batch of its own, from the
same weights; only the place differs.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import Constant, LayerAdaptive

PAGE = Path(__file__).with_name("places.md")
BEGIN, END = "<!-- measured: python docs/measure_places.py --write -->", "<!-- end of what was measured -->"
STEPS = 20
FIXED, CHANGING = Constant({"0": 0.5, "2": 2.0}), LayerAdaptive()

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.02, momentum=0.9),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "SGD, momentum, weight decay": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.02),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.003),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adam": lambda p: optim.Adam(p, lr=0.005),
    "AdamW": lambda p: optim.AdamW(p, lr=0.005),
    "Adamax": lambda p: optim.Adamax(p, lr=0.005),
    "NAdam": lambda p: optim.NAdam(p, lr=0.005),
    "RAdam": lambda p: optim.RAdam(p, lr=0.005),
    "Muon": lambda p: optim.Muon(p, lr=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.02),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: optim.Rprop(p, lr=0.005),
}


def weights(make: Callable[[Any], optim.Optimizer], rule: Any = None, apply: Any = None) -> Tensor:
    """Return all weights after training, with a rule at a place or, without a rule, plainly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(16, 1, bias=False)).double()
        inputs = torch.randn(STEPS, 32, 8, dtype=torch.float64)
    optimizer = make(model.parameters())
    if rule is not None:
        layerwise.LayerwiseLR(optimizer, rule, model, apply=apply)
    for batch in inputs if make is not begin else ():
        optimizer.zero_grad()
        (model(batch) - batch[:, :1] * batch[:, 1:2]).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def begin(parameters: Any) -> optim.Optimizer:
    """Stand for no training at all."""
    return optim.SGD(parameters)


def distances(make: Callable[[Any], optim.Optimizer]) -> list[float]:
    """Return distances in % of the way that training went, for fixed and then for changing factors.

    Each time from the rate to the gradient and to the update, and from the gradient to no factor at all.
    """
    start, plain, found = weights(begin), weights(make), []
    for rule in (FIXED, CHANGING):
        gradient, update = weights(make, rule, "gradient"), weights(make, rule, "update")
        try:
            rate = weights(make, rule, "lr")
        except ValueError:  # refused: this optimizer reads its rate too late
            rate = None
        pairs = [(update if rate is None else rate, gradient), (rate, update), (gradient, plain)]
        way = (update - start).norm()
        found += [math.nan if one is None else float(100 * (one - other).norm() / way) for one, other in pairs]
    return found


def table() -> str:
    """Return the table of the page."""
    kinds = ["`gradient` from `lr`", "`update` from `lr`", "`gradient` from no factor"]
    titles = [f"{factors}: {kind}" for factors in ("fixed", "changing") for kind in kinds]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for name, make in OPTIMIZERS.items():
        cells = ["–" if math.isnan(value) else "0" if value < 1e-5 else f"{value:.2f}" for value in distances(make)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the adapter's, of places without effect
    made = table()
    sys.stdout.write(made + "\n")
    if "--write" in sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
