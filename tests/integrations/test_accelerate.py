"""Training by Accelerate with LayerwiseLR is the hand-written loop with it, to the bit."""

from __future__ import annotations

import by_hand
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import layerwise

pytest.importorskip("accelerate", reason="Accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration

every_rule = pytest.mark.parametrize("rule", by_hand.RULES.values(), ids=by_hand.RULES)
MOMENTS = ["before", "after"]
OPTIMIZERS = {
    "momentum": by_hand.momentum,
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
FORMS = {
    "full precision": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 4}, {"accumulate": 4}),
    "clipping": ({}, {"clip": 0.3}),
    "accumulation and clipping": ({"gradient_accumulation_steps": 4}, {"accumulate": 4, "clip": 0.3}),
    "bf16": ({"mixed_precision": "bf16"}, {"half": torch.bfloat16}),
}


def forget():
    """Accelerate keeps its state in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _forget_accelerators():
    yield
    forget()


def prepared(accelerator, rule, make_optimizer, moment):
    model = by_hand.network()
    optimizer = make_optimizer(model.parameters())
    if moment == "before":
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    data = DataLoader(by_hand.examples(), by_hand.BATCH)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    if moment == "after":
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    return model, optimizer, data, schedule, adapter


def train(accelerator, model, optimizer, data, schedule, adapter, *, clip=None, first=0, last=18, **_):
    """Train as Accelerate's documentation does it, from one batch to another of three epochs."""
    for epoch in range(first // by_hand.BATCHES, 3):
        for index, batch in enumerate(data, start=epoch * by_hand.BATCHES):
            if not first <= index < last:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(by_hand.loss_of(model, batch))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if (epoch + 1) * by_hand.BATCHES <= last:
            adapter.end_epoch()


@pytest.mark.pairwise
@every_rule
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("accelerates", "ours"), FORMS.values(), ids=FORMS)
def test_the_weights_are_those_of_the_loop(accelerates, ours, optimizer, moment, rule, weights, assert_same_bits):
    accelerator = Accelerator(cpu=True, **accelerates)
    model, wrapper, data, schedule, adapter = prepared(accelerator, rule, optimizer, moment)
    train(accelerator, model, wrapper, data, schedule, adapter, **ours)

    reference = by_hand.network()
    optimizer = optimizer(reference.parameters())
    its_adapter = layerwise.LayerwiseLR(optimizer, rule, reference)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    by_hand.train(reference, optimizer, its_adapter, scheduler=scheduler, **ours)
    assert_same_bits(weights(accelerator.unwrap_model(model)), weights(reference))
    assert adapter.get_last_factors() == its_adapter.get_last_factors()
    assert adapter.get_last_lr() == its_adapter.get_last_lr()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stop", [8, 10, 12, 15])
def test_save_state_and_load_state_hold_a_registered_adapter(stop, moment, tmp_path, weights, assert_same_bits):
    rule = by_hand.RULES["GradientAmplification"]
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(str(tmp_path)))
    parts = prepared(accelerator, rule, by_hand.momentum, moment)
    accelerator.register_for_checkpointing(parts[-1])
    train(accelerator, *parts, last=stop)
    accelerator.save_state(tmp_path / "checkpoint")
    train(accelerator, *parts, first=stop)
    forget()

    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(str(tmp_path)))
    again = prepared(accelerator, rule, by_hand.momentum, moment)
    nn.init.zeros_(again[0].first.weight)
    accelerator.register_for_checkpointing(again[-1])
    accelerator.load_state(tmp_path / "checkpoint")
    assert again[-1].epoch == stop // by_hand.BATCHES + 1
    train(accelerator, *again, first=stop)
    assert_same_bits(weights(again[0]), weights(parts[0]))
    assert again[-1].get_last_selection() == parts[-1].get_last_selection()
