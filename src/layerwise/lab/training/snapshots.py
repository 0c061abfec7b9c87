"""What a checkpoint of a training holds: everything that the rest of it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.lab.training.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from layerwise.lab.training.engine import Training

CHECKPOINT_SECONDS = 60.0
"""Seconds between two checkpoints: what a killed run loses at most, and the time of one update or test."""


def state_of(training: Training) -> dict[str, Any]:
    """Give the state of a training; of several processes all must ask.

    Args:
        training: between two updates.

    Returns:
        What ``restore`` takes, as ``RunFolder.save_checkpoint`` writes it.
    """
    # Only fetched: were they looked at, after which update a divergence ends the run would depend on checkpoints.
    training.fetch_losses()
    trial, adapter, position = training.trial, training.adapter, training.position
    return {
        "model": trial.model.state_dict(),
        "optimizer": trial.optimizer.state_dict(),
        "scheduler": None if trial.scheduler is None else trial.scheduler.state_dict(),
        "adapter": None if adapter is None else adapter.state_dict(),
        "recorder": training.recorder.state_dict(),
        "position": [position.iteration, position.epoch, position.batch],
        "tests": training.tested_at,
        "diverged_at": training.diverged_at,
        "losses": list(training.losses),
        "metric": list(training.metric),
        "selections": training.selections,
        "seconds": [training.seconds, training.test_seconds],
        "sessions": training.sessions,
        "processes": training.counts,
        "random": training.processes.gather(random_state()),
    }


def restore(training: Training, state: Mapping[str, Any]) -> None:
    """Let a training go on from a state.

    Args:
        training: newly made.
        state: from ``state_of``.
    """
    trial, position, rank = training.trial, training.position, training.processes.rank
    trial.model.load_state_dict(state["model"])
    trial.optimizer.load_state_dict(state["optimizer"])
    if trial.scheduler is not None:
        trial.scheduler.load_state_dict(state["scheduler"])
    if training.adapter is not None:
        training.adapter.load_state_dict(state["adapter"])
    training.recorder.load_state_dict(state["recorder"])
    position.iteration, position.epoch, position.batch = state["position"]
    training.tested_at, training.diverged_at = state["tests"], state["diverged_at"]
    training.losses = list(state.get("losses", ()))
    training.metric = list(state.get("metric", (0.0, 0)))
    training.selections = list(state["selections"])
    training.seconds, training.test_seconds = state["seconds"]
    training.sessions = state["sessions"] + 1
    training.counts = list(dict.fromkeys([*state.get("processes", [1]), training.processes.count]))
    if rank < len(state["random"]):  # more processes than before begin with numbers of their own
        set_random_state(state["random"][rank])
