"""Trap 7: frameworks wrap optimizers; a wrapper's own hooks are never called, or are somebody else's."""

from __future__ import annotations

import logging

import pytest
import torch

import layerwise
from layerwise._hooks import OptimizerHooks
from layerwise.optimizers import unwrap
from layerwise.rules import LayerAdaptive


def fabric(model, optimizer):
    Fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed").Fabric
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    return Fabric(accelerator="cpu").setup(model, optimizer)


def accelerate(model, optimizer):
    Accelerator = pytest.importorskip("accelerate", reason="Accelerate is not installed").Accelerator
    return Accelerator(cpu=True).prepare(model, optimizer)


def one_in_another(model, optimizer):
    return accelerate(*fabric(model, optimizer))


WRAPPERS = {
    "Fabric": fabric,
    "Accelerate": accelerate,
    "Accelerate around Fabric": one_in_another,
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])
KINDS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
MOMENTS = ["to the optimizer, before", "to the optimizer, after", "to the wrapper"]


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    yield
    try:
        from accelerate.state import AcceleratorState
    except ModuleNotFoundError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


@every_wrapper
@every_place
@every_kind
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_wrapped_optimizer_takes_the_same_steps_wherever_the_adapter_is_attached(
    moment, kind, apply, wrap, make_model, backward, train, weights, assert_same_bits
):
    expected = make_model()
    optimizer = kind(expected.parameters())
    reference = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), expected, apply=apply)
    train(expected, optimizer)
    factors = reference.get_last_factors()

    model = make_model()
    optimizer = kind(model.parameters())
    if moment == "to the optimizer, before":
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    wrapped_model, wrapper = wrap(model, optimizer)
    assert wrapper is not optimizer
    assert unwrap(wrapper) is optimizer
    if moment == "to the optimizer, after":
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    elif moment == "to the wrapper":
        adapter = layerwise.LayerwiseLR(wrapper, LayerAdaptive(), wrapped_model, apply=apply)
    measured = []
    (attached,) = OptimizerHooks.members_of(optimizer)
    measure = attached.measure
    attached.measure = lambda *arguments, **options: (measured.append(1), measure(*arguments, **options))
    train(model, wrapper)
    assert len(measured) == 3, "the hooks must run once a step"
    assert_same_bits(weights(model), weights(expected))
    assert adapter.layers == ["0", "2", "4"]
    assert adapter.get_last_factors() == factors
    assert len(optimizer.param_groups) == 1
    adapter.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@every_wrapper
def test_attaching_to_the_wrapper_too_is_noticed(wrap, make_model, caplog):
    model = make_model()
    optimizer = KINDS["momentum"](model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    wrapped_model, wrapper = wrap(model, optimizer)
    layerwise.LayerwiseLR(wrapper, LayerAdaptive(), wrapped_model)
    assert "has another LayerwiseLR attached already" in caplog.text


@every_wrapper
@every_kind
def test_the_state_of_a_wrapper_has_no_trace_of_the_adapter(wrap, kind, make_model, train, assert_same_bits):
    states = []
    for attached in (True, False):
        model = make_model()
        optimizer = kind(model.parameters())
        wrapped_model, wrapper = wrap(model, optimizer)
        if attached:
            layerwise.LayerwiseLR(wrapper, LayerAdaptive(), wrapped_model)
        train(model, wrapper)
        states.append(wrapper.state_dict())
    assert_same_bits(states[0]["param_groups"], states[1]["param_groups"])
    assert states[0]["state"][0].keys() == states[1]["state"][0].keys()
