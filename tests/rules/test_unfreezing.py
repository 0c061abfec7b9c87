"""Unfreezing from the layers next to the loss, and chain-thaw's order."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import layerwise
import reference
from layerwise.layers import Layer
from layerwise.rules import LARS, InitialSNR, LayerDecay, Unfreezing, bounds, chain, refresh
from layerwise.statistics import Statistics

NAMES = ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]


def dummies(names: list[str]) -> list[Layer]:
    return [Layer(name, (torch.zeros(1),)) for name in names]


def epochs(rule: Any, names: list[str], number: int) -> list[list[float]]:
    """Return the factors of the first epochs."""
    state = rule.init(dummies(names), torch.device("cpu"))
    found: list[list[float]] = []
    for _ in range(number):
        found.append(rule.factors(Statistics(), state)[0].tolist())
        state = rule.end_epoch(state)
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.sampled_from(["top-down", "chain"]))
def test_factors_are_those_of_the_reference(layers: int, groups: int, every: int, order: Any) -> None:
    groups = min(groups, layers)
    names = [f"part{chr(97 + i)}" for i in range(layers)]
    found = epochs(Unfreezing(groups, every, order), names, 12)
    at = [i * groups // layers for i in range(layers)]
    assert found == [reference.unfreezing(at, epoch, every, order).tolist() for epoch in range(1, 13)]


def test_a_group_a_depth_by_default() -> None:
    found = epochs(Unfreezing(), NAMES, 6)
    assert found[:2] == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert found[4] == found[5] == [1] * 5


@pytest.mark.parametrize("groups", [["embedding", "blocks.*", "head"], [["embedding"], ["blocks.0", "blocks.*"], "*"]])
def test_groups_by_patterns(groups: Any) -> None:
    assert epochs(Unfreezing(groups), NAMES, 3) == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [1] * 5]


def test_chain_trains_the_head_then_each_group_alone_then_all() -> None:
    assert epochs(Unfreezing(["embedding", "blocks.*", "*"], order="chain"), NAMES, 5) == [
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [1] * 5,
        [1] * 5,
    ]


def test_towers_thaw_from_their_heads_together() -> None:
    names = ["text_model.layers.0", "text_model.layers.1", "vision_model.layers.0", "projection"]
    assert epochs(Unfreezing(), names, 2) == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_frozen_layers_stand_still_and_thaw_at_the_end_of_an_epoch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, chain(LayerDecay(1 / 2.6), Unfreezing()), model)
    assert adapter.apply == "lr"
    for epoch in range(1, 5):
        before = [layer.weight.detach().clone() for layer in model]
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        moved = [not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True)]
        assert moved == [3 - i <= epoch for i in range(3)]
        adapter.end_epoch()
    assert adapter.get_last_factors() == pytest.approx({"0": 2.6**-2, "1": 1 / 2.6, "2": 1.0})


def test_a_saved_epoch_gives_its_factors() -> None:
    rule, layers = Unfreezing(), dummies(NAMES)
    later = rule.end_epoch(rule.init(layers, torch.device("cpu")))
    state = rule.load({"epoch": later["epoch"]}, rule.init(layers, torch.device("cpu")))
    assert torch.equal(rule.factors(Statistics(), state)[0], rule.factors(Statistics(), later)[0])
    fewer = rule.renewed(layers[1:], torch.device("cpu"), later, NAMES)
    assert rule.factors(Statistics(), fewer)[0].tolist() == [0, 0, 1, 1]


def test_the_table_says_when_a_group_is_trained() -> None:
    rows = [line.split() for line in Unfreezing(3, every=2).table(dummies(NAMES))]
    assert rows == [
        ["group", "epochs", "layers"],
        ["0", "5", "on", "embedding,", "blocks.0"],
        ["1", "3", "on", "blocks.1,", "blocks.2"],
        ["2", "1", "on", "head"],
    ]
    rows = [line.split()[:5] for line in Unfreezing(3, every=2, order="chain").table(dummies(NAMES))]
    assert rows[1][:4] == ["0", "3-4,", "7", "on"]
    assert rows[3][:4] == ["2", "1-2,", "7", "on"]


def test_doubtful_names_give_a_warning() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="Unfreezing takes the depths from the layers' names"):
        layerwise.LayerwiseLR(optimizer, Unfreezing(), model)
    text = layerwise.diagnose(optimizer, model, Unfreezing(), seconds=0)
    assert "problem   Unfreezing takes the depths" in text


def test_permanent_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="attach it with LayerwiseLR"):
        layerwise.param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Unfreezing(), lr=0.1)


# --- With requires_grad -----------------------------------------------------------------------------------------------


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).double()


def flags(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    model(torch.randn(4, 3, generator=generator, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("order", ["top-down", "chain"])
def test_requires_grad_follows_the_epochs_and_saves_the_backward_pass(order: Any) -> None:
    model = deep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(order=order, requires_grad=True), model)
    for epoch in range(1, 6):
        trained = [factor > 0 for factor in reference.unfreezing([0, 1, 2], epoch, order=order)]
        assert flags(model) == [own for own in trained for _ in range(2)]
        before = [p.detach().clone() for p in model.parameters()]
        for number in range(2):
            step(model, optimizer, number)
        assert [p.grad is not None for p in model.parameters()] == flags(model)
        assert [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == flags(model)
        assert list(adapter.get_last_factors().values()) == trained
        adapter.end_epoch()


def test_weights_are_those_without_it_where_the_optimizer_remembers_nothing() -> None:
    weights = []
    for requires_grad in (False, True):
        model = deep()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
        adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=requires_grad), model)
        for number in range(8):
            step(model, optimizer, number)
            if number % 2:
                adapter.end_epoch()
        weights.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_frozen_layers_leave_the_optimizer_without_state() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, chain(LayerDecay(0.5), Unfreezing(requires_grad=True)), model)
    step(model, optimizer, 0)
    assert [p in optimizer.state for p in model.parameters()] == [False] * 4 + [True] * 2


def test_own_flags_come_back_in_a_pause_and_when_detached() -> None:
    model = deep()
    model[0].bias.requires_grad_(False)
    own = flags(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model, exclude=["1"])
    acting = [False, False, True, True, True, True]  # an excluded layer is trained as without the rule
    assert flags(model) == acting
    with adapter.paused():
        assert flags(model) == own
    assert flags(model) == acting
    adapter.end_epoch()
    adapter.end_epoch()
    assert flags(model) == own
    adapter.load_state_dict(layerwise.LayerwiseLR(optimizer, Unfreezing(), model, exclude=["1"]).state_dict())
    assert flags(model) == acting
    adapter.detach()
    assert flags(model) == own
    layerwise.diagnose(optimizer, model, Unfreezing(requires_grad=True))
    assert flags(model) == own


def test_layers_that_an_optimizer_has_frozen_thaw_with_the_next_one() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model)
    adapter.end_epoch()
    state = adapter.state_dict()
    del optimizer
    gc.collect()
    assert all(flags(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model)
    adapter.load_state_dict(state)
    assert flags(model) == [False] * 2 + [True] * 4
    adapter.end_epoch()
    assert all(flags(model))


def test_a_parameter_thaws_when_the_last_adapter_lets_it_go() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model) for _ in range(2))
    first.detach()
    assert flags(model) == [False] * 4 + [True] * 2
    second.detach()
    assert all(flags(model))


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": lambda name, p: not p.requires_grad},
        {"layers": lambda name, p: name[0] if p.requires_grad else None},
    ],
    ids=["exclude", "layers"],
)
def test_a_callable_that_asks_for_requires_grad_sees_what_the_user_has_set(options: Any) -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model, **options)
    before = model[0].weight.detach().clone()
    for number in range(3):
        step(model, optimizer, number)
        assert flags(model) == [False] * 4 + [True] * 2
        assert adapter.layers == ["0", "1", "2"]
    assert torch.equal(model[0].weight, before)
    model[2].bias.requires_grad_(False)
    step(model, optimizer, 3)
    assert flags(model) == [False] * 4 + [True, False]


def test_a_rule_that_measures_in_the_first_steps_is_refused_beside_it() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rule in (refresh(LARS(), 100), InitialSNR(), bounds(refresh(LARS(), 100), 0.0, 1.0)):
        with pytest.raises(ValueError, match=r"in the first steps.*leave requires_grad=True out"):
            layerwise.LayerwiseLR(optimizer, chain(rule, Unfreezing(requires_grad=True)), model)
        assert all(flags(model))
        layerwise.LayerwiseLR(optimizer, chain(rule, Unfreezing()), model).detach()
    layerwise.LayerwiseLR(optimizer, chain(LARS(), Unfreezing(requires_grad=True)), model).detach()


def test_bounds_above_zero_freeze_nothing() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model, bounds=(0.1, 1.0)).detach()
    adapter = layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model, bounds=(0.1, 1.0))
    assert all(flags(model))
    step(model, optimizer, 0)
    assert adapter.get_last_factors() == {"0": 0.1, "1": 0.1, "2": 1.0}


def test_an_error_while_attaching_leaves_no_flag_and_no_hook() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="depth"):
            layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model)
    assert all(flags(model))
    assert not optimizer._optimizer_step_pre_hooks


def test_a_layer_that_comes_later_is_frozen_too() -> None:
    model = deep()
    optimizer = torch.optim.SGD([*model[1].parameters(), *model[2].parameters()], lr=0.1)
    layerwise.LayerwiseLR(optimizer, Unfreezing(requires_grad=True), model)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    step(model, optimizer, 0)
    assert flags(model) == [False] * 4 + [True] * 2


def test_requires_grad_is_refused_where_others_have_settled_it() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Unfreezing(requires_grad=True)
    with pytest.raises(ValueError, match="step_in_backward knows nothing; leave requires_grad=True out, or use Layer"):
        layerwise.step_in_backward(optimizer, model, rule)
    layerwise.step_in_backward(optimizer, model, Unfreezing()).detach()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"DistributedDataParallel and FSDP, which settle .*: leave it out"):
            layerwise.LayerwiseLR(optimizer, rule, model)
        assert not optimizer._optimizer_step_pre_hooks
        layerwise.LayerwiseLR(optimizer, Unfreezing(), model).detach()
    finally:
        torch.distributed.destroy_process_group()
    assert all(flags(model))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"groups": 0}, ValueError, "at least 1"),
        ({"groups": True}, TypeError, "whole number"),
        ({"groups": "head"}, TypeError, "a number, or patterns of layer names from the input to the loss"),
        ({"groups": 2.0}, TypeError, "a number, or patterns"),
        ({"groups": ["*", 3]}, TypeError, "must hold strings, or lists of strings"),
        ({"groups": []}, ValueError, "names no layer"),
        ({"groups": ["a", []]}, ValueError, "names no layer"),
        ({"groups": ["*"], "depth": len}, ValueError, "leave one of them out"),
        ({"every": 0}, ValueError, "at least 1"),
        ({"order": "bottom-up"}, ValueError, "allowed: 'top-down', 'chain'"),
        ({"depth": 3}, TypeError, "a function from a layer's name"),
        ({"requires_grad": 1}, TypeError, "must be True or False"),
    ],
)
def test_arguments_out_of_their_range(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Unfreezing(**arguments)


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        (6, ValueError, "have 5 depths: pass at most 5"),
        (["embed*", "head"], ValueError, "leaves out 'blocks.0', 'blocks.1', 'blocks.2'; add a pattern"),
        (["embed*", "layers.*", "*"], ValueError, "groups pattern 'layers.\\*' matches none"),
        (["*", [3]], TypeError, "each pattern must be a string"),
    ],
)
def test_groups_that_do_not_fit_the_layers(groups: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Unfreezing(groups).init(dummies(NAMES), torch.device("cpu"))
