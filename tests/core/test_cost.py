"""What a step costs is measured on copies, and nothing else notices."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise import diagnosis
from layerwise.diagnosis import Cost, measured_cost
from layerwise.rules import BackMatching, LayerAdaptive


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(diagnosis, "time", made)
    return made


def slow_kind(clock: Clock, seconds: float) -> type[torch.optim.SGD]:
    """Make an optimizer whose step takes so many seconds by the clock."""

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            clock.now += seconds
            return super().step(closure)

    return Slow


class SlowRule(layerwise.rules.Rule):
    """Takes a given time by the clock."""

    needs = ()

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.tick = lambda: setattr(clock, "now", clock.now + seconds)

    def factors(self, statistics: Any, state: Any) -> Any:
        self.tick()
        return torch.ones(3), state


def test_the_ratio_is_that_of_the_medians_of_steps_in_turn(make_model, backward, clock):
    model = make_model()
    backward(model)
    slow = slow_kind(clock, 2.0)
    found = measured_cost(slow(model.parameters(), lr=0.1), model, SlowRule(clock, 3.0), 35.0)
    assert isinstance(found, Cost)
    assert (found.bare, found.attached, found.ratio) == (2.0, 5.0, 2.5)
    assert found.pairs == 5  # of 7 seconds each; the fifth begins after 28
    assert str(found) == "a step takes 2.50 times as long: 5e+03 ms, bare 2e+03 ms (medians of 5 pairs on copies)"


def test_there_is_one_pair_however_slow_a_step_is_and_an_end_however_fast(make_model, clock):
    model = make_model()
    slow = slow_kind(clock, 100.0)
    found = measured_cost(slow(model.parameters(), lr=0.1), model, SlowRule(clock, 0.0), 1.0)
    assert isinstance(found, Cost)
    assert found.pairs == 1
    fast = slow_kind(clock, 1e-9)
    found = measured_cost(fast(model.parameters(), lr=0.1), model, SlowRule(clock, 0.0), 1.0)
    assert isinstance(found, Cost)
    assert found.pairs == diagnosis.MOST_PAIRS


class Noisy(torch.optim.SGD):
    """Draws from every generator while it steps."""

    def step(self, closure: Any = None) -> Any:
        random.random()
        torch.rand(3)
        return super().step(closure)


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "with a state"])
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("kind", [Noisy, torch.optim.Adam, torch.optim.Rprop], ids=lambda kind: kind.__name__)
def test_nothing_changes_to_the_bit(make_model, backward, assert_same_bits, kind, gradients, steps):
    model = make_model()
    model.append(nn.BatchNorm1d(2).double())
    optimizer = kind(model.parameters(), lr=0.1)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces `step`
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    model.zero_grad()
    if gradients:
        backward(model, 7)

    def everything() -> Any:
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        tensors = [grads, *deepcopy((optimizer.state_dict(), model.state_dict())), torch.get_rng_state()]
        return (
            tensors,
            [p._version for p in model.parameters()],
            random.getstate(),
            len(seen),
            str(adapter.state_dict()),
        )

    before, held = everything(), [p.grad for p in model.parameters()]
    rule = BackMatching()
    found = measured_cost(optimizer, model, rule, 0.02)
    assert isinstance(found, Cost), found
    assert found.made_up != gradients
    after = everything()
    assert_same_bits(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
    assert len(optimizer._optimizer_step_pre_hooks) == 2
    assert not layerwise._hooks.OptimizerHooks.others(optimizer, adapter._attached)


def test_a_backward_that_waits_still_works_afterwards(make_model):
    model = make_model()
    loss = model(torch.ones(2, 5, dtype=torch.float64)).square().sum()
    measured_cost(torch.optim.SGD(model.parameters(), lr=0.1), model, LayerAdaptive(), 0.01)
    loss.backward()  # raises if a weight it has saved was written to


def test_every_pair_sees_the_same_gradients_though_a_factor_scales_them(make_model, backward):
    model = make_model()
    backward(model)
    seen: list[float] = []

    class Watching(layerwise.rules.Rule):
        needs = ("gradient_norm",)

        def factors(self, statistics: Any, state: Any) -> Any:
            seen.append(float(statistics.gradient_norm[0]))
            return torch.full((3,), 2.0, dtype=torch.float64), state

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    assert isinstance(measured_cost(optimizer, model, Watching(), 0.05, apply="gradient"), Cost)
    assert len(seen) > 2
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("spoil", "seconds", "words"),
    [
        (lambda model: None, 0, "seconds=0"),
        (lambda model: model.to("meta"), None, "meta"),
        (lambda model: setattr(model, "cached", next(model.parameters()) * 1), None, "no copy could be made"),
    ],
    ids=["not asked for", "no numbers", "a model that cannot be copied"],
)
def test_what_cannot_be_measured_says_why(make_model, spoil, seconds, words):
    model = make_model()
    spoil(model)
    found = measured_cost(torch.optim.SGD(model.parameters(), lr=0.1), model, LayerAdaptive(), seconds)
    assert isinstance(found, str)
    assert words in found


def test_an_optimizer_that_wants_other_gradients_is_measured_when_it_has_them():
    model = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    assert "dense gradients" in str(measured_cost(optimizer, model, LayerAdaptive(), 0.01))
    model(torch.tensor([1, 2])).sum().backward()
    assert isinstance(measured_cost(optimizer, model, LayerAdaptive(), 0.01), Cost)


def test_large_copies_are_made_only_where_they_are_asked_for(make_model, monkeypatch):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = 2 * sum(p.numel() for p in model.parameters()) * 8
    monkeypatch.setattr(diagnosis, "MOST_BYTES", size)
    assert isinstance(measured_cost(optimizer, model, LayerAdaptive()), Cost)
    monkeypatch.setattr(diagnosis, "MOST_BYTES", size - 1)
    assert "the copies would take" in str(measured_cost(optimizer, model, LayerAdaptive()))
    assert isinstance(measured_cost(optimizer, model, LayerAdaptive(), 0.01), Cost)


def test_hooks_on_all_optimizers_are_not_called(make_model):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model, calls = make_model(), []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        found = measured_cost(torch.optim.SGD(model.parameters(), lr=0.1), model, LayerAdaptive())
    finally:
        handle.remove()
    assert "hooks on all optimizers" in str(found)
    assert not calls


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_out_of_range_are_refused(make_model, seconds):
    model = make_model()
    with pytest.raises(ValueError, match="at least 0; 0 measures nothing"):
        layerwise.diagnose(torch.optim.SGD(model.parameters()), model, seconds=seconds)


@pytest.mark.parametrize("seconds", ["1", True])
def test_seconds_of_the_wrong_type_are_refused(make_model, seconds):
    model = make_model()
    with pytest.raises(TypeError, match="must be a number of seconds"):
        layerwise.diagnose(torch.optim.SGD(model.parameters()), model, seconds=seconds)


def test_the_diagnosis_tells_the_cost_or_why_it_is_not_known(make_model, capsys):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert "\nmeasured  not: seconds=0\n" in layerwise.diagnose(optimizer, model, seconds=0)
    assert "\nmeasured  a step takes " in layerwise.diagnose(optimizer, model, seconds=0.01)
    capsys.readouterr()


def test_nothing_is_measured_in_one_of_several_processes() -> None:
    """Their steps wait for one another: a process that takes one more would hang."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert measured_cost(optimizer, model, LayerAdaptive(), 1.0) == (
            "steps of several processes wait for one another, and only this one measures"
        )
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(measured_cost(optimizer, model, LayerAdaptive(), 0.01), Cost)
