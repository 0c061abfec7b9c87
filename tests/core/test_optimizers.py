"""Every optimizer of torch.optim, every option, every form."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise.optimizers import PLACES, takes_tensor_rate
from layerwise.rules import Constant, LayerAdaptive
from optimizer_cases import (
    ALL,
    CASES,
    LATE,
    OPTIONS,
    REFUSED,
    Case,
    assert_same_bits,
    network,
    relative_difference,
    take_step,
    weights,
)

FACTORS = {"first": 0.5, "second": 1.3, "third": 2.7}
names = {"ids": str}


def factors_for(model: nn.Module) -> dict[str, float]:
    return {name: FACTORS[name] for name, _ in model.named_children()}


def test_the_table_holds_every_optimizer_class() -> None:
    assert set(OPTIONS) | set(REFUSED) == ALL


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("case", "place"),
    [(c, p) for c in CASES for p in ("auto", *PLACES) if not (p == "lr" and c.optimizer in LATE)],
    **names,
)
def test_factors_of_one_change_nothing_to_the_bit(case: Case, place: str) -> None:
    bare, attached = network(case), network(case)
    plain, optimizer = case.make(bare.parameters()), case.make(attached.parameters())
    layerwise.LayerwiseLR(optimizer, Constant({"*": 1.0}), attached, apply=place)
    for step in range(10):
        take_step(bare, plain, step)
        take_step(attached, optimizer, step)
        assert_same_bits(weights(attached), weights(bare))
    assert_equal_state(optimizer, plain)


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES, **names)
def test_no_optimizer_of_torch_writes_into_its_groups(case: Case) -> None:
    model = network(case)
    optimizer = case.make(model.parameters())
    before = [{**group} for group in optimizer.param_groups]
    versions = [x._version for group in before for x in group.values() if isinstance(x, torch.Tensor)]
    for step in range(3):
        take_step(model, optimizer, step)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        assert all(group[name] is old[name] for name in {*group, *old})
    assert [x._version for group in before for x in group.values() if isinstance(x, torch.Tensor)] == versions


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer not in LATE], **names)
def test_lr_equals_permanent_groups_to_the_bit_over_100_steps(case: Case) -> None:
    permanent, attached = network(case), network(case)
    factors = factors_for(attached)
    groups = layerwise.param_groups(permanent)
    for group in groups:
        group["lr"] = case.options["lr"] * factors[group["name"]]
    reference, optimizer = case.make(groups), case.make(attached.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, Constant(factors), attached, apply="lr")
    for step in range(100):
        take_step(permanent, reference, step)
        take_step(attached, optimizer, step)
    assert_same_bits(weights(attached), weights(permanent))
    assert adapter.get_last_factors() == factors
    assert all(torch.isfinite(p).all() for p in attached.parameters())


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [c for c in CASES if c.optimizer not in LATE], **names)
def test_lr_with_adapting_factors_equals_groups_rewritten_by_hand(case: Case) -> None:
    by_hand, attached = network(case), network(case)
    groups = layerwise.param_groups(by_hand)
    reference, optimizer = case.make(groups), case.make(attached.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), attached, apply="lr")
    for step in range(20):
        take_step(attached, optimizer, step)
        for group in reference.param_groups:
            group["lr"] = case.options["lr"] * adapter.get_last_factors()[group["name"]]
        take_step(by_hand, reference, step)
        assert_same_bits(weights(attached), weights(by_hand))


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES, **names)
def test_update_scales_the_step_of_the_bare_optimizer(case: Case) -> None:
    attached = network(case)
    factors = factors_for(attached)
    optimizer = case.make(attached.parameters())
    layerwise.LayerwiseLR(optimizer, Constant(factors), attached, apply="update")
    for step in range(10):
        twin, plain = copy.deepcopy((attached, optimizer))  # the bare optimizer, for a copy has no hooks, from here
        before = weights(attached)
        take_step(twin, plain, step)
        take_step(attached, optimizer, step)
        owners = [name.partition(".")[0] for name, _ in attached.named_parameters()]
        expected = [w + factors[owner] * (new - w) for owner, w, new in zip(owners, before, weights(twin), strict=True)]
        assert relative_difference(weights(attached), expected) < 1e-14


@pytest.mark.parametrize("case", [Case(c, {"lr": 0.1}) for c in LATE], **names)
def test_a_late_rate_is_refused(case: Case) -> None:
    model = network(case)
    optimizer = case.make(model.parameters())
    with pytest.raises(ValueError, match=r"apply='lr' does not work .* use apply='update'"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="lr")
    assert layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model).apply == "update"


def test_lbfgs_is_refused_with_the_reason() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="LBFGS evaluates its closure several times"):
        layerwise.LayerwiseLR(optim.LBFGS(model.parameters()), LayerAdaptive(), model)


@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("optimizer", [c for c in OPTIONS if "differentiable" in c.__init__.__code__.co_varnames])
def test_in_place_is_refused_on_a_differentiable_optimizer(optimizer: type, place: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"cuts the graph .* use apply='lr'"):
        layerwise.LayerwiseLR(optimizer(model.parameters(), differentiable=True), LayerAdaptive(), model, apply=place)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="SGD takes a rate that is learned from PyTorch 2.7 on")
def test_differentiable_sgd_keeps_its_graph_under_lr() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    weight = start.clone()
    weight.grad = torch.tensor([0.5, 0.25], dtype=torch.float64)
    optimizer = optim.SGD([("weight", weight)], lr=rate, differentiable=True)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 3.0}), apply="lr")
    optimizer.step()
    weight.sum().backward()
    torch.testing.assert_close(rate.grad, torch.tensor(-3 * 0.75, dtype=torch.float64))
    torch.testing.assert_close(start.grad, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("optimizer", "form"),
    [
        (optimizer, form)
        for optimizer in (optim.SGD, optim.Adagrad, optim.AdamW)
        for form in ({"foreach": False}, {"foreach": True}, {"fused": True})
        if not (
            optimizer is optim.AdamW and "foreach" in form and form["foreach"]
        )  # torch refuses it, if not capturable
    ],
    ids=str,
)
def test_a_tensor_rate_is_scaled_too(optimizer: type[optim.Optimizer], form: dict[str, Any]) -> None:
    results = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        case = Case(optimizer, {"lr": rate}, form)
        model = network(case)
        opt = case.make(model.parameters())
        adapter = layerwise.LayerwiseLR(opt, Constant(factors_for(model)), model, apply="lr")
        for step in range(5):
            take_step(model, opt, step)
        assert adapter.get_last_lr() == pytest.approx({k: 0.1 * f for k, f in FACTORS.items()})
        results.append(weights(model))
    assert relative_difference(*results) < 1e-7  # the fused kernels read a tensor rate in float32


def assert_equal_state(first: optim.Optimizer, second: optim.Optimizer) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == two["state"][key].keys()
        for name, value in state.items():
            other = two["state"][key][name]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other, rtol=0, atol=0)
            else:
                assert value == other


def test_no_warning_is_given_by_an_ordinary_attachment() -> None:
    model = nn.Linear(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise.LayerwiseLR(optim.SGD(model.parameters(), lr=0.1), LayerAdaptive(), model)


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (optim.SGD, {}, (False, False, False)),
        (optim.SGD, {"fused": True}, (None, True, True)),
        (optim.Adam, {}, (False, False, False)),
        (optim.Adam, {"capturable": True}, (True, True, True)),
        (optim.AdamW, {"capturable": True}, (True, True, True)),
        (optim.NAdam, {"capturable": True}, (True, True, True)),
        (optim.Adamax, {"capturable": True}, (True, True, True)),
        (optim.RMSprop, {"capturable": True}, (True, False, True)),
        (optim.Adadelta, {"capturable": True}, (True, False, True)),
        (optim.RMSprop, {}, (False, False, False)),
        (optim.Adagrad, {}, (True, False, True)),
        (optim.RAdam, {}, (True, True, True)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_which_forms_take_a_rate_that_stays_on_the_device(kind, options, expected, foreach):
    """What torch's code for each form does with a tensor as rate; None stands for fused with foreach."""
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    group = {**optimizer.param_groups[0], **options, "foreach": foreach}
    wanted = expected[(True, False, None).index(foreach)]
    if wanted is None:
        pytest.skip("torch refuses fused and foreach together")
    assert takes_tensor_rate(optimizer, group) is wanted


def test_for_parameters_of_a_class_of_their_own_torch_does_not_take_foreach():
    class Own(nn.Parameter):
        pass

    optimizer = optim.Adagrad([Own(torch.ones(2))], lr=0.1)
    assert not takes_tensor_rate(optimizer, optimizer.param_groups[0])
