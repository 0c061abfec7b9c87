"""LARS and LARC."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layerwise
import reference
from layerwise.rules import LARC, LARS, Constant, Trust, chain
from layerwise.statistics import Statistics

from .samples import (
    SEEDS,
    TOLERANCE,
    Groups,
    assert_close,
    factors_of,
    gradients_of,
    layers_of,
    network,
    one_group,
    weights_of,
)

SIZES = st.floats(1e-6, 1e6)
SCALES = st.floats(1e-3, 1e3)


def statistics(gradient: float, weight: float, decay: float = 0.0, rate: float = 0.1) -> Statistics:
    def tensor(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return Statistics(
        gradient_norm=tensor(gradient),
        weight_norm=tensor(weight),
        decay_norm=tensor(decay * weight),
        learning_rate=tensor(rate),
    )


def factor(rule: LARS | LARC, *sizes: float, **options: float) -> float:
    return rule.factors(statistics(*sizes, **options), {})[0].item()


def two_groups(model: nn.Module) -> tuple[Groups, dict[int, float], dict[int, float]]:
    """A group of matrices and one of vectors, without decay and at twice the rate; the decays; the rates."""
    flat = [p for p in model.parameters() if p.ndim <= 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": rest, "lr": 0.3, "weight_decay": 0.01},
        {"params": flat, "lr": 0.6, "weight_decay": 0.0},
    ]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return groups, decays, rates


@pytest.mark.pairwise
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layers", ["parameter", "module"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"trust_coefficient": 0.02, "eps": 0.0}, {"eps": 0.5}],
    ids=["defaults", "other_trust", "large_eps"],
)
def test_lars_factors_are_those_of_the_reference(
    seed: int, layers: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    model = network(seed, dtype)
    found = layers_of(model, layers)
    groups, decays, _ = two_groups(model)
    expected = reference.lars(
        gradients_of(found),
        weights_of(found),
        [[decays[id(p)] for p in layer.parameters] for layer in found],
        **options,
    )
    assert_close(factors_of(LARS(**options), found, groups), expected, TOLERANCE[dtype])


@pytest.mark.pairwise
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layers", ["parameter", "module"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "scaled"])
def test_larc_factors_are_those_of_the_reference(seed: int, layers: str, dtype: torch.dtype, clip: bool) -> None:
    model = network(seed, dtype)
    found = layers_of(model, layers)
    groups, decays, rates = two_groups(model)
    expected = reference.larc(
        gradients_of(found),
        weights_of(found),
        [[decays[id(p)] for p in layer.parameters] for layer in found],
        [max(rates[id(p)] for p in layer.parameters) for layer in found],
        clip=clip,
    )
    assert_close(factors_of(LARC(clip=clip), found, groups), expected, TOLERANCE[dtype])


def test_larc_takes_a_rate_that_is_a_tensor() -> None:
    model = network(0)
    found = layers_of(model)
    numbers = factors_of(LARC(), found, one_group(model, lr=0.25))
    tensors = factors_of(LARC(), found, one_group(model, lr=torch.tensor(0.25)))
    assert torch.equal(numbers, tensors)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 10), SCALES)
def test_lars_does_not_see_a_common_scale_of_weight_and_gradient(g: float, w: float, decay: float, c: float) -> None:
    rule = LARS(eps=0)
    assert factor(rule, c * g, c * w, decay) == pytest.approx(factor(rule, g, w, decay), rel=1e-12)


@settings(deadline=None)
@given(SIZES, SIZES, SCALES)
def test_lars_step_does_not_see_the_scale_of_the_gradient(g: float, w: float, c: float) -> None:
    rule = LARS(eps=0)
    assert c * g * factor(rule, c * g, w) == pytest.approx(g * factor(rule, g, w), rel=1e-12)
    assert g * factor(rule, g, w) == pytest.approx(0.001 * w, rel=1e-12)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 10), SCALES)
def test_lars_is_proportional_to_the_trust_coefficient(g: float, w: float, decay: float, c: float) -> None:
    once, more = factor(LARS(0.001), g, w, decay), factor(LARS(0.001 * c), g, w, decay)
    assert more == pytest.approx(c * once, rel=1e-12)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(1e-3, 10))
def test_lars_with_decay_stays_below_trust_over_decay(g: float, w: float, decay: float) -> None:
    assert factor(LARS(), g, w, decay) < 0.001 / decay


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 10), st.floats(1e-8, 1e3))
def test_larc_never_exceeds_the_global_rate(g: float, w: float, decay: float, rate: float) -> None:
    clipped = factor(LARC(), g, w, decay=decay, rate=rate)
    local = factor(LARS(0.02), g, w, decay)
    assert 0 < clipped <= 1
    assert clipped * rate == pytest.approx(min(local, rate), rel=1e-12)


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0, 10), st.floats(1e-8, 1e3))
def test_larc_without_clip_is_lars(g: float, w: float, decay: float, rate: float) -> None:
    assert factor(LARC(clip=False), g, w, decay=decay, rate=rate) == factor(LARS(0.02), g, w, decay)


def test_larc_at_rate_zero_stays_finite() -> None:
    assert factor(LARC(), 1.0, 1.0, rate=0.0) == 1.0


@pytest.mark.parametrize("rule", [LARS(), LARC(), LARC(clip=False)], ids=repr)
@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_zero_norm_gives_one(rule: LARS | LARC, zero: str) -> None:
    gradient, weight = float(zero == "weight"), float(zero == "gradient")
    assert factor(rule, gradient, weight, decay=0.1) == 1.0


@pytest.mark.parametrize("rule", [LARS(eps=0), LARC(eps=0), LARC(clip=False)], ids=repr)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf], ids=str)
def test_gradient_without_a_norm_gives_what_the_reference_gives(rule: LARS | LARC, value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    model[0].weight.grad = torch.full((2, 2), value).double()
    model[1].weight.grad = torch.ones(2, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    found = layers_of(model)
    arguments: list[Any] = [gradients_of(found), weights_of(found), [[0.0], [0.0]]]
    if isinstance(rule, LARC):
        expected = reference.larc(*arguments, [0.1, 0.1], clip=rule.clip, eps=rule.eps)
    else:
        expected = reference.lars(*arguments, eps=rule.eps)
    optimizer.step()
    np.testing.assert_allclose(list(adapter.get_last_factors().values()), expected, rtol=1e-12)


def test_method_takes_parameters_and_leaves_one_dimensional_ones_out() -> None:
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    assert adapter.layers == [name for name, _ in model.named_parameters()]
    assert adapter.apply == "gradient"
    optimizer.step()
    factors = adapter.get_last_factors()
    for name, p in model.named_parameters():
        assert (factors[name] == 1.0) == (p.ndim == 1), name


RULES = {"LARS": LARS, "LARC": LARC}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("value", [0, -0.001, math.inf, math.nan], ids=repr)
def test_trust_coefficient_out_of_range_is_refused(rule: type[LARS | LARC], value: float) -> None:
    message = rf"trust_coefficient={re.escape(repr(value))} must be a finite number above 0; the paper's is 0\.001"
    with pytest.raises(ValueError, match=message):
        rule(trust_coefficient=value)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("value", [-1e-8, math.inf, math.nan], ids=repr)
def test_eps_out_of_range_is_refused(rule: type[LARS | LARC], value: float) -> None:
    with pytest.raises(ValueError, match=rf"eps={re.escape(repr(value))} must be a finite number of at least 0"):
        rule(eps=value)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["trust_coefficient", "eps"])
def test_argument_that_is_no_number_is_refused_by_name(rule: type[LARS | LARC], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}='0.1'"):
        rule(**{name: "0.1"})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_lars_says_on_adam_and_its_like_that_it_is_made_for_sgd(
    kind: Any, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for rule, optimizer, place, words in (
        (LARS(), kind, "auto", f"LARS.* is made for SGD; {kind.__name__} divides by .* Trust is the rule for such"),
        (chain(LARS(), Constant({"*": 2.0})), kind, "auto", "is made for SGD"),
        (LARS(), kind, "gradient", "changes next to nothing"),  # which says enough
        (Trust(), kind, "auto", ""),  # the remedy
        (LARC(), kind, "auto", ""),
        (LARS(), torch.optim.SGD, "auto", ""),
    ):
        caplog.clear()
        model = make_model()
        layerwise.LayerwiseLR(optimizer(model.parameters(), lr=0.1), rule, model, apply=place)
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == bool(words)
        assert all(re.search(words, one) for one in found)
