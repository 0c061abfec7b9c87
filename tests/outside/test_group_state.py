"""Optimizers that keep numbers in their parameter groups, or compile a function for the stack of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn, optim

import layerwise
from layerwise.rules import Constant, LayerAdaptive

STEPS = 5
FACTORS = {"0": 0.5, "2": 2.0, "4": 1.5}


class Lamb(optim.Optimizer):
    """LAMB with its count in the group, as a tensor that each step advances in place."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        clip = torch.stack([g.norm() for g in gradients]).norm().clamp(min=1.0)
        for group in self.param_groups:
            if "step" not in group:
                group["step"] = torch.zeros(())
            group["step"].add_(1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                g = p.grad / clip
                state["m"].lerp_(g, 0.1)
                state["v"].lerp_(g * g, 0.01)
                step = group["step"].item()
                update = state["m"] / (1 - 0.9**step) / ((state["v"] / (1 - 0.99**step)).sqrt() + 1e-6)
                update += group["weight_decay"] * p
                p.sub_(group["lr"] * (p.norm() / update.norm()) * update)


class Counting(optim.Optimizer):
    """SGD whose rate falls with a count in the group, kept as the argument says."""

    def __init__(self, params: Any, begin: Callable[[], Any], advance: Callable[[dict[str, Any]], float]) -> None:
        self.advance = advance
        super().__init__(params, {"lr": 0.1, "count": begin()})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if all(p.grad is None for p in group["params"]):
                continue
            number = self.advance(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / number * p.grad)


def in_place(group: dict[str, Any]) -> float:
    group["count"] += 1
    return float(group["count"])


def anew(group: dict[str, Any]) -> float:
    group["count"] = group["count"] + 1
    return float(group["count"])


def in_a_list(group: dict[str, Any]) -> float:
    group["count"][0] += 1
    return float(group["count"][0])


def in_a_dictionary(group: dict[str, Any]) -> float:
    group["count"]["t"] = group["count"]["t"] + 1
    return float(group["count"]["t"])


FORMS: dict[str, tuple[Callable[[], Any], Callable[[dict[str, Any]], float]]] = {
    "a number": (lambda: 0, in_place),
    "a tensor in place": (lambda: torch.zeros(()), in_place),
    "a tensor anew": (lambda: torch.zeros(()), anew),
    "a list": (lambda: [0], in_a_list),
    "a list of a tensor": (lambda: [torch.zeros(())], in_a_list),
    "a dictionary": (lambda: {"t": 0}, in_a_dictionary),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(6, 4, generator=generator, dtype=torch.float64)).pow(2).sum().backward()


def trained(model: nn.Module, optimizer: optim.Optimizer, steps: int = STEPS) -> list[Tensor]:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def with_own_groups(begin: Callable[[], Any], advance: Callable[[dict[str, Any]], float]) -> list[Tensor]:
    model = network()
    groups = [{"params": list(model[int(n)].parameters()), "lr": 0.1 * f, "count": begin()} for n, f in FACTORS.items()]
    return trained(model, Counting(groups, begin, advance))


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("place", ["auto", "lr"])
def test_lamb_with_its_count_in_a_tensor_equals_permanent_groups(place: Any) -> None:
    model = network()
    optimizer = Lamb(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=place)
    assert adapter.apply == "lr"
    result = trained(model, optimizer, 1)
    counter = optimizer.param_groups[0]["step"]
    result = [*result, *trained(model, optimizer, STEPS - 1)]
    assert optimizer.param_groups[0]["step"] is counter
    assert counter.item() == STEPS
    reference = network()
    own = Lamb([{"params": list(reference[int(name)].parameters()), "lr": 0.05 * f} for name, f in FACTORS.items()])
    assert_equal(result, [*trained(reference, own, 1), *trained(reference, own, STEPS - 1)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["auto", "lr", "update"])
def test_a_count_advances_once_a_step_however_it_is_kept(form: str, place: Any) -> None:
    begin, advance = FORMS[form]
    model = network()
    optimizer = Counting(model.parameters(), begin, advance)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=place)
    result = trained(model, optimizer)
    count = optimizer.param_groups[0]["count"]
    count = count[0] if isinstance(count, list) else count["t"] if isinstance(count, dict) else count
    assert float(count) == STEPS
    assert_equal(result, with_own_groups(begin, advance))


def test_a_layer_without_gradient_does_not_hold_back_the_count() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = Counting(model.parameters(), *FORMS["a tensor in place"])
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="lr")
    trained(model, optimizer)
    assert optimizer.param_groups[0]["count"].item() == STEPS


