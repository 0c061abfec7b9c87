"""A rule's state when layers come and go, and when it is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise import rules
from layerwise.rules import LARS, LayerAdaptive, Rule
from layerwise.rules.state import carried_over


class Average(Rule):
    """A rule with one number a layer, a scalar, a plain number, and something that follows from its arguments."""

    def init(self, layers: Any, device: torch.device) -> dict[str, Any]:
        return {"mean": torch.zeros(len(layers)), "n": torch.zeros(()), "scale": 1, "_count": len(layers)}

    def factors(self, statistics: Any, state: dict[str, Any]) -> Any:
        return torch.ones(len(state["mean"])), {**state, "mean": state["mean"] + 1, "n": state["n"] + 1}

    def end_epoch(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "scale": state["scale"] / 2}


def attached(names: str) -> tuple[nn.ModuleDict, optim.Optimizer, layerwise.LayerwiseLR]:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = optim.SGD(model[names[0]].parameters(), lr=0.1)
    return model, optimizer, layerwise.LayerwiseLR(optimizer, Average(), model)


def test_layers_that_stay_keep_their_rows_when_one_comes() -> None:
    model, optimizer, adapter = attached("ba")
    for _ in range(3):
        optimizer.step()
    optimizer.add_param_group({"params": list(model["a"].parameters())})
    optimizer.step()
    state = adapter.state_dict()["state"]
    assert adapter.layers == ["b", "a"]
    assert state["mean"].tolist() == [4.0, 1.0]
    assert state["n"].item() == 4
    assert adapter._attached.state["_count"] == 2


def test_state_survives_a_group_that_brings_no_layer() -> None:
    _, optimizer, adapter = attached("b")
    for _ in range(3):
        optimizer.step()
    outside = nn.Parameter(torch.zeros(1))
    outside.grad = torch.ones(1)
    optimizer.add_param_group({"params": [outside]})
    optimizer.step()
    assert adapter.state_dict()["state"]["mean"].tolist() == [4.0]


def test_a_number_may_have_become_another_kind_of_number() -> None:
    _, _, adapter = attached("b")
    adapter.end_epoch()
    saved = adapter.state_dict()
    _, _, other = attached("b")
    other.load_state_dict(saved)
    assert other.state_dict()["state"]["scale"] == 0.5
    assert other.epoch == 2


@pytest.mark.parametrize("bad", [{"epoch": "x"}, {"epoch": 0}, {"rule": "LARS"}, {"version": 2}, {"layers": ["z"]}])
def test_what_cannot_be_loaded_changes_nothing(bad: dict[str, Any]) -> None:
    _, optimizer, adapter = attached("b")
    optimizer.step()
    before = adapter.state_dict()
    altered = {**before, "state": {**before["state"], "scale": 7}, **bad}
    with pytest.raises(ValueError, match=next(iter(bad))):
        adapter.load_state_dict(altered)
    assert str(adapter.state_dict()) == str(before)


def test_the_state_of_another_rule_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    one = layerwise.LayerwiseLR(optimizer, LARS(), model, layers="module")
    two = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    with pytest.raises(ValueError, match="saved for the rule LARS"):
        two.load_state_dict(one.state_dict())


def test_the_rules_that_a_rule_is_made_of_are_told_apart_too() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    class Half(Rule):
        def factors(self, statistics: Any, state: dict[str, Any]) -> Any:
            return torch.full((1,), 0.5), state

    class Third(Half):
        pass

    def saved(rule: Any, **arguments: Any) -> dict[str, Any]:
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers="module", **arguments)
        adapter.detach()
        return adapter.state_dict()

    def refusal(state: dict[str, Any], rule: Any, **arguments: Any) -> str:
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, layers="module", **arguments)
        adapter.detach()
        with pytest.raises(ValueError, match="saved for the rule") as caught:
            adapter.load_state_dict(state)
        return str(caught.value)

    bounded = saved(Half(), bounds=(0.1, 10))
    assert "rule bounds(Half), this adapter has bounds(Third)" in refusal(bounded, Third(), bounds=(0.1, 10))
    assert "rule bounds(Half), this adapter has Half" in refusal(bounded, Half())
    chained = saved(rules.chain(Half(), LARS()))
    assert "chain(Half, LARS), this adapter has chain(Third, LARS)" in refusal(chained, rules.chain(Third(), LARS()))


def test_other_bounds_of_a_rule_without_words_of_its_own_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Rule):
        def factors(self, statistics: Any, state: dict[str, Any]) -> Any:
            return torch.ones(1), state

    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def attach(high: float) -> layerwise.LayerwiseLR:
        adapter = layerwise.LayerwiseLR(optimizer, Own(), model, layers="module", bounds=(0.1, high))
        adapter.detach()
        return adapter

    state = attach(10).state_dict()
    attach(10).load_state_dict(state)
    assert caplog.text == ""
    attach(5).load_state_dict(state)
    assert "saved for bounds(Own, 0.1, 10); it goes on with bounds(Own, 0.1, 5)" in caplog.text


def test_names_that_coincide_without_their_wrappers_are_told_of() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.module = nn.Linear(2, 2, bias=False)

    with pytest.raises(ValueError, match="two parameters are called 'weight'"):
        layerwise.param_groups(Net())


class Smoothed(Rule):
    """A running mean that `init` begins in float32, or forgets to begin, and that training widens to float64."""

    def __init__(self, begins: bool) -> None:
        self.begins = begins

    def init(self, layers: Any, device: torch.device) -> dict[str, Any]:
        return {"mean": torch.ones(len(layers), dtype=torch.float32, device=device)} if self.begins else {}

    def factors(self, statistics: Any, state: dict[str, Any]) -> Any:
        mean = 0.9 * state.get("mean", 1.0) + 0.1 * statistics.gradient_norm
        return mean, {"mean": mean}


def smoothed(begins: bool) -> tuple[layerwise.LayerwiseLR, Callable[[int], dict[str, float]]]:
    """Return an adapter, and a function that takes a step and returns the factors."""
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Smoothed(begins), model)

    def step(number: int) -> dict[str, float]:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 + number / 3)
        optimizer.step()
        return adapter.get_last_factors()

    return adapter, step


def test_a_state_that_training_made_wider_goes_on_bit_for_bit() -> None:
    adapter, step = smoothed(begins=True)
    for number in range(3):
        step(number)
    resumed, step_of_resumed = smoothed(begins=True)
    resumed.load_state_dict(adapter.state_dict())
    assert resumed.state_dict()["state"]["mean"].dtype is torch.float64
    for number in range(3, 6):
        assert step_of_resumed(number) == step(number)


def test_a_state_that_init_does_not_begin_is_refused_and_init_is_named() -> None:
    adapter, step = smoothed(begins=False)
    step(0)
    resumed, _ = smoothed(begins=False)
    with pytest.raises(ValueError, match=r"\['mean'\] in the file, \[\] here.*every entry of its state from init\("):
        resumed.load_state_dict(adapter.state_dict())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mean": 1.0}, "state['mean'] is float in the file, Tensor here; same rule?"),
        ({"mean": {}}, "state['mean'] is dict in the file, Tensor here; same rule?"),
        ({"scale": torch.ones(())}, "state['scale'] is Tensor in the file, int here; same rule?"),
        ({"mean": torch.zeros(3)}, "state['mean'] has shape (3,) in the file, (1,) here"),
        ({"other": 1}, "state holds ['mean', 'n', 'other', 'scale'] in the file, ['mean', 'n', 'scale'] here"),
    ],
    ids=["a number for a tensor", "a dictionary for a tensor", "a tensor for a number", "a shape", "one too many"],
)
def test_a_state_of_another_form_is_refused_and_the_entry_is_named(bad: dict[str, Any], message: str) -> None:
    _, optimizer, adapter = attached("b")
    optimizer.step()
    before = adapter.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter.load_state_dict({**before, "epoch": 5, "state": {**before["state"], **bad}})
    assert str(adapter.state_dict()) == str(before)


def test_what_is_not_a_row_for_each_layer_begins_anew_when_layers_come() -> None:
    """A table of pairs of layers, say: nothing tells which of its rows and columns stay true."""
    fresh = {"pairs": torch.zeros(3, 3), "rows": torch.zeros(3), "sum": torch.zeros(())}
    old = {"pairs": torch.ones(2, 2), "rows": torch.tensor([1.0, 2.0]), "sum": torch.tensor(7.0)}
    carried = carried_over(fresh, old, ["a", "new", "b"], ["a", "b"])
    assert {name: value.tolist() for name, value in carried.items()} == {
        "pairs": [[0.0] * 3] * 3,
        "rows": [1.0, 0.0, 2.0],
        "sum": 7.0,
    }
