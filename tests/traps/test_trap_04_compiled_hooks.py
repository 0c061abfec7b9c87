"""Trap 4: traced into a compiled step, the hooks were silently wrong: the graph read the optimizer's own groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, optim

import layerwise
import reference
from layerwise.rules import LayerAdaptive

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

MOMENTUM: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1}
CASES = {
    "momentum, on the gradient": ("SGD", 0.02, MOMENTUM, "auto", "gradient"),
    "momentum, on the gradient itself": ("SGD", 0.02, MOMENTUM, "gradient", "gradient"),
    "momentum, on the rate": ("SGD", 0.02, MOMENTUM, "lr", "lr"),
    "momentum, on a rate that is a tensor": ("SGD", torch.tensor(0.02, dtype=torch.float64), MOMENTUM, "lr", "lr"),
    "momentum, on the update": ("SGD", 0.02, MOMENTUM, "update", "lr"),
    "AdamW, on the rate": ("AdamW", 0.02, {"weight_decay": 0.1}, "lr", "lr"),
    "AdamW, on the update": ("AdamW", 0.02, {"weight_decay": 0.1}, "update", "lr"),
}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    dynamo.reset()
    yield
    dynamo.reset()


def as_it_is(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    return module.forward


@pytest.mark.parametrize(
    ("case", "what"),
    [
        pytest.param(case, what, id=f"{name}: {what}")
        for name, case in CASES.items()
        for what in ("the step", "the whole iteration")
        if what == "the step" or case[0] == "SGD"
    ],
)
def test_a_compiled_step_takes_the_steps_of_a_slow_loop_with_factors_of_its_own(case, what, make_model):
    name, rate, options, place, meaning = case
    model = make_model()
    parameters = list(model.parameters())
    weights, layer_of = [p.detach().numpy().copy() for p in parameters], [0, 0, 1, 1, 2, 2]
    if name == "SGD":
        optimizer: Any = optim.SGD(parameters, lr=rate, **options)
        slow: Any = reference.TorchSGD(weights, layer_of, place=meaning, decay="scaled", **options)
    else:
        optimizer = optim.AdamW(parameters, lr=rate, **options)
        slow = reference.Adam(weights, layer_of, decoupled=True, **options)
    seen: list[list[Any]] = []
    look = torch.compiler.disable(lambda *_: seen.append([p.grad.numpy().copy() for p in parameters]))
    optimizer.register_step_pre_hook(look)  # runs before the adapter's, which may scale the gradients in place
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)

    def forward_and_backward(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()

    def iteration(x: Tensor) -> None:
        forward_and_backward(x)
        optimizer.step()

    whole = torch.compile(iteration, backend=as_it_is)
    step = torch.compile(optimizer.step, backend=as_it_is)
    for number in range(6):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        if what == "the step":
            forward_and_backward(x)
            step()
        else:
            whole(x)
        gradients = seen[-1]
        factors = reference.layer_adaptive([gradients[:2], gradients[2:4], gradients[4:]])
        slow.step(gradients, float(rate), factors.tolist())
        assert list(adapter.get_last_factors().values()) == pytest.approx(factors.tolist(), rel=1e-12)
        for p, weight in zip(parameters, slow.weights, strict=True):
            # Compiled, AdamW keeps its bias corrections in float32, with or without an adapter.
            tolerance = 1e-12 if name == "SGD" else 1e-5
            assert abs(p.detach().numpy() - weight).max() <= tolerance * abs(weight).max()
    assert len(seen) == 6
