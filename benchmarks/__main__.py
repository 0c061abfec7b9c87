"""What attaching costs: ratios to the bare optimizer, measured in turn in one process.

    python -m benchmarks [--rounds 30] [--threads 2] [--json FILE]

Each row times both sides alternately, so that a change of the machine's speed meets both alike, and gives the median of
each and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.rules import LARS, Constant, LayerAdaptive

from . import amplification, backward, monitor
from .networks import lenet_iteration, resnet50_parameters
from .timing import ratio


def step_cost(make: Callable[[Any], optim.Optimizer], rule: Any, rounds: int, **arguments: Any) -> dict[str, float]:
    """One optimizer step on ResNet-50's parameters, bare and attached."""
    steps = []
    for attach in (False, True):
        model = resnet50_parameters()
        optimizer = make(model.parameters())
        if attach:
            layerwise.LayerwiseLR(optimizer, rule, model, **arguments)
        steps.append(optimizer.step)
    return ratio(*steps, rounds)


def iteration_cost(rounds: int) -> dict[str, float]:
    """One whole training iteration of LeNet, batch 64."""
    return ratio(lenet_iteration(attach=False), lenet_iteration(attach=True), rounds)


class Count(TorchDispatchMode):
    """Counts dispatched operations, and those that read a value from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def operations(layer_count: int) -> tuple[int, int]:
    """Dispatched operations from gradients to factors, and values read."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layer_count)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    adapter.measure(optimizer)
    with Count() as count, torch.no_grad():
        adapter.measure(optimizer)
    return count.operations, count.reads


def import_cost(rounds: int) -> dict[str, float]:
    """Importing torch, and importing layerwise, each in a new process."""

    def run(module: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    return ratio(run("torch"), run("layerwise"), rounds)


SGD = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
NAG = {**SGD, "nesterov": True}
STEPS: list[tuple[str, float | None, Callable[[Any], optim.Optimizer], Any, dict[str, Any]]] = [
    ("SGD momentum, default", 1.45, lambda p: optim.SGD(p, **SGD), LayerAdaptive(), {}),
    ("SGD momentum, fused", 1.9, lambda p: optim.SGD(p, **SGD, fused=True), LayerAdaptive(), {}),
    ("AdamW, fused", 1.6, lambda p: optim.AdamW(p, lr=1e-6, fused=True), LayerAdaptive(), {}),
    ("SGD momentum, foreach", None, lambda p: optim.SGD(p, **SGD, foreach=True), LayerAdaptive(), {}),
    ("SGD Nesterov, default", None, lambda p: optim.SGD(p, **NAG), LayerAdaptive(), {}),
    ("SGD momentum, default, apply='gradient'", None, lambda p: optim.SGD(p, **SGD), LayerAdaptive(),
     {"apply": "gradient"}),
    ("SGD momentum, fused, apply='gradient'", None, lambda p: optim.SGD(p, **SGD, fused=True), LayerAdaptive(),
     {"apply": "gradient"}),
    ("SGD momentum, default, apply='update'", None, lambda p: optim.SGD(p, **SGD), LayerAdaptive(),
     {"apply": "update"}),
    ("SGD momentum, default, LARS", None, lambda p: optim.SGD(p, **SGD), LARS(), {}),
    ("AdamW, default", None, lambda p: optim.AdamW(p, lr=1e-6), LayerAdaptive(), {}),
    ("AdamW, fused, Constant", None, lambda p: optim.AdamW(p, lr=1e-6, fused=True), Constant({"*": 2.0}), {}),
]  # fmt: skip


def main() -> int:
    """Run the benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.threads} threads"
    print(f"{versions}; median of {arguments.rounds} rounds, ratio with its quartiles\n")
    heading = "one step, ResNet-50 (161 tensors)"
    print(f"{heading:<41}{'bare ms':>8}{'with':>8}{'ratio':>7}  {'quartiles':<12}{'target':>6}")
    rows: dict[str, Any] = {}

    def show(name: str, target: float | None, row: dict[str, float]) -> None:
        rows[name] = {**row, "target": target}
        spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
        goal = "" if target is None else f"{target:.2f}"
        print(f"{name:<41}{row['bare_ms']:>8.2f}{row['attached_ms']:>8.2f}{row['ratio']:>7.3f}  {spread:<12}{goal:>6}")

    for name, target, make, rule, options in STEPS:
        show(name, target, step_cost(make, rule, arguments.rounds, **options))
    show("LeNet, batch 64, whole iteration", 1.05, iteration_cost(10 * arguments.rounds))
    show("import layerwise / import torch", 1.2, import_cost(min(arguments.rounds, 7)))
    print(f"\n{'gradients to factors':<41}{'operations':>11}{'reads':>7}{'target':>11}")
    for count in (4, 107, 1000):
        total, reads = operations(count)
        rows[f"operations, {count} layers"] = {"operations": total, "reads": reads, "target": 12}
        print(f"{f'{count} layers':<41}{total:>11}{reads:>7}{'12':>11}")
    rows |= amplification.show(arguments.rounds)
    rows |= monitor.show(arguments.rounds)
    rows |= backward.show(arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
