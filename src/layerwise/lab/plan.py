"""What every demo does: settings, the outcome, and the runs side by side, each written to its file as it ends."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.jobs import Advance, Finished
from layerwise.lab.pool import Failure, Interrupt, Link, NamedJob, run_jobs
from layerwise.lab.store import RunStore, usable_cores, write_whole

LARGEST_SEEDS = 1000
LARGEST_JOBS = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a demo is asked to do.

    Attributes:
        out: folder of the report and the runs.
        data_dir: folder that may hold the full data, or None.
        seeds: number of seeds; they are 0, 1, ...
        jobs: number of processes, or None for the number of usable cores.
    """

    out: Path = Path("runs")
    data_dir: Path | None = None
    seeds: int = 5
    jobs: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= LARGEST_SEEDS:
            raise UsageError(
                f"seeds={self.seeds!r}: must be from 1 to {LARGEST_SEEDS}; "
                "the default, --seeds 5, is the fewest that can show a difference"
            )
        if self.jobs is not None and not 1 <= self.jobs <= LARGEST_JOBS:
            raise UsageError(
                f"jobs={self.jobs!r}: must be from 1 to {LARGEST_JOBS}; leave --jobs out to use every core"
            )
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"out={str(self.out)!r} is a file: give a folder, or a name that does not exist yet")


class Display:
    """Where a demo says what happens; this one says nothing."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """The plan is made and the finished runs are found."""

    def advance(self, worker: int, run: str, done: int) -> None:
        """A worker has done so many iterations of a run."""

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """A run is finished with this result, in words."""

    def end(self) -> None:
        """No run is worked on any more."""


@dataclass
class Outcome:
    """What came of a demo; each demo has its own kind.

    Attributes:
        settings: what was asked.
        dataset: name of the data set.
        title: what it is, in words.
        test_count: number of test images.
        protocol: how long the runs were.
        results: the finished runs.
        found: runs that were finished before.
        set_aside: broken files that were renamed.
        failures: jobs that failed.
        interrupted: the person stopped it.
        seconds: wall clock time.
        jobs: number of processes.
    """

    settings: Any
    dataset: str
    title: str
    test_count: int
    protocol: Any
    results: Any
    found: int = 0
    set_aside: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    jobs: int = 1

    name = "demo"
    """Folder of the runs inside ``settings.out``."""

    report_name = "report.html"
    """File of the report inside ``settings.out``."""

    subject = ""
    """The network, in words."""

    @property
    def planned(self) -> int:
        """Number of runs of the whole plan."""
        raise NotImplementedError

    @property
    def run_length(self) -> int:
        """Iterations of one run."""
        raise NotImplementedError

    @property
    def run_words(self) -> str:
        """The length of a run in words."""
        return f"{self.run_length:,} iterations"

    def result_words(self, record: dict[str, Any]) -> str:
        """Say what came of a run."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Folder of the runs."""
        return self.settings.out / self.name

    @property
    def renamed(self) -> list[Path]:
        """New names of the broken files that were set aside."""
        return [path.with_name(path.name + ".broken") for path in self.set_aside]

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.settings.out / self.report_name

    @property
    def exit_code(self) -> int:
        """0, 1 if a job failed, 130 if interrupted."""
        return 130 if self.interrupted else 1 if self.failures else 0


def carry_out(
    outcome: Outcome,
    store: RunStore,
    pending: Callable[[], Sequence[NamedJob]],
    work: Callable[[Any, Link], None],
    display: Display,
) -> None:
    """Do the runs that are not finished yet, and write each to its file as it ends.

    Args:
        outcome: of the demo; its runs, failures and times are filled in.
        store: the folder of the runs.
        pending: loads the finished runs into the outcome and gives the jobs that are left.
        work: does a job; it sends ``Advance`` and ``Finished``.
        display: told what happens.
    """
    clock = time.perf_counter()
    store.clear_leftovers()
    jobs = pending()
    outcome.set_aside = store.set_aside
    outcome.jobs = max(1, min(outcome.settings.jobs or usable_cores(), len(jobs)))

    def on_message(worker: int, message: object) -> None:
        if isinstance(message, Advance):
            display.advance(worker, message.run, message.done)
        elif isinstance(message, Finished):
            run = message.run
            record = store.save(run.name, message.record)
            outcome.results.records[run.key] = record
            display.finished(worker, run.name, outcome.result_words(record), record["diverged_at"] is not None)

    with Interrupt() as interrupt:
        display.begin(outcome, outcome.jobs)
        try:
            outcome.failures = run_jobs(
                work, jobs, outcome.jobs, on_message=on_message, stop=lambda: interrupt.requested
            )
        finally:
            display.end()
        outcome.interrupted = interrupt.requested
    outcome.seconds = time.perf_counter() - clock


def write_results(outcome: Outcome) -> Path:
    """Write every number of the finished runs to ``results.parquet``.

    Args:
        outcome: of a demo.

    Returns:
        The file.
    """
    buffer = io.BytesIO()
    outcome.results.frame().write_parquet(buffer)
    path = outcome.folder / "results.parquet"
    write_whole(path, buffer.getvalue())
    return path