@pytest.mark.parametrize("form", ["a tensor in place", "a list"])
def test_one_count_for_all_groups_goes_on_as_without_an_adapter(form: str) -> None:
    weights = []
    for factor in (None, 0.5):
        model = network()
        groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]
        optimizer = Counting(groups, *FORMS[form])
        if factor is not None:
            adapter = layerwise.LayerwiseLR(optimizer, Constant({"4": factor}), model)
            assert adapter.apply == "update"
            with pytest.raises(ValueError, match=r"param_groups\(model\).*apply='update'"):
                layerwise.LayerwiseLR(optimizer, Constant({"4": factor}), model, apply="lr")
        start = [p.detach().clone() for p in model.parameters()]
        weights.append([p - s for p, s in zip(trained(model, optimizer, 1), start, strict=True)])
        count = optimizer.param_groups[0]["count"]
        assert float(count[0] if isinstance(count, list) else count) == 2
    assert_equal(weights[1], [*weights[0][:4], *(0.5 * way for way in weights[0][4:])])


class FromTheGroup(Counting):
    """SGD that divides by the largest gradient of the group so far."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            largest = max(float(p.grad.abs().max()) for p in group["params"] if p.grad is not None)
            group["count"] = max(group["count"], largest)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / group["count"] * p.grad)


def test_what_follows_from_the_whole_group_keeps_it_whole() -> None:
    model, bare = network(), network()
    optimizer, alone = (FromTheGroup(net.parameters(), lambda: 0.0, anew) for net in (model, bare))
    with pytest.raises(ValueError, match="apply='update'"):
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="lr")
    assert layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model).apply == "update"
    start = [p.detach().clone() for p in model.parameters()]
    ways = [b - s for b, s in zip(trained(bare, alone, 1), start, strict=True)]
    each = [f for f in FACTORS.values() for _ in range(2)]
    expected = [s + f * way for s, f, way in zip(start, each, ways, strict=True)]
    assert_equal(trained(model, optimizer, 1), expected)
    assert optimizer.param_groups[0]["count"] == alone.param_groups[0]["count"]


# --- A function that the step compiles for the stack of a group ------------------------------------------------------


class Stacked(optim.Optimizer):
    """SGD with momentum over the stack of a group's matrices, in a function that is compiled as its users do."""

    def __init__(self, params: Any, function: Callable[..., None]) -> None:
        super().__init__(params, {"lr": 0.01})
        self.function, self.rate = function, torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            for p in held:
                self.state[p].setdefault("m", torch.zeros_like(p))
            if held:
                moments = [self.state[p]["m"] for p in held]
                weights, m = torch.stack(held), torch.stack(moments)
                self.function(weights, m, torch.stack([p.grad for p in held]), self.rate.fill_(group["lr"]))
                torch._foreach_copy_(held, list(weights.unbind()))
                torch._foreach_copy_(moments, list(m.unbind()))


def stacked_step(weights: Tensor, m: Tensor, gradients: Tensor, rate: Tensor) -> None:
    m.lerp_(gradients, 0.1)
    weights.sub_(rate * m)


@pytest.mark.parametrize("place", ["auto", "lr"])
def test_a_compiled_stack_meets_few_shapes(place: Any) -> None:
    dynamo.reset()
    graphs: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return module.forward

    compiled = torch.compile(stacked_step, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for function in (stacked_step, compiled):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(40)))
        optimizer = Stacked(model.parameters(), function)
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, bounds=(0, 4.4), apply=place)
        shared = set()
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                drawn = torch.randn(7, 6, generator=generator)
                p.grad = drawn[:6] * 0.05 * 10.0 ** drawn[6, 0]
            optimizer.step()
            shared.add(list(adapter.get_last_factors().values()).count(4.4))
        assert len(shared) > 8  # torch compiles eight times, and then raises
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)
    assert 0 < len(graphs) <= 4
    dynamo.reset()
