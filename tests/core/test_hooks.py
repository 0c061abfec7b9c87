"""What other code around the step meets: wrappers, counters in groups, other hooks, closures, garbage collection."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.rules import LARC, Constant, LayerAdaptive, Rule


class Plain(optim.Optimizer):
    """Gradient descent that counts its steps in its groups, as many third-party optimizers do."""

    def __init__(self, params: Any, count: Any) -> None:
        super().__init__(params, {"lr": 0.1, "count": count})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                p -= group["lr"] * p.grad


class Inherited(Plain):
    """An optimizer whose step lets the class above take it."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


class MovesFirst(Plain):
    """Gradient descent that moves the weights before it evaluates its closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        if closure is not None:
            with torch.enable_grad():
                closure()
        super().step()


class Counted(Rule):
    """Factors of 1, or of a half from the third on, and a count of how often they were asked for."""

    needs = ()

    def init(self, layers: Any, device: Any) -> dict[str, Any]:
        return {"count": 0, "_layers": len(layers)}

    def factors(self, statistics: Any, state: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        factor = 1.0 if state["count"] < 2 else 0.5
        return torch.full((state["_layers"],), factor), {**state, "count": state["count"] + 1}


class Wrapper(optim.Optimizer):
    """An optimizer that lets another one step."""

    def __init__(self, base: optim.Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base
        self.param_groups = base.param_groups


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    backward(model, 0)
    return model


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(6, 4, generator=generator, dtype=torch.float64)).pow(2).sum().backward()


def test_a_count_in_the_groups_is_carried_over() -> None:
    model = network()
    optimizer = Plain(model.parameters(), 0)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["count"] == 3


@pytest.mark.parametrize("place", ["lr", "update"])
def test_a_count_in_a_tensor_is_right(place: Any) -> None:
    model = network()
    optimizer = Plain(model.parameters(), torch.tensor(0))
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["count"].item() == 3


@pytest.mark.parametrize("place", ["lr", "update", "gradient"])
def test_a_step_that_calls_that_of_the_class_above_is_measured_once(place: Any) -> None:
    Plain(network().parameters(), 0)  # torch adds the hooks to the step of a class with its first object
    model, bare = network(), network()
    optimizer, plain = Inherited(model.parameters(), 0), Plain(bare.parameters(), 0)
    adapter = layerwise.LayerwiseLR(optimizer, Counted(), model, apply=place)
    for step in range(4):
        backward(model, step)
        backward(bare, step)
        optimizer.step()
        assert adapter.state_dict()["state"] == {"count": step + 1}
        plain.param_groups[0]["lr"] = 0.1 * (1.0 if step < 2 else 0.5)
        plain.step()
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
    assert optimizer.param_groups[0]["count"] == 4


def test_an_optimizer_that_moves_the_weights_before_its_closure_is_told_of() -> None:
    model = network()
    optimizer = MovesFirst(model.parameters(), 0)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    optimizer.step()  # without a closure nothing is wrong
    with pytest.raises(RuntimeError, match="moves the weights before it evaluates its closure"):
        optimizer.step(lambda: backward(model, 1))


def test_an_optimizer_around_another_is_refused_and_the_inner_one_is_named() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"wraps another optimizer.* attach to optimizer\.base_optimizer"):
        layerwise.LayerwiseLR(Wrapper(optim.AdamW(model.parameters())), LayerAdaptive(), model)


@pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("layers", [["0"], ["2"]])
def test_momentum_of_parameters_in_no_layer_is_kept(layers: list[str], form: dict[str, Any]) -> None:
    attached, bare = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **form}
    optimizer, plain = optim.SGD(attached.parameters(), **options), optim.SGD(bare.parameters(), **options)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 1.0}), attached, layers=layers, apply="auto")
    adaptive = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), attached, layers=layers, bounds=(1.0, 1.0))
    assert adaptive.apply == "gradient"
    for step in range(4):
        for model, stepping in ((attached, optimizer), (bare, plain)):
            backward(model, step)
            stepping.step()
        for p, q in zip(attached.parameters(), bare.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])


def test_two_adapters_on_a_part_of_the_layers_each_equal_one_on_all() -> None:
    both, one = network(), network()
    optimizers = [optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for model in (both, one)]
    for layer in ("0", "2"):
        layerwise.LayerwiseLR(optimizers[0], LayerAdaptive(), both, layers=[layer])
    layerwise.LayerwiseLR(optimizers[1], LayerAdaptive(), one)
    for step in range(5):
        for model, optimizer in zip((both, one), optimizers, strict=True):
            backward(model, step)
            optimizer.step()
    for p, q in zip(both.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_momentum_that_is_set_later_decides_the_place_anew() -> None:
    late, early = network(), network()
    optimizers = [optim.SGD(late.parameters(), lr=0.1), optim.SGD(early.parameters(), lr=0.1, momentum=0.9)]
    adapters = [layerwise.LayerwiseLR(o, LayerAdaptive(), m) for o, m in zip(optimizers, (late, early), strict=True)]
    assert [adapter.apply for adapter in adapters] == ["lr", "gradient"]
    optimizers[0].param_groups[0]["momentum"] = 0.9  # as OneCycleLR does, in place
    for step in range(5):
        for model, optimizer in zip((late, early), optimizers, strict=True):
            backward(model, step)
            optimizer.step()
    assert adapters[0].apply == "gradient"
    for p, q in zip(late.parameters(), early.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("option", [{"nesterov": True}, {"dampening": 0.2}, {"momentum": 0.0}], ids=str)
def test_an_option_of_sgd_may_change_between_steps(option: dict[str, Any]) -> None:
    """A factor that acts through the dampening acts on the gradient as soon as the dampening is not free."""
    attached, by_hand = network(), network()
    optimizers = [optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for m in (attached, by_hand)]
    layerwise.LayerwiseLR(optimizers[0], LayerAdaptive(), attached)
    for step in range(6):
        if step in (2, 4):  # there and back
            before = {name: optimizers[0].param_groups[0][name] for name in option}
            for optimizer in optimizers:
                optimizer.param_groups[0].update(option)
            option = before
        for model in (attached, by_hand):
            backward(model, step)
        for layer in by_hand.children():
            of_layer = [(p, p.grad) for p in layer.parameters() if p.grad is not None]
            if of_layer:
                factor = LayerAdaptive().factor(torch.cat([g.flatten() for _, g in of_layer]).norm())
            for p, gradient in of_layer:
                p.grad = factor * (gradient + 0.01 * p.detach())
        optimizers[1].param_groups[0]["weight_decay"] = 0.0
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(attached.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_another_post_hook_can_read_what_it_is_handed() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen: list[Any] = []
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append((len(args[0].state), args[0].param_groups is o.param_groups))
    )
    optimizer.step()
    assert seen == [(4, True)]


def test_a_closure_may_detach() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    optimizer.step(lambda: (adapter.detach(), torch.tensor(0.0))[1])
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("place", ["auto", "gradient", "lr", "update"])
def test_after_an_exception_detaching_frees_everything(place: Any) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    adapter.detach()
    gone = weakref.ref(adapter)
    gc.collect()
    gc.disable()
    try:
        del adapter
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.001, 0.01, 0.5, 3.0])
def test_update_keeps_a_small_factor_in_half_precision(dtype: torch.dtype, factor: float) -> None:
    w = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = optim.SGD([("w", w)], lr=100.0)
    layerwise.LayerwiseLR(optimizer, Constant({"*": factor}), layers="parameter", apply="update")
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert w.item() == pytest.approx(-100 * factor, rel=1e-2)


def test_a_group_without_a_rate_is_told_of_when_the_rate_is_needed() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="has no 'lr' in its parameter groups"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    with pytest.raises(ValueError, match="needs the rate"):
        layerwise.LayerwiseLR(optimizer, LARC(), model, apply="update")


def test_a_step_is_taken_though_another_program_has_cleared_the_post_hooks() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"*": 3.0}), model)
    optimizer._optimizer_step_post_hooks.clear()
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.3)
    adapter.detach()
