"""LARS against other implementations of layer-wise rates, and against what the memory allows.

The bare step of fused SGD reads gradient, weights and momentum and writes two of them: five passes. A norm must read
the gradient once more, LARS's weight norm the weights: seven. At the speed of that bare step these are the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, optim

import layerwise
from layerwise.rules import LARS, LayerAdaptive

from .networks import resnet50_parameters, with_gradients
from .timing import Row, compared

LR, MOMENTUM, DECAY, TRUST = 1e-6, 0.9, 1e-4, 0.001
TARGET = 0.45
"""Our LARS against the fastest of the others."""
PASSES = {"bare": 5, "LayerAdaptive": 6, "LARS": 7}
"""Passes over as many numbers as the network has parameters, with fused SGD."""
BOUND_TARGET = 1.25


class PlainLoop(optim.Optimizer):
    """LARS tensor by tensor, as the formula reads: v ← μv + r (g + λw), w ← w − lr v, r = η‖w‖/(‖g‖ + λ‖w‖)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                state, gradient = self.state[p], cast(Tensor, p.grad)
                if p.ndim > 1:
                    weight, norm = p.norm(), gradient.norm()
                    trust = torch.where(
                        (weight > 0) & (norm > 0), TRUST * weight / (norm + DECAY * weight), torch.ones_like(norm)
                    )
                    gradient = gradient.add(p, alpha=DECAY).mul_(trust)
                else:
                    gradient = gradient.add(p, alpha=DECAY)
                if "history" not in state:
                    state["history"] = torch.zeros_like(p)
                history = state["history"]
                history.mul_(MOMENTUM).add_(gradient)
                p.add_(history, alpha=-LR)


def arms() -> dict[str, Callable[[], Any]]:
    """Return one step of each implementation, on ResNet-50's parameters; those not installed are left out."""

    def sgd(parameters: Any) -> optim.Optimizer:
        return optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)

    def attached(rule: Any) -> Callable[[Any, Any], optim.Optimizer]:
        def make(parameters: Any, model: Any) -> optim.Optimizer:
            optimizer = sgd(parameters)
            layerwise.LayerwiseLR(optimizer, rule, model)
            return optimizer

        return make

    def others_lars(foreach: bool) -> Callable[[Any, Any], optim.Optimizer]:
        def make(parameters: Any, model: Any) -> optim.Optimizer:
            import pytorch_optimizer as others

            return others.LARS(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, foreach=foreach)

        return make

    def lamb(parameters: Any, model: Any) -> optim.Optimizer:
        import torch_optimizer as others

        return others.Lamb(parameters, lr=LR, weight_decay=DECAY)

    made: dict[str, Callable[[Any, Any], optim.Optimizer]] = {
        "bare": lambda parameters, model: sgd(parameters),
        "LayerAdaptive": attached(LayerAdaptive()),
        "LARS": attached(LARS(trust_coefficient=TRUST)),
        "plain loop over tensors, LARS": lambda parameters, model: PlainLoop(parameters),
        "pytorch-optimizer, LARS": others_lars(False),
        "pytorch-optimizer, LARS, foreach": others_lars(True),
        "torch-optimizer, LAMB": lamb,
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in made.items():
        model = with_gradients(resnet50_parameters())
        try:
            steps[name] = make(model.parameters(), model).step
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return steps


def bandwidth(rounds: int) -> float:
    """Return the speed at which 100 MB are copied, in GB/s, read and written counted."""
    source, target = torch.zeros(25_000_000), torch.zeros(25_000_000)
    times = compared({"copy": lambda: target.copy_(source)}, rounds)
    return 2 * 0.1 / (times["copy"]["ms"] / 1000)


def measure(rounds: int) -> dict[str, Row]:
    """Print the table and return its rows."""
    speed = bandwidth(rounds)
    rows = compared(arms(), rounds)
    print(f"\none step on ResNet-50's tensors; copying runs at {speed:.1f} GB/s")
    print(f"{'fused SGD, momentum, decay':<39}{'ms':>9}{'to bare':>9}{'bound':>8}{'to bound':>10}{'target':>8}")
    for name, row in rows.items():
        passes = PASSES.get(name)
        row["target"] = None
        if passes:
            row["bound"] = passes / PASSES["bare"]
            row["to_bound"] = row["ratio"] / row["bound"]
            row["target"] = BOUND_TARGET if name != "bare" else None
        bound = f"{row['bound']:>8.2f}{row['to_bound']:>10.3f}" if passes else f"{'':>18}"
        print(f"{name:<39}{row['ms']:>9.2f}{row['ratio']:>9.3f}{bound}{row['target'] or '':>8}", flush=True)
    others = {name: row["ms"] for name, row in rows.items() if name not in PASSES}
    fastest = min(others, key=lambda name: others[name], default="")
    share = rows["LARS"]["ms"] / others[fastest] if others else math.nan
    print(f"our LARS takes {share:.3f} of the fastest other ({fastest}); target {TARGET}")
    return {
        **{f"peers, {name}": row for name, row in rows.items()},
        "peers, our LARS to the fastest other": {"ratio": share, "target": TARGET, "fastest": fastest},
        "memory, copy": {"gigabytes_per_second": speed},
    }
