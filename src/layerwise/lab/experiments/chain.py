"""What a worker is given to do, and what it tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerwise.lab.experiments import controls
from layerwise.lab.experiments.plan import PlannedRun
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.records import Record
from layerwise.lab.training.snapshots import CHECKPOINT_SECONDS


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Runs that one worker does in order: controls come after the method's run that they need.

    Attributes:
        runs: in order; those that are finished are only read.
        out: the folder of ``--out``.
        data_dir: folder of the data, or None.
        device: where networks are trained.
        loaders: processes beside this one that decode photographs ahead.
        checkpoint_seconds: between two checkpoints.
        labels: what run.json says of the experiment, by which a report of any runs knows what they were judged by.
    """

    runs: tuple[PlannedRun, ...]
    out: Path
    data_dir: Path | None = None
    device: str = "cpu"
    loaders: int = 0
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.runs[0].label

    @property
    def threads(self) -> int:
        """Threads of the process that does it: part of what its runs are, as another number rounds otherwise."""
        return self.runs[0].configuration.threads

    def rest(self, doing: str) -> Chain | None:
        """Give what can still be done when the process has died in one of the runs.

        Args:
            doing: what that run is called.

        Returns:
            The chain without it; None if nothing is left, or nothing that does not need it.
        """
        left = tuple(run for run in self.runs if run.label != doing)
        # Controls need the method's run, which is the first.
        return replace(self, runs=left) if left[:1] == self.runs[:1] and 1 < len(left) < len(self.runs) else None


@dataclass(frozen=True)
class Advance:
    """A run has done so many of its updates; the whole number is None where it is not known beforehand."""

    run: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Memory:
    """A run has done its first updates with so many bytes of a device that has so many."""

    used: int
    whole: int


@dataclass(frozen=True)
class Finished:
    """A run is finished: its key, and its configuration, by which its record is found."""

    key: tuple[str, str, int]
    configuration: Configuration


@dataclass(frozen=True)
class Skipped:
    """A run was not done, and why: another process works on it."""

    key: tuple[str, str, int]
    reason: str


def complete(planned: PlannedRun, method: Record | None) -> Configuration | None:
    """Give the configuration of a run; of a control only if its method's run is finished, else None."""
    if planned.arm.control is None:
        return planned.configuration
    if method is None:
        return None
    return controls.configuration_of_control(planned.configuration, planned.arm.control, method)
