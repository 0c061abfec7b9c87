"""Fixed factors by pattern."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerwise
import reference
from layerwise.rules import Constant

from .samples import bits, factors_of, layers_of, network, one_group, quadratic_step


@pytest.mark.parametrize(
    "factors",
    [
        {"first": 2.0},
        {"f*": 0.1, "first": 5.0},
        {"[sh]*": 3, "*": 0.5},
        {"*": 0},
        {"norm": 0.0, "*o*": 7.0, "third": 1e-9},
    ],
    ids=["one_name", "first_match_wins", "sets_and_rest", "freeze_all", "mixed"],
)
def test_factors_are_those_of_the_reference(factors: dict[str, float]) -> None:
    layers = layers_of(network(0))
    found = factors_of(Constant(factors), layers, one_group(network(0)))
    np.testing.assert_array_equal(found.numpy(), reference.constant([layer.name for layer in layers], factors))


def test_patterns_tell_upper_from_lower_case() -> None:
    with pytest.raises(ValueError, match=r"Constant pattern 'FIRST' matches none of 'first'"):
        Constant({"FIRST": 2.0}).init(layers_of(network(0)), torch.device("cpu"))


def test_constant_factors_are_permanent_parameter_groups() -> None:
    factors = {"0": 0.25, "1": 4.0}
    first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double() for _ in range(2))
    second.load_state_dict(first.state_dict())
    optimizer = torch.optim.Adam(first.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant(factors), first)
    groups = [{"params": list(second[int(i)].parameters()), "lr": 0.1 * f} for i, f in factors.items()]
    grouped = torch.optim.Adam(groups)
    for step in range(4):
        quadratic_step(first, optimizer, step)
        quadratic_step(second, grouped, step)
    assert bits(first) == bits(second)


def test_factor_zero_freezes_a_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"0": 0}), model)
    before = bits(model)
    for step in range(3):
        quadratic_step(model, optimizer, step)
    assert bits(model)[:2] == before[:2]
    assert bits(model)[2:] != before[2:]


@pytest.mark.parametrize("factors", [[("a", 1.0)], "a", None, 2.0], ids=repr)
def test_what_is_no_mapping_is_refused(factors: Any) -> None:
    message = re.escape(f"Constant takes a mapping of pattern to factor, not {factors!r}")
    with pytest.raises(TypeError, match=message):
        Constant(factors)


def test_empty_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Constant\(\{\}\) changes no layer; give at least one pattern, such as"):
        Constant({})


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan, True, "2", None], ids=repr)
def test_factor_out_of_range_is_refused_by_pattern(factor: Any) -> None:
    message = re.escape(f"Constant pattern 'fc': factor {factor!r} must be a finite number of at least 0")
    with pytest.raises(ValueError, match=message):
        Constant({"conv": 1.0, "fc": factor})


def test_pattern_that_matches_no_layer_is_refused_with_the_nearest_name() -> None:
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"Constant pattern 'thirds' matches none of .*Did you mean 'third'\?"):
        layerwise.LayerwiseLR(optimizer, Constant({"first": 1, "thirds": 2.0}), model)


def test_pattern_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Constant holds 3 \(int\); each pattern must be a string"):
        Constant({3: 1.0}).init(layers_of(network(0)), torch.device("cpu"))
