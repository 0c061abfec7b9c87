"""What a worker of the demo does: the arms of one solver and one seed, in order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from layerwise.lab import data
from layerwise.lab.pool import Link
from layerwise.lab.training import Run, StoppedError, train


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
    """A run is finished."""

    run: Run
    record: dict[str, object]


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
        dataset = data.load(run.dataset, job.data_dir)
        try:
            record = train(run, dataset, link.stopped, lambda done, name=run.name: link.send(Advance(name, done)))
        except StoppedError:
            return
        if run.arm == "layer-adaptive":
            mean_factor = record["factor"]["mean"]  # type: ignore[index]
        link.send(Finished(run, record))
