"""Memory that attaching takes: what stays between steps, and what a step allocates beyond the bare one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layerwise
from layerwise.rules import LARS, AllLayers, Directionality, GradientAmplification, LayerAdaptive, Phase

from .networks import with_gradients
from .timing import Row

SGD: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, **SGD),
    "SGD, fused": lambda p: optim.SGD(p, **SGD, fused=True),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=1e-6, fused=True),
}
ANALYSIS = [Phase(10, True)]
"""Epoch 1 is one of analysis: gradients are summed."""
CASES: dict[str, tuple[str, Any, dict[str, Any], float | None]] = {
    "SGD, LayerAdaptive": ("SGD", LayerAdaptive(), {}, 0.0),
    "SGD, fused, LayerAdaptive": ("SGD, fused", LayerAdaptive(), {}, 0.0),
    "AdamW, fused, LayerAdaptive": ("AdamW, fused", LayerAdaptive(), {}, 0.0),
    "SGD, fused, LARS": ("SGD, fused", LARS(), {}, 0.0),
    "SGD, LayerAdaptive, update": ("SGD", LayerAdaptive(), {"apply": "update"}, None),
    "SGD, all layers amplified": ("SGD", GradientAmplification(AllLayers(), ANALYSIS), {}, 0.0),
    "SGD, amplification by G": ("SGD", GradientAmplification(Directionality("G"), ANALYSIS), {}, None),
    "SGD, amplification by G′": ("SGD", GradientAmplification(Directionality("G_prime"), ANALYSIS), {}, None),
}
"""Optimizer, rule, arguments, and the bytes a parameter that may stay, where there is a target."""


class Allocations(TorchDispatchMode):
    """Counts tensors that operations make, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _place(made) not in given:
                self.tensors += 1
                self.bytes += made.untyped_storage().nbytes()
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def live_bytes() -> int:
    """Return the bytes of all tensors that the process holds."""
    gc.collect()
    # Of these types only: others may hold no memory, and asking some modules' objects for their class warns.
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = [x.untyped_storage() for x in found if x.layout is torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def taken(make: Callable[[Any], optim.Optimizer], width: int, rule: Any, **arguments: Any) -> tuple[int, int, int, int]:
    """Return parameters, bytes that are there after three steps, and tensors and bytes that the fourth allocates."""
    before = live_bytes()
    model = with_gradients(nn.Sequential(*(nn.Linear(width, width) for _ in range(8))))
    optimizer = make(model.parameters())
    if rule is not None:
        layerwise.LayerwiseLR(optimizer, rule, model, **arguments)
    for _ in range(3):
        optimizer.step()
    kept = live_bytes() - before
    with Allocations() as allocations:
        optimizer.step()
    return sum(p.numel() for p in model.parameters()), kept, allocations.tensors, allocations.bytes


def more(case: str, width: int) -> Row:
    """Return what a case takes beyond the bare optimizer, in bytes a parameter and in tensors a step."""
    name, rule, arguments, target = CASES[case]
    bare = taken(OPTIMIZERS[name], width, None)
    attached = taken(OPTIMIZERS[name], width, rule, **arguments)
    count = bare[0]
    return {
        "kept_bytes": attached[1] - bare[1],
        "kept_a_parameter": (attached[1] - bare[1]) / count,
        "tensors_a_step": attached[2] - bare[2],
        "bytes_a_step": attached[3] - bare[3],
        "allocated_a_parameter": (attached[3] - bare[3]) / count,
        "target": target,
    }


def measure(rounds: int = 0) -> dict[str, Row]:
    """Print the table and return its rows."""
    torch.manual_seed(0)
    rows: dict[str, Row] = {}
    title = "8 layers, 8.4 million parameters"
    print(f"\n{title:<33}{'kept, bytes':>12}{'a param.':>9}{'step: tensors':>14}{'bytes':>12}")
    for case in CASES:
        row = rows[f"memory, {case}"] = more(case, 1024)
        print(
            f"{case:<33}{row['kept_bytes']:>12,}{row['kept_a_parameter']:>9.3f}"
            f"{row['tensors_a_step']:>14}{row['bytes_a_step']:>12,}"
        )
    return rows
