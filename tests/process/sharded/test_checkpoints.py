"""Training goes on from a distributed checkpoint with another number of processes, in an epoch of analysis too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise

from .cases import CASES, STEPS, attach, loss_of, network, selection_of
from .processes import run
from .training import WAYS, fsdp2, part_of, whole_weights

NAMES = ["amplification by G", "amplification by G'", "LayerFreezing"]


def begin(rank: int, name: str, folder: str, steps: int, asynchronous: bool) -> None:
    """Train for some steps and save."""
    model = fsdp2(network())
    optimizer = CASES[name].optimizer(model.parameters())
    adapter = attach(CASES[name], model, optimizer)
    train(rank, model, optimizer, adapter, range(steps))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "adapter": adapter.state_dict()}
    if asynchronous:
        own_group = torch.distributed.new_group(backend="gloo")  # it talks while the training does
        saving: Any = checkpoints.async_save(state, checkpoint_id=folder, process_group=own_group)
        # What training changes meanwhile is not what was saved.
        train(rank, model, optimizer, adapter, range(steps, steps + 1))
        saving.result()
    else:
        checkpoints.save(state, checkpoint_id=folder)


def go_on(rank: int, name: str, folder: str, steps: int) -> Any:
    """Load, and train to the end."""
    model = network()
    if torch.distributed.get_world_size() > 1:
        model = fsdp2(model)
    optimizer = CASES[name].optimizer(model.parameters())
    adapter = attach(CASES[name], model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoints.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    layerwise.load_checkpoint(adapter, folder)
    train(rank, model, optimizer, adapter, range(steps, STEPS))
    return whole_weights(model), selection_of(adapter), adapter.epoch


def go_on_to_the_end_of_the_epoch(rank: int, way: str, name: str, folder: str) -> Any:
    """Load what was saved just before the end of the first epoch, and end it."""
    model = WAYS[way](network())
    optimizer = CASES[name].optimizer(model.parameters())
    adapter = attach(CASES[name], model, optimizer)
    layerwise.load_checkpoint(adapter, folder)
    adapter.end_epoch()
    return selection_of(adapter)


def save_before_the_end_of_the_epoch(rank: int, way: str, name: str, folder: str) -> Any:
    """Train an epoch of analysis, save, and end it."""
    model = WAYS[way](network())
    optimizer = CASES[name].optimizer(model.parameters())
    adapter = attach(CASES[name], model, optimizer)
    part, parts = part_of(way, rank)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, part, parts).backward()
        optimizer.step()
    checkpoints.save({"adapter": adapter}, checkpoint_id=folder)
    adapter.end_epoch()
    return selection_of(adapter)


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("way", ["FSDP2", "FSDP2 and tensor parallel"])
def test_sums_with_empty_pieces_are_whole_when_they_are_loaded(name, way, tmp_path):
    saved = run(4, save_before_the_end_of_the_epoch, way, name, str(tmp_path))
    for selection in run(4, go_on_to_the_end_of_the_epoch, way, name, str(tmp_path)):
        assert selection == saved[0]


def train(rank: int, model: Any, optimizer: Any, adapter: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank, torch.distributed.get_world_size()).backward()
        optimizer.step()
        if step % 3 == 2:
            adapter.end_epoch()


@pytest.mark.pairwise
@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 3)])
@pytest.mark.parametrize("steps", [2, 4], ids=["in the first epoch", "in the second"])
def test_training_goes_on_with_another_number_of_processes(name, before, after, steps, tmp_path):
    run(before, begin, name, str(tmp_path), steps, steps == 2)
    (expected,) = run(1, whole, name)
    for weights, selection, epoch in run(after, go_on, name, str(tmp_path), steps):
        for key, weight in expected[0].items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-10, atol=1e-12, msg=key)
        assert [row[2] for row in selection] == [row[2] for row in expected[1]]
        assert [row[0] for row in selection] == pytest.approx([row[0] for row in expected[1]], rel=1e-9, nan_ok=True)
        assert epoch == expected[2] == 3


def whole(rank: int, name: str) -> Any:
    """Train without a break in one process."""
    model = network()
    optimizer = CASES[name].optimizer(model.parameters())
    adapter = attach(CASES[name], model, optimizer)
    train(rank, model, optimizer, adapter, range(STEPS))
    return whole_weights(model), selection_of(adapter), adapter.epoch
