"""Training by Fabric with LayerwiseLR is the hand-written loop with it, to the bit."""

from __future__ import annotations

import logging

import by_hand
import pytest
import torch
from torch import nn

import layerwise

pytest.importorskip("lightning.fabric", reason="Lightning is not installed")

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

every_rule = pytest.mark.parametrize("rule", by_hand.RULES.values(), ids=by_hand.RULES)
MOMENTS = ["before", "after"]
OPTIMIZERS = {
    "momentum": by_hand.momentum,
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}
FORMS = {
    "full precision": ({}, {}),
    "clipping": ({}, {"clip": 0.3}),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"half": torch.bfloat16}),
    "accumulation": ({}, {"accumulate": 4}),
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def attached(fabric, rule, optimizer, moment):
    model = by_hand.network()
    optimizer = optimizer(model.parameters())
    if moment == "before":
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    model, optimizer = fabric.setup(model, optimizer)
    if moment == "after":
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    assert adapter.layers == ["first", "second", "head"], "without the prefixes of the wrapper"
    return model, optimizer, adapter


def train(fabric, model, optimizer, adapter, *, clip=None, accumulate=1, first=0, last=18, **_):
    """Train as Fabric's documentation does it, from one batch to another of three epochs."""
    batches = by_hand.batches()
    for number in range(first, last):
        batch = batches[number % by_hand.BATCHES]
        at_end = (number + 1) % by_hand.BATCHES == 0
        stepping = at_end or (number % by_hand.BATCHES + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not stepping):
            fabric.backward(by_hand.loss_of(model, batch) / accumulate)
        if stepping:
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
        if at_end:
            adapter.end_epoch()


def expected(rule, optimizer, **arguments):
    model = by_hand.network()
    optimizer = optimizer(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    trained = by_hand.train(model, optimizer, adapter, **arguments)
    adapter.detach()  # its last values remain when the optimizer is gone
    return trained, adapter


@pytest.mark.pairwise
@every_rule
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("fabrics", "ours"), FORMS.values(), ids=FORMS)
def test_the_weights_are_those_of_the_loop(fabrics, ours, optimizer, moment, rule, weights, assert_same_bits):
    fabric = Fabric(accelerator="cpu", **fabrics)
    model, wrapper, adapter = attached(fabric, rule, optimizer, moment)
    train(fabric, model, wrapper, adapter, **ours)
    reference, its_adapter = expected(rule, optimizer, **ours)
    assert_same_bits(weights(model.module), weights(reference))
    assert adapter.get_last_factors() == its_adapter.get_last_factors()


@every_rule
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_float16_with_a_scaler_that_skips_steps_is_the_loop(optimizer, moment, rule, weights, assert_same_bits):
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20) for _ in range(2)]
    fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scalers[0])])
    model, wrapper, adapter = attached(fabric, rule, optimizer, moment)
    train(fabric, model, wrapper, adapter)
    reference, _ = expected(rule, optimizer, half=torch.float16, scaler=scalers[1])
    assert_same_bits(weights(model.module), weights(reference))
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**20, "a step must have been skipped"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stop", [8, 10, 12, 15])
def test_fabrics_checkpoints_hold_the_adapter(stop, moment, tmp_path, weights, assert_same_bits):
    rule = by_hand.RULES["GradientAmplification"]
    fabric = Fabric(accelerator="cpu")
    model, optimizer, adapter = attached(fabric, rule, by_hand.momentum, moment)
    train(fabric, model, optimizer, adapter, last=stop)
    fabric.save(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer, "adapter": adapter})
    train(fabric, model, optimizer, adapter, first=stop)
    selection = adapter.get_last_selection()

    other, optimizer, again = attached(fabric, rule, by_hand.momentum, moment)
    nn.init.zeros_(other.first.weight)
    fabric.load(tmp_path / "checkpoint", {"model": other, "optimizer": optimizer, "adapter": again})
    assert again.epoch == stop // by_hand.BATCHES + 1
    train(fabric, other, optimizer, again, first=stop)
    assert_same_bits(weights(other.module), weights(model.module))
    assert again.get_last_selection() == selection
