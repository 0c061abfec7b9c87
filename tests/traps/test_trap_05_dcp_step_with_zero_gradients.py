"""Trap 5: `torch.distributed.checkpoint` makes an optimizer's state by a step with zero gradients at rate zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import layerwise
from layerwise.rules import (
    LARC,
    LARS,
    AllLayers,
    Constant,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    Phase,
    Rule,
)

KINDS = {
    "plain descent": lambda parameters: torch.optim.SGD(parameters, lr=0.02, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "a tensor as rate": lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.02), momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "Adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=0.1, fused=True),
}


class Inverse(Rule):
    """A rule that divides by the norm, and counts every step that it is asked about."""

    def init(self, layers, device):
        return {"steps": 0}

    def factors(self, statistics, state):
        return 1 / statistics.gradient_norm, {"steps": state["steps"] + 1}


RULES = {
    "layer-adaptive": LayerAdaptive(),
    "LARS": LARS(),
    "LARC": LARC(),
    "fixed": Constant({"*": 3.0}),
    "inverse": Inverse(),
    "analysis": GradientAmplification(Directionality(threshold=0.5), [Phase(2, True)]),
    "amplification": GradientAmplification(AllLayers(after_analysis=False), [Phase(2, True)]),
}
every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_place
@every_kind
@every_rule
def test_that_step_is_taken_as_without_an_adapter_and_does_not_count(
    apply, kind, rule, make_model, train, weights, assert_same_bits
):
    ends = []
    for paused in (False, True):
        model = make_model()
        optimizer = kind(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=apply)
        before, state = weights(model), adapter.state_dict()["state"]
        steps = []
        handle = optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        if paused:
            with adapter.paused():
                saved = get_optimizer_state_dict(model, optimizer)
        else:
            saved = get_optimizer_state_dict(model, optimizer)
        handle.remove()
        assert len(steps) == 1, "the trap: it did call step"
        assert_same_bits(weights(model), before)
        assert_same_bits(adapter.state_dict()["state"], state)
        assert set(adapter.get_last_factors().values()) == {1.0}
        assert list(adapter.get_last_lr().values()) == pytest.approx([0.02] * len(adapter.layers), rel=1e-7)
        train(model, optimizer)
        ends.append([saved["state"], weights(model), optimizer.state_dict(), adapter.state_dict()["state"]])
    assert_same_bits(*ends)
    assert all(p.isfinite().all() for p in ends[0][1].values())


@every_place
@every_rule
def test_a_checkpoint_in_the_middle_of_stateless_training_leaves_the_last_factors(
    apply, rule, make_model, train, weights, assert_same_bits
):
    """SGD without momentum never has a state, so that the step is taken at every checkpoint after `zero_grad`."""
    ends = []
    for checkpointed in (True, False):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.1)
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=apply)
        train(model, optimizer)
        optimizer.zero_grad()
        before = [adapter.get_last_factors(), adapter.get_last_lr(), adapter.state_dict()["state"]]
        if checkpointed:
            get_optimizer_state_dict(model, optimizer)
        assert_same_bits([adapter.get_last_factors(), adapter.get_last_lr(), adapter.state_dict()["state"]], before)
        train(model, optimizer, first=3)
        adapter.end_epoch()
        ends.append([weights(model), adapter.get_last_factors(), adapter.state_dict()["state"]])
    assert_same_bits(*ends)


@every_place
@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["a number", "a tensor"])
@pytest.mark.parametrize("rule", [RULES[name] for name in ("inverse", "analysis")], ids=["inverse", "analysis"])
def test_a_first_step_of_a_warm_up_from_zero_is_a_step(apply, rate, rule, make_model, backward):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=apply)
    backward(model)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model[2].parameters()))
    optimizer.step()
    state = adapter.state_dict()["state"]
    if rule is RULES["inverse"]:
        assert adapter.get_last_factors()["2"] == pytest.approx(1 / norm)
        assert state["steps"] == 1
    else:
        assert state["sums"]["iterations"].item() == 1
    assert set(adapter.get_last_lr().values()) == {0.0}
