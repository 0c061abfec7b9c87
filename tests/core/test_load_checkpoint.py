"""Loading an adapter out of a distributed checkpoint; `tests/sharded` does it with several processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as checkpoints

import layerwise
from layerwise.rules import Directionality, GradientAmplification, LayerAdaptive, Phase, chain

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable)", "ignore:TypedStorage is deprecated"
)


def amplification(measure):
    return chain(LayerAdaptive(), GradientAmplification(Directionality(measure, threshold=0.0), [Phase(2, True)]))


def take_steps(model, optimizer, backward, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def test_sums_that_are_there_already_go_where_the_checkpoint_has_none(setup, backward, tmp_path):
    _, _, saved = setup(amplification("G"))
    saved.end_epoch()
    saved.end_epoch()
    checkpoints.save({"adapter": saved}, checkpoint_id=tmp_path)
    model, optimizer, adapter = setup(amplification("G"))
    take_steps(model, optimizer, backward, range(2))
    layerwise.load_checkpoint(adapter, tmp_path)
    assert adapter.epoch == 3
    assert adapter.state_dict()["state"]["1"]["sums"] == {}


@pytest.mark.parametrize("measure", ["G", "G_prime"])
def test_the_sums_of_half_an_epoch_are_loaded(measure, setup, backward, weights, assert_same_bits, tmp_path):
    model, optimizer, adapter = setup(amplification(measure))
    take_steps(model, optimizer, backward, range(2))
    everything = {"adapter": adapter, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoints.save(everything, checkpoint_id=tmp_path / "distributed")
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "plain")
    take_steps(model, optimizer, backward, range(2, 4))
    adapter.end_epoch()
    take_steps(model, optimizer, backward, range(4, 6))

    resumed, other, fresh = setup(amplification(measure))
    for whole, state in zip((resumed, other), torch.load(tmp_path / "plain"), strict=True):
        whole.load_state_dict(state)
    layerwise.load_checkpoint(fresh, tmp_path / "distributed")
    take_steps(resumed, other, backward, range(2, 4))
    fresh.end_epoch()
    take_steps(resumed, other, backward, range(4, 6))
    assert_same_bits(weights(resumed), weights(model))
    assert fresh.get_last_selection() == adapter.get_last_selection()


def test_an_unknown_key_is_named(setup, tmp_path):
    _, _, adapter = setup(LayerAdaptive())
    checkpoints.save({"rates": adapter}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="no key='adapter'; it holds rates"):
        layerwise.load_checkpoint(adapter, tmp_path)


def test_the_state_of_another_rule_is_refused_and_changes_nothing(setup, tmp_path):
    _, _, adapter = setup(LayerAdaptive())
    checkpoints.save({"adapter": adapter}, checkpoint_id=tmp_path)
    _, _, other = setup(amplification("G"))
    before = other.state_dict()["epoch"]
    with pytest.raises(ValueError, match="attach the same rule"):
        layerwise.load_checkpoint(other, tmp_path)
    assert other.epoch == before
