"""Caffe's rate policies: the numbers, their boundaries, and resuming."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from layerwise import LayerwiseLR
from layerwise.lab.errors import UsageError
from layerwise.lab.training import caffe
from layerwise.lab.training.solvers import POLICIES, multiplier, scheduler
from layerwise.rules import Constant

ARGUMENTS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "inv": {"gamma": 1e-4, "power": 0.75},
    "step": {"gamma": 0.1, "stepsize": 3},
    "multistep": {"gamma": 0.1, "stepvalues": [2, 5]},
    "poly": {"power": 0.5, "max_iter": 20},
    "cosine": {"max_iter": 20},
    "warmup-cosine": {"warmup": 3, "floor": 0.05, "max_iter": 20},
}


def solver(lr: float = 0.01) -> caffe.SGD:
    w, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return caffe.SGD([{"params": [w]}, {"params": [b], "lr_mult": 2.0}], lr, momentum=0.9)


def run(optimizer: torch.optim.Optimizer, policy: Any, updates: int) -> list[float]:
    """Return the rate of each update."""
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        policy.step()
    return rates


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_all_policies_are_tested():
    assert set(ARGUMENTS) == set(POLICIES)
    assert all(tuple(ARGUMENTS[name]) == arguments for name, arguments in POLICIES.items())


@pytest.mark.parametrize("iteration", [0, 1, 1_000_000])
def test_fixed_is_one(iteration):
    assert multiplier("fixed", iteration) == 1.0


def test_inv_is_equation_4():
    assert multiplier("inv", 0, gamma=1e-4, power=0.75) == 1.0
    assert multiplier("inv", 10_000, gamma=1e-4, power=0.75) == pytest.approx(0.5946035575013605, rel=1e-15)
    assert multiplier("inv", 3, gamma=1.0, power=0.5) == 0.5


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 1.0), (99_999, 1.0), (100_000, 0.1), (199_999, 0.1), (200_000, 0.01)]
)
def test_step_changes_at_multiples_of_its_size(iteration, expected):
    assert multiplier("step", iteration, gamma=0.1, stepsize=100_000) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 1.0), (59_999, 1.0), (60_000, 0.1), (64_999, 0.1), (65_000, 0.01), (70_000, 0.01)],
)
def test_multistep_changes_from_each_of_its_values_on(iteration, expected):
    found = multiplier("multistep", iteration, gamma=0.1, stepvalues=(60_000, 65_000))
    assert found == pytest.approx(expected, rel=1e-15)


def test_poly_falls_to_zero_at_its_last_iteration():
    assert [multiplier("poly", k, power=2.0, max_iter=4) for k in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert multiplier("poly", 3, power=0.5, max_iter=4) == 0.5


def test_the_cosine_falls_to_zero_at_its_last_iteration():
    expected = [1.0, 0.75, 0.5, 0.25, 0.0]  # (1 + cos(π k / 6)) / 2 at k of 0, 2, 3, 4, 6
    assert [multiplier("cosine", k, max_iter=6) for k in (0, 2, 3, 4, 6)] == pytest.approx(expected, abs=1e-15)


def test_a_warm_up_rises_in_a_line_and_its_cosine_falls_to_the_floor():
    arguments = {"warmup": 4, "floor": 0.2, "max_iter": 10}
    # k + 1 over 4; then 0.2 + 0.8 (1 + cos(π (k − 4) / 6)) / 2 at k of 4, 6, 7, 8, 10
    assert [multiplier("warmup-cosine", k, **arguments) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    found = [multiplier("warmup-cosine", k, **arguments) for k in (4, 6, 7, 8, 10)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)


# --- The scheduler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_update_k_has_the_base_rate_times_the_multiplier_of_k(name):
    optimizer = solver()
    found = run(optimizer, scheduler(optimizer, name, **ARGUMENTS[name]), 8)
    assert found == [0.01 * multiplier(name, k, **ARGUMENTS[name]) for k in range(8)]


def test_the_rates_of_a_short_multistep_are_these():
    optimizer = solver(1.0)
    found = run(optimizer, scheduler(optimizer, "multistep", gamma=0.5, stepvalues=[2, 5]), 7)
    assert found == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_multipliers_of_groups_and_factors_of_an_adapter_stay_outside_of_the_rate():
    optimizer = solver(0.5)
    w, b = (group["params"][0] for group in optimizer.param_groups)
    model = nn.ParameterDict({"w": w, "b": b})
    adapter = LayerwiseLR(optimizer, Constant({"w": 4.0, "b": 0.25}), model, layers="parameter", apply="lr")
    run(optimizer, scheduler(optimizer, "step", gamma=0.5, stepsize=1), 2)
    assert adapter.get_last_lr() == {"w": 0.25 * 4.0, "b": 0.25 * 0.25}
    assert [(group["lr"], group["lr_mult"]) for group in optimizer.param_groups] == [(0.125, 1.0), (0.125, 2.0)]
    # The local rates were 2 and 1 for w, 0.25 and 0.125 for b.
    torch.testing.assert_close(optimizer.state[w]["history"], torch.full((2,), 0.9 * 2.0 + 1.0))
    torch.testing.assert_close(optimizer.state[b]["history"], torch.full((2,), 0.9 * 0.25 + 0.125))


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_has_the_same_bits(name):
    whole = solver()
    expected = run(whole, scheduler(whole, name, **ARGUMENTS[name]), 10)

    first = solver()
    policy = scheduler(first, name, **ARGUMENTS[name])
    rates = run(first, policy, 4)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "policy": policy.state_dict()}, file)
    assert file.tell() < 10_000
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = solver()
    for group, trained in zip(second.param_groups, first.param_groups, strict=True):
        group["params"][0].data.copy_(trained["params"][0])
    resumed = scheduler(second, name, **ARGUMENTS[name])
    second.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["policy"])
    assert rates + run(second, resumed, 6) == expected
    for group, other in zip(second.param_groups, whole.param_groups, strict=True):
        assert torch.equal(group["params"][0], other["params"][0])


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("exp", {}, r"policy='exp': use one of fixed, inv, step, multistep, poly, cosine, warmup-cosine"),
        ("fixed", {"gamma": 0.1}, r"gamma=0\.1: policy 'fixed' takes no argument; leave gamma out"),
        ("inv", {"gamma": 0.1, "stepsize": 3}, r"stepsize=3: policy 'inv' takes gamma, power; leave stepsize out"),
        ("inv", {"gamma": 0.1}, r"power is missing: policy 'inv' takes gamma, power; give all of them"),
        ("step", {"gamma": 0.1, "stepsize": 0}, r"stepsize=0: policy 'step' takes a whole number from 1"),
        ("step", {"gamma": 0.1, "stepsize": 1.5}, r"stepsize=1\.5: policy 'step' takes a whole number from 1"),
        ("multistep", {"gamma": 0.1, "stepvalues": []}, r"stepvalues=\[\]: .* a list of rising whole numbers from 1"),
        ("multistep", {"gamma": 0.1, "stepvalues": [5, 5]}, r"stepvalues=\[5, 5\]: .* rising whole numbers"),
        ("multistep", {"gamma": 0.1, "stepvalues": [0, 5]}, r"stepvalues=\[0, 5\]: .* from 1"),
        ("warmup-cosine", {"warmup": 9, "floor": 0.0, "max_iter": 9}, r"warmup=9: must be below the length .*, 9"),
        ("warmup-cosine", {"warmup": 1, "floor": 1.5, "max_iter": 9}, r"floor=1\.5: must be at most 1"),
        ("multistep", {"gamma": 0.1, "stepvalues": 5}, r"stepvalues=5: .* a list of rising whole numbers"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed_and_changes_nothing(name, arguments, text):
    with pytest.raises(UsageError, match=text):
        multiplier(name, 0, **arguments)
    optimizer = solver()
    with pytest.raises(UsageError, match=text):
        scheduler(optimizer, name, **arguments)
    assert "initial_lr" not in optimizer.param_groups[0]
