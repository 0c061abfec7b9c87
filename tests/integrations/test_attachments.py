"""What the callbacks have in common, and what happens without their frameworks."""

from __future__ import annotations

import importlib
import importlib.abc
import sys

import by_hand
import pytest
import torch

from layerwise.integrations.attachments import Attachments
from layerwise.rules import Constant, LayerAdaptive

AMPLIFICATION = by_hand.RULES["GradientAmplification"]


def attached(rule, *, epoch=0, step=0, log_every=None, state=None, **arguments):
    model = by_hand.network()
    optimizer = by_hand.momentum(model.parameters())
    attachments = Attachments(rule, log_every, **arguments)
    if state is not None:
        attachments.load_state_dict(state)
    attachments.attach([optimizer], model, epoch=epoch, step=step)
    return model, optimizer, attachments


def step(model, optimizer, number):
    optimizer.zero_grad()
    by_hand.loss_of(model, by_hand.batches()[number]).backward()
    optimizer.step()


@pytest.mark.parametrize("moment", ["before attaching", "after attaching"])
def test_a_state_is_taken_over(moment, assert_same_bits):
    model, optimizer, attachments = attached(AMPLIFICATION)
    attachments.end_epochs(1)
    step(model, optimizer, 0)
    state = attachments.state_dict()
    assert state["adapters"][0]["state"]["sums"]["signed"], "the epoch of analysis must be under way"
    _, _, others = attached(AMPLIFICATION, epoch=1, state=state if moment == "before attaching" else None)
    if moment == "after attaching":
        others.load_state_dict(state)
    assert others.ended_epochs == 1
    assert others.adapters[0].epoch == 2
    (one,), (other,) = others.state_dict()["adapters"], state["adapters"]
    assert_same_bits(one["state"], other["state"])
    others.end_epochs(2)
    assert others.state_dict()["adapters"][0]["epoch"] == 3, "no longer the state that was taken over"


def test_a_state_that_waits_is_the_state():
    _, _, attachments = attached(AMPLIFICATION)
    waiting = Attachments(AMPLIFICATION, None)
    assert waiting.state_dict() == {}
    waiting.load_state_dict(attachments.state_dict())
    assert waiting.state_dict().keys() == attachments.state_dict().keys()


def test_epochs_are_ended_once_however_often_they_are_told():
    _, _, attachments = attached(AMPLIFICATION, epoch=5)
    assert attachments.ended_epochs == 5
    for ended in (5, 6, 6, 5, 8):
        attachments.end_epochs(ended)
    assert attachments.ended_epochs == 8
    assert attachments.adapters[0].epoch == 4
    Attachments(AMPLIFICATION, None).end_epochs(3)  # nothing is attached


def test_states_of_more_optimizers_are_refused_and_nothing_stays_attached():
    model, optimizer, attachments = attached(LayerAdaptive())
    state = attachments.state_dict()
    state["adapters"] *= 2
    attachments.detach()
    attachments.load_state_dict(state)
    with pytest.raises(ValueError, match="saved for 2 optimizers, this training has 1"):
        attachments.attach([optimizer], model, epoch=0, step=0)
    assert not optimizer._optimizer_step_pre_hooks


def test_attaching_again_replaces_the_adapters():
    model, optimizer, attachments = attached(Constant({"first": 2.0}))
    before = model.first.weight.detach().clone()
    attachments.attach([optimizer], model, epoch=0, step=0)
    step(model, optimizer, 0)
    gradient = model.first.weight.grad + 0.01 * before
    torch.testing.assert_close(model.first.weight.detach(), before - 0.1 * 2 * gradient)


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 7]), (2, [2, 7]), (3, [3, 7]), (5, [7]), (8, []), (None, [])])
def test_logs_are_due_at_multiples_and_after_those_that_were_passed_over(every, due):
    attachments = Attachments(LayerAdaptive(), every)
    assert [number for number in (0, 1, 2, 2, 3, 7) if attachments.is_due(number)] == due


def test_logs_of_a_resumed_training_are_due_at_the_same_steps():
    _, _, attachments = attached(LayerAdaptive(), step=7, log_every=5)
    assert [number for number in range(7, 16) if attachments.is_due(number)] == [10, 15]


def test_names_of_logs_tell_the_parts_of_a_layer_and_the_root_apart():
    model = torch.nn.Linear(3, 2)
    optimizers = [torch.optim.SGD([p], lr=lr) for p, lr in zip(model.parameters(), (0.1, 0.2), strict=True)]
    attachments = Attachments(Constant({"": 3.0}), None)
    attachments.attach(optimizers, model, epoch=0, step=0)
    model(torch.ones(1, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert attachments.read() == {
        "layerwise/lr/root": pytest.approx(0.3),
        "layerwise/factor/root": 3.0,
        "layerwise/lr/root_2": pytest.approx(0.6),
        "layerwise/factor/root_2": 3.0,
    }


@pytest.mark.parametrize(
    ("rule", "remembers"), [(LayerAdaptive(), False), (Constant({"head": 2.0}), False), (AMPLIFICATION, True)]
)
@pytest.mark.parametrize("bounds", [None, (0.1, 10.0)])
def test_it_knows_which_rules_remember_something(rule, remembers, bounds):
    _, _, attachments = attached(rule, bounds=bounds)
    assert attachments.keep_state is remembers


def test_wrong_arguments_are_refused_when_the_callback_is_made():
    with pytest.raises(TypeError, match=r"rule=LayerAdaptive is a class; call it: LayerAdaptive\(…\)"):
        Attachments(LayerAdaptive, None)
    with pytest.raises(ValueError, match="log_every=0 must be a whole number of at least 1"):
        Attachments(LayerAdaptive(), 0)


MISSING = {"lightning": ("lightning", "pytorch_lightning"), "transformers": ("transformers",)}


@pytest.mark.parametrize(("module", "packages"), MISSING.items(), ids=MISSING)
def test_without_the_framework_the_error_says_what_to_install(module, packages, monkeypatch):
    class NotInstalled(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name in packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    for name in (*packages, "lightning.pytorch", f"layerwise.integrations.{module}"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"not installed: pip install -e '\.\[{module}\]'"):
        importlib.import_module(f"layerwise.integrations.{module}")
