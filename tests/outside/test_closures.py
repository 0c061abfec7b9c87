"""Closures: called when, as often, with what and in which gradient mode `step` calls them, with factors or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise import sinks
from layerwise.rules import Constant, LayerAdaptive, Rule

FACTORS = {"0": 0.5, "2": 3.0}
NEUTRAL = {"*": 1.0}
RATE = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Closure:
    """Computes the gradients of another batch at each call, and keeps how it was called."""

    def __init__(self, model: nn.Module, result: Any = "loss") -> None:
        self.model, self.result, self.calls = model, result, []
        self.fails = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs, torch.is_grad_enabled()))
        if self.fails:
            raise KeyError("no batch")
        generator = torch.Generator().manual_seed(len(self.calls))
        batch = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        with torch.enable_grad():
            self.model.zero_grad()
            loss = self.model(batch).square().sum()
            loss.backward()
        return loss if self.result == "loss" else self.result


class Never(optim.SGD):
    """Does without the closure, and steps with the gradients that are there."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


class EverySecond(optim.SGD):
    """Evaluates the closure in every second step."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        return super().step(closure if self.taken % 2 == 0 else None)


class Plain(optim.Optimizer):
    """Gradient descent by hand, which calls the closure in some way."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def evaluate(self, closure: Any) -> Any:
        with torch.enable_grad():
            return closure()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else self.evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad
        return loss


class WithArguments(Plain):
    """Tells its closure whether to compute gradients, as SAM's does."""

    def evaluate(self, closure: Any) -> Any:
        with torch.enable_grad():
            return closure("now", backward=True)


class WithoutGradients(Plain):
    """Calls the closure in the gradient mode of its own step."""

    def evaluate(self, closure: Any) -> Any:
        return closure()


class TwiceAtOnce(Plain):
    """Evaluates the closure twice before it moves anything."""

    def evaluate(self, closure: Any) -> Any:
        super().evaluate(closure)
        return super().evaluate(closure)


class ZeroesFirst(Plain):
    """Clears the gradients before it evaluates the closure."""

    def evaluate(self, closure: Any) -> Any:
        self.zero_grad()
        return super().evaluate(closure)


class LooksFirst(Plain):
    """Reads and counts in its groups before it evaluates the closure, and reads them again after."""

    def evaluate(self, closure: Any) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + len(group["params"])
        return super().evaluate(closure)


class ByAnotherName(Plain):
    """Has its closure elsewhere in the arguments."""

    @torch.no_grad()
    def step(self, scale: float = 1.0, loss_closure: Any = None) -> Any:
        return super().step(loss_closure)


RIGHT = (
    Never,
    EverySecond,
    Plain,
    WithArguments,
    WithoutGradients,
    TwiceAtOnce,
    ZeroesFirst,
    LooksFirst,
    optim.SGD,
)


class KeepsGroups(Plain):
    """Steps with groups that it read before the closure, and counts there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = list(self.param_groups)
        loss = None if closure is None else self.evaluate(closure)
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad
        return loss


class KeepsRates(Plain):
    """Steps with rates that it read before the closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = [(group["lr"], group["params"]) for group in self.param_groups]
        loss = None if closure is None else self.evaluate(closure)
        for rate, parameters in groups:
            for p in parameters:
                if p.grad is not None:
                    p -= rate * p.grad
        return loss


class MovesFirst(Plain):
    """Moves the weights before it evaluates the closure."""

    def evaluate(self, closure: Any) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p *= 0.9
        return super().evaluate(closure)


