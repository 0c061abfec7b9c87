"""`step()` called while another `step()` runs: of another optimizer, or of the same one; right, or an error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise import sinks
from layerwise.rules import Constant, LayerAdaptive

FACTORS = {"0": 0.5, "2": 3.0}
every_place = pytest.mark.parametrize("apply", ["auto", "lr", "update"])


class Plain(optim.Optimizer):
    """Gradient descent that counts its steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                p -= group["lr"] * p.grad


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    fill(model, 0)
    return model


def fill(model: nn.Module, step: int) -> None:
    model.zero_grad()
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model(batch).square().sum().backward()


def sgd(model: nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def weights(*models: nn.Module) -> list[Any]:
    return [copy.deepcopy(model.state_dict()) for model in models]


def same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def once(call: Callable[[], Any]) -> Callable[..., None]:
    """Return a hook that makes a call, but not while that call runs."""
    inside: list[bool] = []

    def hook(*_: Any) -> None:
        if not inside:
            inside.append(True)
            try:
                call()
            finally:
                inside.clear()

    return hook


@every_place
@pytest.mark.parametrize("where", ["before", "after", "closure"])
def test_another_optimizer_stepped_within_a_step_takes_its_own_step(where: str, apply: Any) -> None:
    results = []
    for nested in (False, True):
        first, second = network(), network()
        outer, inner = sgd(first), sgd(second)
        memory = sinks.Memory()
        for model, optimizer in ((first, outer), (second, inner)):
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
            layerwise.Monitor(optimizer, model, every=1, sinks=[memory])
        if nested and where == "before":
            outer.register_step_pre_hook(lambda *_, inner=inner: inner.step())
        elif nested and where == "after":
            outer.register_step_post_hook(lambda *_, inner=inner: inner.step())
        for step in range(3):
            fill(first, step)
            fill(second, 10 + step)
            if nested and where == "closure":
                outer.step(lambda inner=inner: inner.step())
                continue
            outer.step()
            if not nested:
                inner.step()
        results.append([weights(first, second), [record.update_norm for record in memory.records]])
    assert sorted(results[0][1]) == sorted(results[1][1])
    same(results[1][0], results[0][0])


@every_place
@pytest.mark.parametrize("kind", [sgd, lambda model: Plain(model.parameters(), 0.05)], ids=["SGD", "Plain"])
@pytest.mark.parametrize("early", [False, True], ids=["hook attached late", "hook attached early"])
def test_the_same_optimizer_stepped_by_a_hook_before_is_right_or_refused(early: bool, kind: Any, apply: Any) -> None:
    bare, model = network(), network()
    expected = kind(bare)
    layerwise.LayerwiseLR(expected, LayerAdaptive(), bare, apply=apply)
    optimizer = kind(model)
    hook = once(lambda: optimizer.step())
    if early:
        optimizer.register_step_pre_hook(hook)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    if not early:
        handle = optimizer.register_step_pre_hook(hook)
        before = weights(model)
        with pytest.raises(RuntimeError, match=r"step\(\) was called within step\(\) of the same optimizer"):
            optimizer.step()
        same(weights(model), before)
        handle.remove()
        optimizer.step()  # the remedy
    optimizer.step()
    for _ in range(2):
        expected.step()
    same(weights(model), weights(bare))
    assert optimizer.param_groups[0].get("count") == expected.param_groups[0].get("count")
    assert adapter.get_last_factors()["0"] != 1.0


@every_place
@pytest.mark.parametrize("early", [False, True], ids=["hook attached late", "hook attached early"])
def test_the_same_optimizer_stepped_by_a_hook_after_is_right(early: bool, apply: Any) -> None:
    bare, model = network(), network()
    expected = sgd(bare)
    layerwise.LayerwiseLR(expected, LayerAdaptive(), bare, apply=apply)
    optimizer = sgd(model)
    hook = once(lambda: optimizer.step())
    if early:
        optimizer.register_step_post_hook(hook)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    if not early:
        optimizer.register_step_post_hook(hook)
    for step in range(3):
        fill(model, step)
        optimizer.step()
        fill(bare, step)
        expected.step()
        expected.step()
        same(weights(model), weights(bare))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_neutral_factors_and_monitors_leave_nested_steps_as_they_are(register: str) -> None:
    results = []
    for attached in (False, True):
        model = network()
        optimizer = Plain(model.parameters(), 0.05)
        if attached:
            layerwise.LayerwiseLR(optimizer, Constant({"*": 1.0}), model)
            layerwise.Monitor(optimizer, model, every=1)
        getattr(optimizer, register)(once(lambda optimizer=optimizer: optimizer.step()))
        for step in range(3):
            fill(model, step)
            optimizer.step()
        results.append([weights(model), optimizer.param_groups[0]["count"]])
    assert results[0][1] == results[1][1] == 6
    same(results[1][0], results[0][0])


@every_place
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("kind", [sgd, lambda model: Plain(model.parameters(), 0.05)], ids=["SGD", "Plain"])
def test_the_same_optimizer_stepped_by_its_closure_is_right(kind: Any, thread: bool, apply: Any) -> None:
    bare, model = network(), network()
    expected, optimizer = kind(bare), kind(model)
    layerwise.LayerwiseLR(expected, LayerAdaptive(), bare, apply=apply)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)

    def closure() -> None:
        fill(model, 1)
        if thread:
            worker = threading.Thread(target=optimizer.step)
            worker.start()
            worker.join()
        else:
            optimizer.step()
        fill(model, 2)

    for _ in range(2):
        optimizer.step(closure)
        for step in (1, 2):
            fill(bare, step)
            expected.step()
        same(weights(model), weights(bare))
    assert optimizer.param_groups[0].get("count") == expected.param_groups[0].get("count")


