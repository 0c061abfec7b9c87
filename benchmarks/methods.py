"""Further methods against other implementations of them, on ResNet-50's parameters."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import optim

import layerwise
from layerwise.rules import AGC, LayerMoment, Trust

from .networks import resnet50_parameters, with_gradients
from .timing import Row, compared

LR, DECAY = 1e-6, 1e-2
SHARES = [
    ("Trust on AdamW", "timm, Lamb", 0.6),
    ("Trust on AdamW, fused", "timm, Lamb", 0.6),
    ("Trust on AdamW, fused", "torch-optimizer, Lamb", 0.35),
    ("LayerMoment on SGD", "pytorch-optimizer, NovoGrad", 0.6),
    ("LayerMoment on SGD, fused", "pytorch-optimizer, NovoGrad", 0.6),
]
"""Ours, theirs, and the largest share of their time."""
ADDED = [
    (f"AGC by unit{fused}, {clipped} clipped", f"SGD{fused}", f"timm, adaptive_clip_grad{fused}", 0.5)
    for fused in ("", ", fused")
    for clipped in ("all", "none")
]
"""Ours, the step without, theirs, and the largest share of what theirs adds to that step."""


def of_timm(module: str) -> Any:
    """Import a module of timm without the rest of it, which needs torchvision."""
    if "timm" in sys.modules:
        return importlib.import_module(module)
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        raise ImportError("timm is not installed")
    for name in ("timm", "timm.optim", "timm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module(module)


def arms() -> dict[str, Callable[[], Any]]:
    """Return one step of each implementation; those that are not installed are left out."""

    def adamw(parameters: Any, fused: bool) -> optim.Optimizer:
        return optim.AdamW(parameters, lr=LR, weight_decay=DECAY, eps=1e-6, fused=fused)

    def sgd(parameters: Any, fused: bool) -> optim.Optimizer:
        return optim.SGD(parameters, lr=LR, momentum=0.95, weight_decay=DECAY, fused=fused)

    def attached(base: Callable[[Any, bool], optim.Optimizer], rule: Any, fused: bool) -> Any:
        def make(parameters: Any, model: Any) -> optim.Optimizer:
            optimizer = base(parameters, fused)
            layerwise.LayerwiseLR(optimizer, rule, model)
            return optimizer

        return make

    def timm(parameters: Any, model: Any) -> optim.Optimizer:
        return of_timm("timm.optim.lamb").Lamb(parameters, lr=LR, weight_decay=DECAY, max_grad_norm=None)

    def torch_optimizer(parameters: Any, model: Any) -> optim.Optimizer:
        return importlib.import_module("torch_optimizer").Lamb(parameters, lr=LR, weight_decay=DECAY)

    def novograd(parameters: Any, model: Any) -> optim.Optimizer:
        return importlib.import_module("pytorch_optimizer").NovoGrad(parameters, lr=LR, weight_decay=DECAY)

    made: dict[str, Any] = {
        "AdamW": lambda parameters, model: adamw(parameters, False),
        "AdamW, fused": lambda parameters, model: adamw(parameters, True),
        "Trust on AdamW": attached(adamw, Trust(), False),
        "Trust on AdamW, fused": attached(adamw, Trust(), True),
        "timm, Lamb": timm,
        "torch-optimizer, Lamb": torch_optimizer,
        "LayerMoment on SGD": attached(sgd, LayerMoment(), False),
        "LayerMoment on SGD, fused": attached(sgd, LayerMoment(), True),
        "pytorch-optimizer, NovoGrad": novograd,
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in made.items():
        model = with_gradients(resnet50_parameters())
        try:
            steps[name] = make(model.parameters(), model).step
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return steps


def clipping() -> dict[str, Callable[[], Any]]:
    """Return one step of SGD without and with adaptive gradient clipping, all from the same gradients each time."""
    gradients = [p.grad for p in with_gradients(resnet50_parameters()).parameters()]

    def made(fused: bool, clip: float | None, clip_all: Any = None) -> Callable[[], Any]:
        model = with_gradients(resnet50_parameters())
        parameters = list(model.parameters())
        optimizer = optim.SGD(parameters, lr=LR, momentum=0.95, weight_decay=DECAY, fused=fused)
        if clip is not None:
            layerwise.LayerwiseLR(optimizer, AGC(clip), model, layers="unit")

        def step() -> None:
            torch._foreach_copy_([p.grad for p in parameters], gradients)
            if clip_all is not None:
                clip_all(parameters)
            optimizer.step()

        return step

    steps: dict[str, Callable[[], Any]] = {}
    for fused, of in ((False, ""), (True, ", fused")):
        steps[f"SGD{of}"] = made(fused, None)
        steps[f"AGC by unit{of}, all clipped"] = made(fused, 1e-6)
        steps[f"AGC by unit{of}, none clipped"] = made(fused, 1e6)
        try:
            steps[f"timm, adaptive_clip_grad{of}"] = made(fused, None, of_timm("timm.utils.agc").adaptive_clip_grad)
        except ImportError as error:
            print(f"left out: timm, adaptive_clip_grad{of} ({error})")
    return steps


def measure(rounds: int) -> dict[str, Row]:
    """Print the tables and return their rows."""
    rows = {**compared(arms(), rounds), **compared(clipping(), rounds)}
    print(f"\n{'one step on ResNet-50' + chr(39) + 's tensors':<39}{'ms':>9}")
    for name, row in rows.items():
        print(f"{name:<39}{row['ms']:>9.2f}", flush=True)
    shares: dict[str, Row] = {}
    for ours, theirs, target in SHARES:
        if ours in rows and theirs in rows:
            share = rows[ours]["ms"] / rows[theirs]["ms"]
            shares[f"{ours}, to {theirs}"] = {"ratio": share, "target": target}
            print(f"{ours} takes {share:.3f} of {theirs}; target {target}")
    for ours, bare, theirs, target in ADDED:
        if theirs in rows:
            share = (rows[ours]["ms"] - rows[bare]["ms"]) / (rows[theirs]["ms"] - rows[bare]["ms"])
            shares[f"what {ours} adds, to {theirs}"] = {"ratio": share, "target": target}
            print(f"{ours} adds {share:.3f} of what {theirs} adds; target {target}")
    return {**{name: {"ms": row["ms"]} for name, row in rows.items()}, **shares}
