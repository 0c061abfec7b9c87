"""Optimizers whose class is put together in an unusual way, and tensors that are not the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import Constant, LayerAdaptive


class Slotted(optim.Optimizer):
    """Keeps attributes in `__slots__`."""

    __slots__ = ("__private", "scale", "steps")

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.scale, self.steps, self.__private = 2.0, 0, 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps = self.steps + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.scale * self.__private * p.grad)


class WithoutHash(optim.SGD):
    """Is equal to others of its rate, and therefore has no hash."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithoutHash)


class ComputedGroups(optim.Optimizer):
    """Has its groups in a property that cannot be set."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.mine: list[Any] = []
        self.defaults, self.state = {"lr": lr}, {}
        optim.Optimizer.__setstate__(self, {})
        self.mine.append({"params": list(params), "lr": lr})
        self._patch_step_function()

    @property
    def param_groups(self) -> Any:
        return self.mine

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def moved(optimizer: Any, model: nn.Module, rate: float, steps: int = 3) -> list[float]:
    """Return how far each layer went, in units of the gradient times the rate."""
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        optimizer.step()
    return [
        float(((a - p.detach()) / (steps * rate * p.grad)).mean())
        for a, p in zip(before, model.parameters(), strict=True)
    ]


@pytest.mark.parametrize("apply", ["auto", "lr", "update"])
def test_attributes_in_slots_are_seen_and_kept(apply: Any) -> None:
    model = network()
    optimizer = Slotted(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model, apply=apply)
    assert moved(optimizer, model, 0.2) == pytest.approx([0.5, 1.0])
    assert optimizer.steps == 3
    assert adapter.apply == ("update" if apply == "update" else "lr")


def test_an_optimizer_without_a_hash_is_attached_and_watched() -> None:
    model, other = network(), network()
    optimizer, twin = (WithoutHash(one.parameters(), lr=0.1) for one in (model, other))
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model)
    second = layerwise.LayerwiseLR(twin, Constant({"0": 0.25}), other)
    assert moved(optimizer, model, 0.1) == pytest.approx([0.5, 1.0])
    assert moved(twin, other, 0.1) == pytest.approx([0.25, 1.0])
    adapter.detach()
    assert moved(optimizer, model, 0.1) == pytest.approx([1.0, 1.0])
    second.detach()


def test_groups_in_a_property_are_right_under_auto_and_refuse_lr() -> None:
    model = network()
    optimizer = ComputedGroups(model.parameters())
    with pytest.raises(ValueError, match=r"computes its param_groups .*use apply='update'"):
        layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model, apply="lr")
    assert layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}), model).apply == "update"
    assert moved(optimizer, model, 0.1) == pytest.approx([0.5, 1.0])
    model = network()
    assert "computes its param_groups" in layerwise.diagnose(ComputedGroups(model.parameters()), model)


# --- Tensors that are not the model's ---------------------------------------------------------------------------------


def refusal(optimizer: Any, model: nn.Module) -> str:
    with pytest.raises(ValueError, match="owns none of the") as refused:
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    return str(refused.value)


def test_placeholders_are_told_from_a_wrong_model() -> None:
    for dummy in (torch.empty(0, requires_grad=True), torch.zeros(1, requires_grad=True)):
        text = refusal(optim.SGD([dummy], lr=0.1), network())
        assert "placeholders" in text
        assert "fully_shard" not in text


def test_copies_of_the_weights_can_be_attached_by_name() -> None:
    model = network()
    copies = [(name, p.detach().clone().requires_grad_()) for name, p in model.named_parameters()]
    text = refusal(optim.SGD([p for _, p in copies], lr=0.1), model)
    assert "master weights" in text
    assert "fully_shard" not in text
    optimizer = optim.SGD(copies, lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 0.5}))
    assert adapter.layers == ["0", "1"]
    before = [p.detach().clone() for _, p in copies]
    for _, p in copies:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float((a - p.detach()).mean()) for a, (_, p) in zip(before, copies, strict=True)] == pytest.approx(
        [0.05, 0.1]
    )


def test_bare_tensors_are_named_by_layers() -> None:
    tensor = torch.zeros(5, requires_grad=True)
    optimizer = optim.SGD([tensor], lr=0.1)
    text = refusal(optimizer, network())
    assert "layers={'name': [tensor]}" in text
    assert "fully_shard" not in text
    specification: dict[str, list[Tensor]] = {"name": [tensor]}
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"name": 0.5}), layers=specification)
    tensor.grad = torch.ones(5)
    optimizer.step()
    assert float(tensor.detach().mean()) == pytest.approx(-0.05)
    assert adapter.layers == ["name"]
