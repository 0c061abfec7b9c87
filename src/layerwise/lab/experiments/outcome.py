"""What came of an experiment, and how it was carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.results import Results
from layerwise.lab.runs.records import Record
from layerwise.lab.training.devices import check_device

if TYPE_CHECKING:
    from layerwise.lab.experiments.pool import Failure

LARGEST_JOBS = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is carried out.

    Attributes:
        out: folder of the runs and the reports.
        data_dir: folder of the data, or None.
        jobs: processes side by side; None for one a GPU, and on the CPU for as many as the cores take.
        threads: of each process; None for the plan's, which is 1. Another number rounds otherwise: other runs.
        device: where networks are trained.
        engine: ``"local"`` or ``"ray"``.
        address: of the Ray cluster; None starts one here.
    """

    out: Path = Path("runs")
    data_dir: Path | None = None
    jobs: int | None = None
    threads: int | None = None
    device: str = "cpu"
    engine: str = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and not 1 <= self.jobs <= LARGEST_JOBS:
            raise UsageError(
                f"jobs={self.jobs!r}: must be from 1 to {LARGEST_JOBS}; leave --jobs out to use every core or GPU"
            )
        if self.threads is not None and not 1 <= self.threads <= LARGEST_JOBS:
            raise UsageError(f"threads={self.threads!r}: must be from 1 to {LARGEST_JOBS}")
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"out={str(self.out)!r} is a file: give a folder, or a name that does not exist yet")
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine={self.engine!r}: use 'local' or 'ray'")
        check_device(self.device, here=self.engine == "local")


class Display:
    """Where an experiment says what happens; this one says nothing."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """The plan is made and the finished runs are found."""

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """A worker has done so many updates of a run."""

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """A run is finished with this result, in words."""

    def stopping(self) -> None:
        """The person has interrupted it; runs at work write their checkpoints."""

    def say(self, words: str) -> None:
        """Something came up that the person is to know."""

    def end(self) -> None:
        """No run is worked on any more."""


@dataclass
class Outcome:
    """What came of an experiment.

    Attributes:
        plan: what was to be done.
        settings: how.
        results: the finished runs.
        found: runs that were finished before.
        set_aside: broken files that were renamed.
        failures: runs that failed.
        alike: every arm's first run failed in the same way, so that no further one was begun.
        skipped: runs that another process works on.
        interrupted: the person stopped it.
        seconds: wall clock time.
        jobs: number of processes.
    """

    plan: Plan
    settings: Settings
    results: Results
    found: int = 0
    set_aside: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    alike: bool = False
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    jobs: int = 1

    @property
    def planned(self) -> int:
        """Number of runs of the whole plan."""
        return len(self.plan.runs)

    @property
    def not_begun(self) -> int:
        """Number of runs that were not begun because those before them had all failed in the same way."""
        failed = {failure.doing for failure in self.failures}
        left = [run for run in self.plan.runs if run.key not in self.results.records and run.label not in failed]
        return len(left) if self.alike else 0

    def causes(self) -> list[list[Failure]]:
        """Put the failures of one cause together."""
        found: dict[str, list[Failure]] = {}
        for failure in self.failures:
            found.setdefault(failure.kind, []).append(failure)
        return list(found.values())

    @property
    def complete(self) -> bool:
        """Every run is finished."""
        return len(self.results.records) == self.planned

    @property
    def folder(self) -> Path:
        """Folder of the report, the tables and the figures."""
        return self.settings.out / self.plan.name

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.folder / "report.html"

    @property
    def exit_code(self) -> int:
        """0, 1 if a run failed or is left, 130 if interrupted."""
        return 130 if self.interrupted else 0 if self.complete else 1

    def result_words(self, record: Record) -> str:
        """Say what came of a run."""
        quantity = self.plan.quantity
        if record.diverged:
            return "diverged"
        if quantity.name == "seconds":
            return f"{record.summary['seconds']:.0f} s"
        value = record.summary["finals"].get(quantity.name)
        return "no result" if value is None else f"{value:.4g} {quantity.unit} {quantity.words}".replace("  ", " ")
