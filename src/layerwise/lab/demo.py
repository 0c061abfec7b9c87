"""The demo: does the layer-adaptive rule lower LeNet's error, and by more than a larger global rate would?

Three solvers, three arms, several seeds. One job is one solver and one seed; it runs its arms in order,
because the control (``plain at the mean factor``) multiplies the base rate by the mean factor, over layers
and iterations, that the layer-adaptive run of the same solver and seed had. All arms of a seed begin with the
same weights and see the same batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerwise.lab import data
from layerwise.lab.errors import UsageError
from layerwise.lab.jobs import Advance, Finished, Job, do_job
from layerwise.lab.pool import Failure, Interrupt, run_jobs
from layerwise.lab.results import Results
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.store import RunStore, usable_cores, write_whole
from layerwise.lab.training import ARMS, Run


@dataclass(frozen=True)
class Protocol:
    """How long a run is and what is recorded.

    Attributes:
        iterations: updates in all.
        record_at: numbers of updates after which the test error is measured; the last one is judged.
        loss_every: iterations between two records of the training loss.
        rate_every: iterations between two records of factors and rates.
    """

    iterations: int
    record_at: tuple[int, ...]
    loss_every: int = 10
    rate_every: int = 5


PROTOCOLS = {
    # 300 batches of 64 are 4.8 passes over 4,000 digits.
    "digits5k": Protocol(300, (50, 100, 200, 300)),
    # The rows of Singh et al. 2015, Table I.
    "mnist": Protocol(1800, (600, 1000, 1400, 1800), rate_every=10),
}
"""Data set -> protocol."""

LARGEST_SEEDS = 1000
LARGEST_JOBS = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the demo is asked to do.

    Attributes:
        out: folder of the report and the runs.
        data_dir: folder that may hold the full MNIST, or None.
        seeds: number of seeds; they are 0, 1, ...
        jobs: number of processes, or None for the number of usable cores.
        solvers: keys of ``solvers.SOLVERS``.
        protocol: None for that of the data set.
    """

    out: Path = Path("runs")
    data_dir: Path | None = None
    seeds: int = 5
    jobs: int | None = None
    solvers: tuple[str, ...] = tuple(SOLVERS)
    protocol: Protocol | None = None

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
    """Where the demo says what happens; this one says nothing."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """The plan is made and the finished runs are found."""

    def advance(self, worker: int, run: str, done: int) -> None:
        """A worker has done so many iterations of a run."""

    def finished(self, worker: int, run: str, error: float, diverged: bool) -> None:
        """A run is finished with this test error in %."""

    def end(self) -> None:
        """No run is worked on any more."""


@dataclass
class Outcome:
    """What came of the demo.

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

    settings: Settings
    dataset: str
    title: str
    test_count: int
    protocol: Protocol
    results: Results
    found: int = 0
    set_aside: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    jobs: int = 1

    @property
    def planned(self) -> int:
        """Number of runs of the whole plan."""
        return len(self.results.solvers) * len(self.results.seeds) * len(ARMS)

    @property
    def folder(self) -> Path:
        """Folder of the runs."""
        return self.settings.out / "demo"

    @property
    def renamed(self) -> list[Path]:
        """New names of the broken files that were set aside."""
        return [path.with_name(path.name + ".broken") for path in self.set_aside]

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.settings.out / "report.html"

    @property
    def exit_code(self) -> int:
        """0, 1 if a job failed, 130 if interrupted."""
        return 130 if self.interrupted else 1 if self.failures else 0


def _pending(outcome: Outcome, store: RunStore) -> list[Job]:
    """Load the finished runs into the outcome and give the jobs that are left."""
    protocol, results = outcome.protocol, outcome.results
    jobs = []
    for seed in results.seeds:
        for solver in results.solvers:
            left, factor = [], None
            for arm in ARMS:
                run = Run(
                    dataset=outcome.dataset,
                    solver=solver,
                    arm=arm,
                    seed=seed,
                    iterations=protocol.iterations,
                    record_at=protocol.record_at,
                    loss_every=protocol.loss_every,
                    rate_every=protocol.rate_every,
                )
                record: dict[str, Any] | None = None
                if arm != "control":
                    record = store.load(run.name, run.configuration())
                elif factor is not None:
                    record = store.load(run.name, replace(run, rate_factor=factor).configuration())
                if record is None:
                    left.append(run)
                    continue
                results.records[solver, arm, seed] = record
                outcome.found += 1
                if arm == "layer-adaptive":
                    factor = record["factor"]["mean"]
            if left:
                jobs.append(Job(tuple(left), outcome.settings.data_dir, factor))
    return jobs


def run_demo(settings: Settings, display: Display | None = None) -> Outcome:
    """Do the runs that are not finished yet, and write each to its file as it ends.

    Args:
        settings: what to do.
        display: told what happens.

    Returns:
        The outcome; ``results.parquet`` and the report are not written by this function.

    Raises:
        UsageError: the data are missing or damaged.
    """
    clock = time.perf_counter()
    display = display or Display()
    name = data.choose(settings.data_dir)
    dataset = data.load(name, settings.data_dir)
    protocol = settings.protocol or PROTOCOLS[name]
    results = Results(settings.solvers, tuple(range(settings.seeds)), protocol.record_at)
    outcome = Outcome(settings, name, dataset.title, len(dataset.test_labels), protocol, results)
    store = RunStore(outcome.folder)
    store.clear_leftovers()
    jobs = _pending(outcome, store)
    outcome.set_aside = store.set_aside
    outcome.jobs = max(1, min(settings.jobs or usable_cores(), len(jobs)))

    def on_message(worker: int, message: object) -> None:
        if isinstance(message, Advance):
            display.advance(worker, message.run, message.done)
        elif isinstance(message, Finished):
            run = message.run
            record = store.save(run.name, message.record)
            results.records[run.solver, run.arm, run.seed] = record
            error = record["test_error"][-1][1]  # type: ignore[index]
            display.finished(worker, run.name, error, record["diverged_at"] is not None)

    with Interrupt() as interrupt:
        display.begin(outcome, outcome.jobs)
        try:
            outcome.failures = run_jobs(
                do_job, jobs, outcome.jobs, on_message=on_message, stop=lambda: interrupt.requested
            )
        finally:
            display.end()
        outcome.interrupted = interrupt.requested
    outcome.seconds = time.perf_counter() - clock
    return outcome


def write_results(outcome: Outcome) -> Path:
    """Write every number of the finished runs to ``results.parquet``.

    Args:
        outcome: of the demo.

    Returns:
        The file.
    """
    import io

    buffer = io.BytesIO()
    outcome.results.frame().write_parquet(buffer)
    path = outcome.folder / "results.parquet"
    write_whole(path, buffer.getvalue())
    return path
