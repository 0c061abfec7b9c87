"""What workers do and say, and the work of the LeNet demo: the arms of one solver and one seed, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.lab import data
from layerwise.lab.data import Dataset
from layerwise.lab.evaluation import StoppedError
from layerwise.lab.pool import Link
from layerwise.lab.training import Run, train


@dataclass(frozen=True)
class Job:
    """The runs of one solver and one seed that are still to be done.

    Attributes:
        runs: in the order of the arms.
        data_dir: folder that holds MNIST, or None.
        mean_factor: of the layer-adaptive run of this solver and seed if that is finished already, else None.
            The base rate of the control is multiplied by it.
    """

    runs: tuple[Run, ...]
    data_dir: Path | None = None
    mean_factor: float | None = None

    @property
    def name(self) -> str:
        """Solver and seed, for example ``sgd seed 0``."""
        return f"{self.runs[0].solver} seed {self.runs[0].seed}"


@dataclass(frozen=True)
class Advance:
    """A run has done so many of its iterations."""

    run: str
    done: int


@dataclass(frozen=True)
class Finished:
    """A run is finished; it has a name and the key of its record."""

    run: Any
    record: dict[str, object]


Train = Callable[[Any, Dataset, Callable[[], bool], Callable[[int], None]], dict[str, object]]
"""Does a run on its data: asks whether to stop, and says how many iterations are done."""


def do_run(run: Any, dataset: Dataset, train: Train, link: Link) -> dict[str, object] | None:
    """Do one run; send ``Advance`` now and then, and ``Finished``.

    Args:
        run: what to do.
        dataset: its data.
        train: does it.
        link: where messages go and a stop comes from.

    Returns:
        The run's record, or None if it was stopped.
    """
    try:
        record = train(run, dataset, link.stopped, lambda done: link.send(Advance(run.name, done)))
    except StoppedError:
        return None
    link.send(Finished(run, record))
    return record


def do_job(job: Job, link: Link) -> None:
    """Do the runs of a job one after another on one thread; send ``Advance`` now and then, ``Finished`` each.

    Args:
        job: what to do.
        link: where messages go and a stop comes from.
    """
    torch.set_num_threads(1)
    mean_factor = job.mean_factor
    for run in job.runs:
        link.doing(run.name)
        if run.arm == "control":
            if mean_factor is None:
                raise ValueError(f"{run.name} needs the layer-adaptive run before it")
            run = replace(run, rate_factor=mean_factor)
        record = do_run(run, data.load(run.dataset, job.data_dir), train, link)
        if record is None:
            return
        if run.arm == "layer-adaptive":
            mean_factor = record["factor"]["mean"]  # type: ignore[index]
