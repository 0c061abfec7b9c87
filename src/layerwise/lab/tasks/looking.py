"""Trying each part of a user's task once, so that mistakes are found before anything is trained."""

from __future__ import annotations

import copy
import math
import multiprocessing
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from layerwise.lab.errors import UsageError
from layerwise.lab.tasks.guests import Stream, same, seed_of
from layerwise.lab.tasks.hosting import Host, length_of
from layerwise.lab.training.trial import Trial

if TYPE_CHECKING:
    from layerwise.lab.tasks.task import Task

DIRECTIONS = {"accuracy": True, "error": False, "loss": False, "perplexity": False}
"""Word in the name of a metric -> whether higher is better."""

RECORDS = 40
"""Records of the layers' norms that a run has about, if that is fewer than one in 50 updates."""

LARGEST_INTERVAL = 50


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at a task found.

    Attributes:
        trial: of seed 0, untrained.
        metric: name of what is judged.
        value: of it, untrained.
        higher_is_better: which way is better.
        has_validation: whether there is a validation for tuning.
        metric_seconds: that the metric took.
        spawned: why a loader's workers, which are forked here, cannot be spawned; "" where they can, or were not tried.
    """

    trial: Trial
    metric: str
    value: float
    higher_is_better: bool
    has_validation: bool
    metric_seconds: float
    spawned: str = ""

    @property
    def layers_every(self) -> int:
        """Updates between two records of the layers' norms."""
        total = self.trial.total
        return LARGEST_INTERVAL if total is None else min(LARGEST_INTERVAL, max(1, total // RECORDS))

    @property
    def tests(self) -> int:
        """Calls of the metric in a run."""
        trial = self.trial
        if trial.test_every is None or trial.total is None:
            return trial.epochs or 1
        return trial.total // trial.test_every + 1


def look(task: Task, host: Host, *, validation: bool = False, spawned: bool = False) -> Look:
    """Try batches, loss and metric.

    Args:
        task: checked.
        host: that takes it.
        validation: whether ``validation`` is tried, and must be there.
        spawned: whether a batch is drawn by a spawned worker too, where the loader's are forked.

    Returns:
        What was found.

    Raises:
        UsageError: a part is not as it must be.
    """
    with Stream(seed_of(0, "epoch", 1)), host.guest.at_work("batches of epoch 1"):
        source = host.source(task.batches, 1)
        length = length_of(source)
    trial = host.trial(task, layers_every=1, length=length)
    batch = _first(trial, 1)
    if not same(batch, _first(trial, 1)):
        raise host.guest.refuse(
            "batches gives other batches when epoch 1 is asked for twice, so a run that goes on from a checkpoint "
            "would see others: draw from torch's, Python's or NumPy's global generator, which the lab seeds for each "
            "epoch, or make the generator inside of batches(epoch), of seed and epoch"
        )
    if (trial.epochs or 0) > 1 or (trial.iterations is not None and length is not None and length < trial.iterations):
        _first(trial, 2)
    trial.loss(trial.model, trial.prepare(batch))
    began = time.perf_counter()
    values = host.metric(task, trial.model)
    seconds = time.perf_counter() - began
    name, value = next(iter(values.items()))
    _check_finite(name, value, host)
    better = _direction(task, name)
    if better is None:
        raise host.guest.refuse(
            f"higher_is_better is not given, and the name {name!r} does not tell: return higher_is_better=True or False"
        )
    if validation:
        _check_finite("validation", host.validation(task, trial.model), host)
    return Look(
        trial=trial,
        metric=name,
        value=value,
        higher_is_better=better,
        has_validation=task.validation is not None,
        metric_seconds=seconds,
        spawned=_spawned(source, host) if spawned else "",
    )


def _spawned(source: Any, host: Host) -> str:
    """Draw a batch with a spawned worker where a loader's workers are forked; return the error, or ""."""
    if not isinstance(source, DataLoader) or not source.num_workers:
        return ""
    context: Any = source.multiprocessing_context or multiprocessing
    if context.get_start_method() != "fork":
        return ""
    loader = copy.copy(source)
    loader.num_workers, loader.multiprocessing_context = 1, "spawn"
    try:
        with Stream(seed_of(0, "epoch", 1)), host.guest.at_work("a batch of a spawned worker"):
            next(host.begun(loader))
    except UsageError as error:
        return str(error)
    return ""


def _check_finite(name: str, value: float, host: Host) -> None:
    """Refuse a number of the untrained model that says nothing."""
    if not math.isfinite(value):
        raise host.guest.refuse(
            f"{name} is {value} of the untrained model: return a finite one; later such a number counts as divergence"
        )


def _first(trial: Trial, epoch: int) -> Any:
    """Give the first batch of an epoch; one without any raises."""
    return next(iter(trial.batches(epoch, 0)))


def _direction(task: Task, name: str) -> bool | None:
    """Say which way is better; None where neither the task nor the name tells."""
    if task.higher_is_better is not None:
        return task.higher_is_better
    found = {better for word, better in DIRECTIONS.items() if word in name.lower()}
    return found.pop() if len(found) == 1 else None
