"""Steps that a CUDA graph captures: replays run no Python, so rules remember in tensors that stay where they are."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise.optimizers import is_being_captured
from layerwise.rules import LayerAdaptive, LDoG, Rule, Unfreezing
from layerwise.rules.state import changed_tensors, is_state
from rule_cases import RULES

COUNTING = {
    *("AlignUpdates", "ByRole_shared", "FreezeOut", "HeavyTail", "HeavyTail_llr", "RandomTraining"),
    *("RelativeGradient_snr", "refresh"),
}
"""Rules that count steps in Python: all of them, or while they measure."""
NAMES = ["0", "2", "4"]
EAGER = 2  # steps before the capture


class Captured:
    """Says that a graph is captured, or that none is."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, device: torch.device) -> bool:
        return self.now


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    result = Captured()
    monkeypatch.setattr("layerwise.adapter.is_being_captured", result)
    return result


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def attached(rule: Rule) -> tuple[nn.Module, torch.optim.Optimizer, layerwise.LayerwiseLR]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, layerwise.LayerwiseLR(optimizer, rule, model, layers="module", exclude=None)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    model(torch.randn(4, 5, generator=generator, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        found |= flat(value, f"{prefix}{name}/") if is_state(value) else {prefix + name: value}
    return found


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


MADE = [name for name in RULES if name != "LoRAPlus"]  # for which the network has no layer


@pytest.mark.parametrize("name", MADE)
def test_a_captured_step_keeps_a_rules_memory_in_place_or_raises_before_it(name: str, captured: Captured) -> None:
    eager, alone, plain = attached(RULES[name].make(NAMES))
    model, optimizer, adapter = attached(RULES[name].make(NAMES))
    state: Any = adapter._attached
    for number in range(EAGER):
        step(eager, alone, number)
        step(model, optimizer, number)
    captured.now = True
    for number in range(EAGER, EAGER + 3):
        before, weights = flat(state.state), weights_of(model)
        kept = {key: value.clone() for key, value in before.items() if isinstance(value, Tensor)}
        if name in COUNTING:
            with pytest.raises(ValueError, match=r"counts in Python .* replays of a CUDA graph"):
                step(model, optimizer, number)
            assert all(map(torch.equal, weights, weights_of(model)))
            assert all(torch.equal(flat(state.state)[key], value) for key, value in kept.items())
        else:
            step(model, optimizer, number)
        after = flat(state.state)
        assert before.keys() == after.keys()
        assert all(after[key] is value for key, value in before.items())
        if name in COUNTING:
            break
        captured.now = False
        step(eager, alone, number)
        captured.now = True
        assert adapter.get_last_factors() == plain.get_last_factors()
    captured.now = False
    step(model, optimizer, EAGER)  # the remedy: a step outside of the graph


def test_a_rule_that_counts_its_first_step_only_is_captured_after_it(captured: Captured) -> None:
    model, optimizer, adapter = attached(LDoG(1e-3))
    captured.now = True
    with pytest.raises(ValueError, match=r"'started' goes from False to True at this step.*before the capture"):
        step(model, optimizer, 0)
    captured.now = False
    step(model, optimizer, 0)
    captured.now = True
    squares: Any = adapter._attached.state["squares"]
    first = squares.clone()
    step(model, optimizer, 1)
    assert adapter._attached.state["squares"] is squares
    assert (squares > first).all()


def test_a_rule_that_counts_epochs_says_that_replays_do_not(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer, _ = attached(Unfreezing())
    captured.now = True
    with caplog.at_level(logging.WARNING, logger="layerwise"):
        step(model, optimizer, 0)
    assert "capture anew after each end_epoch()" in caplog.text


class Delayed(Rule):
    """The factor of the step before, returned from the state itself or as a view of it."""

    default_layers = "parameter"
    default_place = "lr"

    def __init__(self, view: bool) -> None:
        self.view = view

    def init(self, layers: Any, device: torch.device) -> Any:
        ones = torch.ones(len(layers), dtype=torch.float64)
        return {"now": ones, "before": ones.clone()}

    def factors(self, statistics: Any, state: Any) -> Any:
        last = state["now"].detach()[:] if self.view else state["now"]
        return last, {"now": 1 / (1 + statistics.gradient_norm), "before": last}


@pytest.mark.parametrize("view", [False, True])
def test_factors_and_entries_that_are_the_old_state_are_read_before_it_is_written(
    captured: Captured, view: bool
) -> None:
    models = [network(), network()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    adapters = [layerwise.LayerwiseLR(o, Delayed(view), m) for o, m in zip(optimizers, models, strict=True)]
    for number in range(6):
        for which, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            captured.now = which == 1 and number >= EAGER
            optimizer.zero_grad()
            model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    states = [adapter.state_dict()["state"] for adapter in adapters]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("now", "before"))


def test_a_state_of_another_type_is_refused_in_a_capture() -> None:
    with pytest.raises(ValueError, match=r"'a' goes from a tensor of torch.float32 to a tensor of torch.float64"):
        changed_tensors({"a": torch.ones(1)}, {"a": torch.ones(1).double()})
    with pytest.raises(ValueError, match="'a' goes from"):
        changed_tensors({"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]})


def test_only_a_cuda_stream_that_captures_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_being_captured(torch.device("cpu"))
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(2, 2, device="cuda"))
    if not torch.backends.cuda.is_built():
        assert not is_being_captured(weight.device)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_being_captured(weight.device)
    assert not is_being_captured(torch.device("cpu"))


def test_without_a_capture_the_state_is_replaced() -> None:
    model, optimizer, adapter = attached(LDoG(1e-3))
    step(model, optimizer, 0)
    before = adapter._attached.state["distance"]
    step(model, optimizer, 1)
    assert adapter._attached.state["distance"] is not before
    assert attached(LayerAdaptive())[2]._attached.state == {}
