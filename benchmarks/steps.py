"""What attaching adds to one optimizer step, on the parameters of several networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise._hooks import OptimizerHooks
from layerwise.rules import LARS, Constant, LayerAdaptive

from .networks import resnet50_parameters, resnet101_parameters, small_layers, transformer_parameters, with_gradients
from .timing import Row, heading, ratio, show

SGD: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
NAG: dict[str, Any] = {**SGD, "nesterov": True}
Make = Callable[[Any], optim.Optimizer]
MAKERS: dict[str, Make] = {
    "SGD momentum": lambda p: optim.SGD(p, **SGD),
    "SGD momentum, fused": lambda p: optim.SGD(p, **SGD, fused=True),
    "SGD momentum, foreach": lambda p: optim.SGD(p, **SGD, foreach=True),
    "SGD Nesterov": lambda p: optim.SGD(p, **NAG),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-6),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=1e-6, fused=True),
}
RESNET_50: list[tuple[str, float | None, Any, dict[str, Any]]] = [
    ("SGD momentum", 1.25, LayerAdaptive(), {}),
    ("SGD momentum, fused", 1.35, LayerAdaptive(), {}),
    ("AdamW, fused", 1.2, LayerAdaptive(), {}),
    ("AdamW", 1.1, LayerAdaptive(), {}),
    ("SGD momentum, foreach", None, LayerAdaptive(), {}),
    ("SGD Nesterov", None, LayerAdaptive(), {}),
    ("SGD momentum", None, LayerAdaptive(), {"apply": "gradient"}),
    ("SGD momentum, fused", None, LayerAdaptive(), {"apply": "gradient"}),
    ("SGD momentum", None, LayerAdaptive(), {"apply": "update"}),
    ("SGD momentum", None, LARS(), {}),
    ("SGD momentum, fused", None, LARS(), {}),
    ("AdamW, fused", None, Constant({"*": 2.0}), {}),
]
OTHERS: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("1,000 layers of 64", small_layers, 2.0),
    ("transformer, 24 blocks", transformer_parameters, 1.3),
    ("ResNet-101", resnet101_parameters, 1.3),
]


def step_cost(make: Make, parameters: Callable[[], nn.Module], rule: Any, rounds: int, **arguments: Any) -> Row:
    """Time one optimizer step, bare and attached."""
    steps = []
    for attach in (False, True):
        model = with_gradients(parameters())
        optimizer = make(model.parameters())
        if attach:
            layerwise.LayerwiseLR(optimizer, rule, model, **arguments)
        steps.append(optimizer.step)
    return ratio(steps[0], steps[1], rounds)


class Count(TorchDispatchMode):
    """Counts dispatched operations, and those that read a value from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def counted(layer_count: int) -> Row:
    """Dispatched operations from gradients to factors, and values read."""
    model = with_gradients(nn.Sequential(*(nn.Linear(3, 3) for _ in range(layer_count))))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    (attached,) = OptimizerHooks.members_of(optimizer)
    optimizer.step()
    with Count() as count:
        attached.measure(optimizer)
    return {"operations": count.operations, "reads": count.reads, "target": 12}


def measure(rounds: int) -> dict[str, Row]:
    """Print the tables and return their rows."""
    rows: dict[str, Row] = {}
    heading("one step, ResNet-50's 161 tensors")
    for name, target, rule, options in RESNET_50:
        named = name + "".join(f", {value}" for value in options.values())
        named += "" if isinstance(rule, LayerAdaptive) else f", {type(rule).__name__}"
        row = step_cost(MAKERS[name], resnet50_parameters, rule, rounds, **options)
        rows[f"ResNet-50, {named}"] = show(named, row, target)
    for title, parameters, target in OTHERS:
        heading(f"one step, {title}")
        for name in ("SGD momentum", "SGD momentum, fused", "AdamW, fused"):
            row = step_cost(MAKERS[name], parameters, LayerAdaptive(), rounds)
            rows[f"{title}, {name}"] = show(name, row, target)
    print(f"\n{'gradients to factors':<39}{'operations':>11}{'reads':>7}{'target':>8}")
    for count in (4, 107, 1000):
        row = rows[f"operations, {count} layers"] = counted(count)
        print(f"{f'{count} layers':<39}{row['operations']:>11}{row['reads']:>7}{row['target']:>8}")
    return rows
