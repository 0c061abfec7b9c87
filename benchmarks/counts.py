"""Operations a step, counted on tensors that only claim to be on a CUDA device.

There each dispatched operation is at least one kernel, and reading a value is an error, so that a step that runs at all
waits for nothing. Under `"lr"` most optimizers need their rates as numbers: those read the factors once a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.apply import Factors
from layerwise.optimizers import PlaceName
from layerwise.rules import LayerAdaptive

from .timing import Row

LAYERS = 10
"""Of two tensors each."""
FOREACH: dict[str, Any] = {"lr": 0.1, "foreach": True}
"""What PyTorch takes by itself on CUDA, though not for tensors that only claim to be there."""
KINDS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, **FOREACH),
    "SGD momentum, decay": lambda p: optim.SGD(p, **FOREACH, momentum=0.9, weight_decay=0.1),
    "SGD Nesterov": lambda p: optim.SGD(p, **FOREACH, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: optim.Adagrad(p, **FOREACH),
    "RMSprop": lambda p: optim.RMSprop(p, **FOREACH),
    "Adadelta": lambda p: optim.Adadelta(p, **FOREACH),
    "Adam": lambda p: optim.Adam(p, **FOREACH),
    "AdamW": lambda p: optim.AdamW(p, **FOREACH),
    "AdamW, capturable": lambda p: optim.AdamW(p, **FOREACH, capturable=True),
    "RAdam": lambda p: optim.RAdam(p, **FOREACH),
    "NAdam": lambda p: optim.NAdam(p, **FOREACH),
}
PLACES: tuple[PlaceName | None, ...] = (None, "gradient", "lr", "update")


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view is no kernel, nor is asking for a size.
        self.count += not (func.is_view or func.namespace == "prim")
        return func(*args, **(kwargs or {}))


def step(kind: str, place: PlaceName | None) -> tuple[int, int]:
    """Return the operations of a step after the first, and how often it reads the factors."""
    reads = 0
    read = Factors.read

    def counted(self: Factors) -> list[float]:
        nonlocal reads
        reads += 1
        return [1.0 + 0.1 * i for i in range(LAYERS)]

    operations = Operations()
    with FakeTensorMode():
        named = [
            (f"{i}.{name}", nn.Parameter(torch.empty(shape, device="cuda")))
            for i in range(LAYERS)
            for name, shape in (("weight", (6, 6)), ("bias", (6,)))
        ]
        optimizer = KINDS[kind](named)
        if place is not None:
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), apply=place)
        Factors.read = counted
        try:
            for last in (False, True):
                for _, p in named:
                    p.grad = torch.empty_like(p)
                if last:
                    reads = 0
                    with operations:
                        optimizer.step()
                else:
                    optimizer.step()
        finally:
            Factors.read = read
    return operations.count, reads


def measure(rounds: int = 0) -> dict[str, Row]:
    """Print the table and return its rows."""
    rows: dict[str, Row] = {}
    logging.getLogger("layerwise").setLevel(logging.ERROR)  # here it is known that "gradient" does little under Adam
    heading = f"fake CUDA, {LAYERS} layers of 2 tensors"
    print(f"\n{heading:<39}{'bare':>8}{'gradient':>10}{'lr':>8}{'reads':>7}{'update':>8}")
    for kind in KINDS:
        counts = {place or "bare": step(kind, place) for place in PLACES}
        rows[f"operations, {kind}"] = {
            **{place: count for place, (count, _) in counts.items()},
            "reads under lr": counts["lr"][1],
        }
        operations = {place: count for place, (count, _) in counts.items()}
        print(
            f"{kind:<39}{operations['bare']:>8}{operations['gradient']:>10}{operations['lr']:>8}"
            f"{counts['lr'][1]:>7}{operations['update']:>8}"
        )
    return rows


if __name__ == "__main__":
    measure()
