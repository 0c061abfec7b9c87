"""Rules that remember: their state through steps, epochs and files; and what a rule may be."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

from layerwise.rules import Constant, LayerAdaptive, Rule

FACTORS = {"0": 0.5, "2": 3.0, "4": 1.0}


def layer_norm(module):
    return math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))


class Ramp(Rule):
    """A rule of ten lines: the step's number, times ten after the first epoch."""

    needs = ("counts",)

    def init(self, layers, device):
        return {"steps": torch.zeros(len(layers)), "scale": torch.ones(()), "epochs": 0}

    def factors(self, statistics, state):
        steps = state["steps"] + statistics.counts
        return steps * state["scale"], {**state, "steps": steps}

    def end_epoch(self, state):
        return {**state, "scale": state["scale"] * 10, "epochs": state["epochs"] + 1}


def test_a_rule_of_ten_lines_works_and_counts_epochs(setup, train):
    model, optimizer, adapter = setup(Ramp())
    assert adapter.epoch == 1
    train(model, optimizer, 2)
    assert adapter.get_last_factors() == dict.fromkeys(FACTORS, 2.0)
    adapter.end_epoch()
    assert adapter.epoch == 2
    train(model, optimizer, 1)
    assert adapter.get_last_factors() == dict.fromkeys(FACTORS, 30.0)


def test_a_rule_of_one_method_is_enough(setup, train, backward):
    class InverseNorm(Rule):
        def factors(self, statistics, state):
            return 1 / statistics.gradient_norm, state

    model, optimizer, adapter = setup(InverseNorm())
    backward(model)
    expected = {name: 1 / layer_norm(model[int(name)]) for name in FACTORS}
    optimizer.step()
    assert adapter.get_last_factors() == pytest.approx(expected)


def test_the_state_goes_through_a_file_and_training_continues_to_the_bit(setup, train, weights, assert_same_bits):
    model, optimizer, adapter = setup(Ramp())
    train(model, optimizer)
    adapter.end_epoch()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), adapter.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, first=3)

    resumed, fresh, again = setup(Ramp())
    for thing, state in zip((resumed, fresh, again), saved, strict=True):
        thing.load_state_dict(state)
    assert again.epoch == 2
    train(resumed, fresh, first=3)
    assert_same_bits(weights(resumed), weights(model))
    assert_same_bits(again.state_dict()["state"], adapter.state_dict()["state"])
    assert saved[2]["state"]["steps"].tolist() == [3.0] * 3, "what was saved must not move on with the training"


def test_a_state_of_other_layers_or_of_something_else_is_refused_and_changes_nothing(setup, assert_same_bits):
    _, _, adapter = setup(Ramp())
    before = adapter.state_dict()
    good = {**copy.deepcopy(before), "epoch": 7}
    for bad, error, message in (
        (None, TypeError, "must be what state_dict"),
        ({}, ValueError, "no state of a LayerwiseLR"),
        ({**good, "layers": ["0"]}, ValueError, r"layers \['0'\], this adapter has \['0', '2', '4'\]"),
        ({**good, "state": {}}, ValueError, "attach the same rule"),
        (
            {**good, "state": {**good["state"], "steps": torch.zeros(2)}},
            ValueError,
            r"shape \(2,\) in the file",
        ),
        ({**good, "version": 2}, ValueError, "version"),
    ):
        with pytest.raises(error, match=message):
            adapter.load_state_dict(bad)
        assert adapter.epoch == 1
        assert_same_bits(adapter.state_dict()["state"], before["state"])


def test_a_state_of_other_factors_never_replaces_the_given_ones_in_silence(setup, train):
    _, _, saved = setup(Constant({"0": 2.0}))
    model, optimizer, adapter = setup(Constant({"0": 3.0}))
    try:
        adapter.load_state_dict(saved.state_dict())
    except ValueError:
        return
    train(model, optimizer, 1)
    assert adapter.get_last_factors()["0"] == 3.0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_adapter_is_none_and_says_what_to_do(setup, duplicate):
    _, _, adapter = setup(LayerAdaptive())
    with pytest.warns(UserWarning, match=r"attach a new one to the copy.*state_dict\(\)"):
        assert duplicate(adapter) is None


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, 1), torch.ones(()), [1.0, 1.0, 1.0]], ids=str)
def test_a_rule_that_returns_the_wrong_shape_is_told_so_before_anything_moves(
    setup, backward, weights, assert_same_bits, wrong
):
    class Wrong(Rule):
        def factors(self, statistics, state):
            return wrong, state

    model, optimizer, _ = setup(Wrong())
    before = weights(model)
    backward(model)
    with pytest.raises(ValueError, match=r"returned factors of shape .*; return a tensor of shape \(3,\)"):
        optimizer.step()
    assert_same_bits(weights(model), before)
