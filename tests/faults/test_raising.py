"""The same numbers at the edge under on_nonfinite="raise": an error before anything changes, or a step as ever."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from edges import LAYERS, OPTIMIZERS, RULES, Fault, every_case, fits, network, put_gradients
from exact import same_bits
from hypothesis import assume, settings

import layerwise
from layerwise.rules import LayerAdaptive

pytestmark = pytest.mark.full


def check_raising(dtype: torch.dtype, rule: str, kind: str, place: str, faults: list[Fault]) -> None:
    """Step where the gradients are finite, meet an error where not; in the end all is as if those had not been."""
    assume(fits(rule, kind, place))
    model, other = network(dtype), network(dtype)
    optimizer, alone = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](other.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, RULES[rule], model, apply=place, on_nonfinite="raise")
    twin = layerwise.LayerwiseLR(alone, RULES[rule], other, apply=place)
    taken = 0

    def everything() -> Any:
        gradients = [p.grad for p in model.parameters()]
        return copy.deepcopy([model.state_dict(), optimizer.state_dict(), adapter.state_dict(), gradients])

    for step in range(4):
        for each in (model, other):
            put_gradients(each, step, faults)
        broken = [n for n in LAYERS if not all(p.grad.isfinite().all() for p in model.get_submodule(n).parameters())]
        if not broken:
            optimizer.step()
            alone.step()
            taken += 1
            continue
        before, factors = everything(), adapter.get_last_factors()
        with pytest.raises(FloatingPointError, match=f"step {taken + 1}: the gradient of layer.* not finite") as caught:
            optimizer.step()
        assert all((f"'{n}" in str(caught.value)) == (n in broken) for n in LAYERS)
        same_bits(everything(), before)
        assert adapter.get_last_factors() == factors
    same_bits(dict(model.named_parameters()), dict(other.named_parameters()))
    same_bits(optimizer.state_dict()["state"], alone.state_dict()["state"])
    same_bits(adapter.state_dict(), twin.state_dict())


@settings(max_examples=100, deadline=None, derandomize=True)
@every_case
def test_an_adapter_asked_to_raise_does_so_before_anything_changes(dtype, rule, kind, place, faults):
    check_raising(dtype, rule, kind, place, faults)


@pytest.mark.faults
@settings(max_examples=3_000, deadline=None, print_blob=True)
@every_case
def test_an_adapter_asked_to_raise_does_so_before_anything_changes_3_000_cases(dtype, rule, kind, place, faults):
    check_raising(dtype, rule, kind, place, faults)


def test_steps_that_a_gradient_scaler_skips_do_not_raise():
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(torch.full((2, 5), math.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    same_bits(model.state_dict(), before)
    optimizer.zero_grad()
    model(torch.full((2, 5), math.inf)).sum().backward()
    with pytest.raises(FloatingPointError, match="step 2: the gradient of layers '0', '2', '4' is not finite"):
        optimizer.step()


def test_what_to_do_is_one_of_two_words():
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="on_nonfinite='stop' is unknown; allowed: 'ignore', 'raise'"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="stop")
    assert not optimizer._optimizer_step_pre_hooks