def test_a_step_taken_by_a_sink_is_right() -> None:
    bare, model = network(), network()
    expected, optimizer = sgd(bare), sgd(model)
    layerwise.LayerwiseLR(expected, LayerAdaptive(), bare, apply="update")
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="update")
    layerwise.Monitor(optimizer, model, every=2, sinks=[once(lambda: optimizer.step())])
    for step in range(2):
        fill(model, step)
        optimizer.step()
        fill(bare, step)
        expected.step()
    expected.step()
    same(weights(model), weights(bare))


@every_place
def test_a_step_that_failed_is_no_step_that_runs(apply: Any) -> None:
    model = network()
    optimizer = sgd(model)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply=apply)

    def fail(*_: Any) -> None:
        raise OSError("not now")

    handle = optimizer.register_step_pre_hook(fail)
    kept = []
    for _ in range(3):
        with pytest.raises(OSError, match="not now") as raised:
            optimizer.step()
        kept.append(raised)  # which keeps the frames of that step alive
    handle.remove()
    before = weights(model)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


def test_a_step_begun_in_another_thread_while_one_runs_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    layerwise.LayerwiseLR(optimizer, Constant(FACTORS), model, apply="lr")
    errors: list[str] = []

    def work() -> None:
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))

    def hook(*_: Any) -> None:
        if not errors:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()

    optimizer.register_step_pre_hook(hook)
    optimizer.step()
    assert len(errors) == 1
    assert "within step() of the same optimizer" in errors[0]


def test_a_monitor_records_a_nested_step_as_a_part_of_the_outer() -> None:
    model = network()
    optimizer, memory = optim.SGD(model.parameters(), lr=0.05), sinks.Memory()
    layerwise.Monitor(optimizer, model, every=1, sinks=[memory])
    optimizer.register_step_pre_hook(once(lambda: optimizer.step()))
    optimizer.step()
    (record,) = memory.records
    moved = 2 * 0.05 * torch.tensor(record.gradient_norm)
    torch.testing.assert_close(torch.tensor(record.update_norm), moved)