class Twice(optim.SGD):
    """Takes two steps in one."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def build(kind: Any, model: nn.Sequential, factors: dict[str, float] | None = None) -> Any:
    """Return an optimizer, of one group, or of a group for each layer with a rate of its own."""
    if factors is None:
        return kind(model.parameters(), lr=RATE)
    groups = [{"params": list(model[int(n)].parameters()), "lr": RATE * factors[n]} for n in ("0", "2")]
    return kind(groups, lr=RATE)


def call(optimizer: Any, closure: Any, form: str) -> Any:
    if isinstance(optimizer, ByAnotherName):
        return optimizer.step(1.0, closure) if form == "positional" else optimizer.step(loss_closure=closure)
    return optimizer.step(closure) if form == "positional" else optimizer.step(closure=closure)


def train(optimizer: Any, model: nn.Module, form: str = "positional", steps: int = 4, result: Any = "loss") -> Any:
    closure = Closure(model, result)
    losses = [call(optimizer, closure, form) for _ in range(steps)]
    weights = [p.detach().clone() for p in model.parameters()]
    return (weights, losses, optimizer.state_dict()["state"]), closure.calls


def same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


KEEPING = (KeepsGroups, KeepsRates)
EVERY = (*RIGHT, *KEEPING, ByAnotherName, MovesFirst, Twice)
every_place = pytest.mark.parametrize("apply", ["lr", "update"])


@pytest.mark.parametrize("apply", ["gradient", "auto", "update"])
@pytest.mark.parametrize("kind", EVERY)
def test_factors_of_one_equal_the_bare_optimizer(kind: Any, apply: Any) -> None:
    bare, model = network(), network()
    expected, calls = train(build(kind, bare), bare)
    optimizer = build(kind, model)
    layerwise.LayerwiseLR(optimizer, Constant(NEUTRAL), model, apply=apply)
    actual, called = train(optimizer, model)
    assert called == calls
    same(actual, expected)


@pytest.mark.parametrize(("adapter", "every"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("kind", EVERY)
def test_a_monitor_changes_no_call_and_records_each_step(kind: Any, adapter: bool, every: int) -> None:
    bare, model = network(), network()
    expected, calls = train(build(kind, bare), bare)
    optimizer, memory = build(kind, model), sinks.Memory()
    if adapter:
        layerwise.LayerwiseLR(optimizer, Constant(NEUTRAL), model)
    layerwise.Monitor(optimizer, model, every=every, sinks=[memory])
    actual, called = train(optimizer, model)
    assert called == calls
    same(actual, expected)
    assert [record.step for record in memory.records] == [n for n in (1, 2, 3, 4) if n % every == 0]


@pytest.mark.parametrize(("apply", "form"), [("auto", "positional"), ("update", "named")])
@pytest.mark.parametrize("kind", [*RIGHT, ByAnotherName])
def test_factors_act_as_in_permanent_groups(kind: Any, apply: Any, form: str) -> None:
    bare, model = network(), network()
    expected, calls = train(build(kind, bare, FACTORS), bare, form)
    optimizer = build(kind, model)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=apply)
    memory = sinks.Memory()
    layerwise.Monitor(optimizer, model, every=1, sinks=[memory])
    actual, called = train(optimizer, model, form)
    assert called == calls
    same(actual[:2], expected[:2], 1e-14)
    assert len(memory.records) == 4


@pytest.mark.parametrize("kind", KEEPING)
def test_groups_read_before_the_closure_are_right_under_update(kind: Any) -> None:
    bare, model = network(), network()
    expected, calls = train(build(kind, bare, FACTORS), bare)
    optimizer = build(kind, model)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="update")
    actual, called = train(optimizer, model)
    assert called == calls
    same(actual[:2], expected[:2], 1e-14)


@pytest.mark.parametrize("kind", KEEPING)
@pytest.mark.parametrize("gradients", [False, True])
def test_groups_read_before_the_closure_are_refused_under_lr(kind: Any, gradients: bool) -> None:
    model = network()
    optimizer, closure = build(kind, model), Closure(model)
    if gradients:
        closure()
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"reads rates from its parameter groups before .* apply='update'"):
        optimizer.step(closure)
    same(model.state_dict(), before)
    optimizer.step()  # the other remedy
    assert not torch.equal(model[0].weight, before["0.weight"])


@every_place
@pytest.mark.parametrize(
    ("kind", "message"),
    [(MovesFirst, "moves the weights before it evaluates"), (Twice, "evaluates its closure more than once")],
)
def test_weights_moved_around_a_closure_are_refused_and_put_back(kind: Any, message: str, apply: Any) -> None:
    model = network()
    optimizer = build(kind, model)
    closure = Closure(model)
    if kind is Twice:
        optimizer.param_groups[0]["momentum"] = 0.9
        bare = build(kind, model)
        bare.param_groups[0]["momentum"] = 0.9
        bare.step(closure)
        optimizer.load_state_dict(bare.state_dict())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), adapter.state_dict()["state"]])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)
    same([model.state_dict(), optimizer.state_dict(), adapter.state_dict()["state"]], before)
    adapter.detach()  # the remedy
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_a_second_evaluation_in_a_later_step_is_refused_too() -> None:
    class Later(EverySecond):
        def step(self, closure: Any = None) -> Any:
            self.taken += 1
            loss = optim.SGD.step(self, closure)
            return optim.SGD.step(self, closure) if self.taken == 3 else loss

    model = network()
    optimizer = build(Later, model)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    closure = Closure(model)
    optimizer.step(closure)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="evaluates its closure more than once"):
        optimizer.step(closure)


@pytest.mark.parametrize("kind", [optim.SGD, Plain, EverySecond, TwiceAtOnce])
def test_measured_factors_are_those_of_the_gradients_that_step(kind: Any) -> None:
    bare, model = network(), network()
    reference, optimizer = optim.SGD(bare.parameters(), lr=RATE), build(kind, model)
    expected = layerwise.LayerwiseLR(reference, LayerAdaptive(), bare)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    closure = Closure(model)
    for step in range(4):
        optimizer.step(closure)
        for p, q in zip(bare.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()  # those that the step has taken
        reference.step()
        assert adapter.get_last_factors() == pytest.approx(expected.get_last_factors(), rel=1e-13), step
        same(list(model.parameters()), list(bare.parameters()), 1e-13)


class Counting(Constant):
    """Factors that grow with each measurement."""

    def init(self, layers: Any, device: Any) -> dict[str, Any]:
        return {"count": 0, "_layers": len(layers)}

    def factors(self, statistics: Any, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        count = state["count"] + 1
        return torch.full((state["_layers"],), 1.0 + count, dtype=torch.float64), {**state, "count": count}


@pytest.mark.parametrize("kind", [optim.SGD, Plain, LooksFirst, TwiceAtOnce])
def test_a_rule_counts_a_step_once_however_often_it_was_measured(kind: Any) -> None:
    model = network()
    optimizer = build(kind, model)
    adapter = layerwise.LayerwiseLR(optimizer, Counting(NEUTRAL), model, apply="update")
    closure = Closure(model)
    closure()
    optimizer.step(closure)
    assert adapter.state_dict()["state"]["count"] == 1


def test_the_gradient_mode_and_the_arguments_are_those_of_step() -> None:
    seen: dict[Any, Any] = {}
    for kind in (Plain, WithoutGradients, WithArguments):
        model = network()
        optimizer = build(kind, model)
        layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
        seen[kind] = train(optimizer, model, steps=1)[1]
    assert seen == {
        Plain: [((), {}, True)],
        WithoutGradients: [((), {}, False)],
        WithArguments: [(("now",), {"backward": True}, True)],
    }


@pytest.mark.parametrize("result", [None, 1.5, (torch.ones(1), torch.zeros(2))], ids=["None", "number", "tuple"])
def test_what_a_closure_returns_is_returned(result: Any) -> None:
    model = network()
    optimizer = build(optim.SGD, model)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
    assert optimizer.step(Closure(model, result)) is result


@every_place
@pytest.mark.parametrize("kind", [optim.SGD, Plain, TwiceAtOnce, LooksFirst])
def test_a_failing_closure_moves_nothing_and_the_next_step_is_right(kind: Any, apply: Any) -> None:
    results = []
    for fails in (False, True):
        model = network()
        optimizer = build(kind, model)
        adapter = layerwise.LayerwiseLR(
            optimizer, LayerAdaptive(), model, apply="update" if kind is LooksFirst else apply
        )
        closure = Closure(model)
        optimizer.step(closure)
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        if fails:
            closure.fails = True
            with pytest.raises(KeyError, match="no batch"):
                optimizer.step(closure)
            same([model.state_dict(), optimizer.state_dict()["state"]], before)
            closure.fails = False
            closure.calls.pop()
        optimizer.step(closure)
        results.append([model.state_dict(), adapter.get_last_factors()])
    same(*results)


def pause(adapter: Any) -> None:
    adapter.enabled = False


def detach(adapter: Any) -> None:
    adapter.detach()


@pytest.mark.parametrize("change", [pause, detach])
@pytest.mark.parametrize("kind", [optim.SGD, Plain])
def test_an_adapter_that_its_closure_ends_does_not_act(kind: Any, change: Callable[[Any], None]) -> None:
    bare, model = network(), network()
    alone, optimizer = build(kind, bare), build(kind, model)
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
    for net, stepping, ends in ((bare, alone, False), (model, optimizer, True)):
        closure = Closure(net)

        def evaluate(closure: Any = closure, ends: bool = ends) -> Any:
            if ends:
                change(adapter)
            return closure()

        for _ in range(2):
            stepping.step(evaluate)
    same(model.state_dict(), bare.state_dict())


def test_what_a_step_counts_survives_a_closure_that_detaches() -> None:
    model = network()
    optimizer = build(EverySecond, model)
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
    closure = Closure(model)
    optimizer.step(closure)
    optimizer.step(lambda: (adapter.detach(), closure())[1])
    optimizer.step(closure)
    assert optimizer.taken == 3
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", [optim.SGD, Plain])
def test_an_adapter_attached_by_the_closure_of_another_acts(kind: Any) -> None:
    bare, model = network(), network()
    expected, _ = train(build(kind, bare, FACTORS), bare, steps=1)
    optimizer = build(kind, model)
    layerwise.LayerwiseLR(optimizer, Constant(NEUTRAL), model)
    closure = Closure(model)
    optimizer.step(lambda: (layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model), closure())[1])
    same([p.detach() for p in model.parameters()], expected[0], 1e-14)


@pytest.mark.parametrize("kind", [optim.SGD, Plain])
def test_what_a_closure_changes_in_the_optimizer_holds_in_its_step(kind: Any) -> None:
    results = []
    for attached in (False, True):
        model = network()
        optimizer = build(kind, model)
        if attached:
            layerwise.LayerwiseLR(optimizer, Constant(NEUTRAL), model)
            layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model)
        closure = Closure(model)

        def change(optimizer: Any = optimizer, closure: Any = closure, rate: float = 0.2 / (1 + attached)) -> Any:
            saved = optimizer.state_dict()
            saved["param_groups"][0]["lr"] = rate
            optimizer.load_state_dict(saved)  # which replaces groups and state
            return closure()

        optimizer.step(change)
        results.append(model.state_dict())
    same(results[1], results[0], 1e-14)


def test_a_step_in_backward_leaves_the_closure_to_step() -> None:
    model = network()
    optimizer = build(optim.SGD, model)
    layerwise.step_in_backward(optimizer, model, Constant(FACTORS))
    bare = network()
    expected, calls = train(build(optim.SGD, bare, FACTORS), bare)
    actual, called = train(optimizer, model)
    assert called == calls
    same(actual[:2], expected[:2], 1e-14)


def test_a_step_that_moves_weights_it_kept_itself_is_refused() -> None:
    class Own(Plain):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            self.own = [p for group in self.param_groups for p in group["params"]]

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.own:
                if p.grad is not None:
                    p -= RATE * p.grad

    model = network()
    optimizer, closure = build(Own, model), Closure(model)
    adapter = layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model)
    closure()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="took its step without evaluating its closure"):
        optimizer.step(closure)
    same(model.state_dict(), before)
    adapter.detach()
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before["0.weight"])


class HalvesWithoutGradients(Rule):
    """Halves the first layer's rate while the gradients are zero, and changes nothing later."""

    needs = ("gradient_norm",)

    def factors(self, statistics: Any, state: Any) -> Any:
        factors = torch.ones_like(statistics.gradient_norm)
        factors[0] = torch.where(statistics.gradient_norm[0] == 0, 0.5, 1.0)
        return factors, state


def test_groups_divided_before_the_closure_may_be_whole_after_it() -> None:
    weights: list[list[Tensor]] = []
    for attached in (False, True):
        model = network()
        optimizer = build(LooksFirst, model)
        if attached:
            layerwise.LayerwiseLR(optimizer, HalvesWithoutGradients(), model, apply="lr")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(Closure(model))
        weights.append(list(model.parameters()))
    same(*weights)
