"""Carrying out a plan, and its outcome: finished runs are found, the rest is done and kept run by run."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import INTERRUPTED, UsageError
from layerwise.lab.experiments.plan import Plan, PlannedRun
from layerwise.lab.experiments.pool import Failure, Interrupt, run_jobs
from layerwise.lab.experiments.results import Key, Results
from layerwise.lab.runs.files import OwnFolder, check_page, refuse_links
from layerwise.lab.runs.folder import Runs, alone_in
from layerwise.lab.runs.record import Record
from layerwise.lab.runs.store import usable_cores
from layerwise.lab.training.devices import card_count, check_device, default_jobs, loader_count, memory_words

if TYPE_CHECKING:  # it imports PyTorch, for which a report does not wait
    from layerwise.lab.experiments.chain import Chain

LARGEST_JOBS = 1024

Engine = Callable[..., list[Failure]]  # does chains side by side, as ``pool.run_jobs`` does jobs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where runs are kept and what does them; values that cannot be used are refused at once."""

    out: Path = Path("runs")
    data_dir: Path | None = None
    jobs: int | None = None  # None: one a GPU, and on the CPU as many as the cores take
    threads: int | None = None  # of each process; None for the plan's, which is 1
    device: str = "cpu"
    engine: str = "local"
    address: str | None = None  # of the Ray cluster; None starts one here

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
        """Begin: the finished runs are found, and ``workers`` processes are to do the others."""

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """Take in how many updates a run has done; workers count from 0, and ``total`` is None if it is not known."""

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a finished run; ``result`` is its result in words."""

    def stopping(self) -> None:
        """Take in that the user has interrupted it; running processes write their checkpoints."""

    def say(self, words: str) -> None:
        """Pass on a line that the user must know."""

    def end(self) -> None:
        """End: no run is worked on any more, whether all are finished, some failed or the user interrupted it."""


@dataclass
class Outcome:
    """The results of an experiment, and how it ended."""

    plan: Plan
    settings: Settings
    results: Results
    found: int = 0  # runs that were finished before
    repeated: int = 0  # runs to be done that are another run of the plan under a second name: done once
    set_aside: list[Path] = field(default_factory=list)  # broken files that were renamed
    failures: list[Failure] = field(default_factory=list)
    alike: bool = False  # every arm's first run failed in the same way, so that no further one was begun
    skipped: list[str] = field(default_factory=list)  # runs that were not done, and why
    interrupted: bool = False
    seconds: float = 0.0
    jobs: int = 1

    @property
    def planned(self) -> int:
        """Number of all runs of the plan, those found and those repeated among them."""
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
        """Whether every run of the plan has a record that can be read, as a diverged one has too."""
        return len(self.results.records) == self.planned

    @property
    def folder(self) -> Path:
        """Folder of the report, the tables and the figures."""
        return self.settings.out / self.plan.name

    @property
    def report(self) -> Path:
        """Path of the page, whether or not it is written yet."""
        return self.folder / "report.html"

    @property
    def exit_code(self) -> int:
        """Exit code of the program: 130 after an interrupt, 0 if every run is finished, else 1."""
        return INTERRUPTED if self.interrupted else 0 if self.complete else 1

    def result_words(self, record: Record) -> str:
        """Write the last value of the plan's quantity with its unit, or "diverged", or "no result"."""
        quantity = self.plan.quantity
        if record.diverged:
            return "diverged"
        if quantity.name == "seconds":
            return f"{record.summary['seconds']:.0f} s"
        value = record.summary["finals"].get(quantity.name)
        return "no result" if value is None else f"{value:.4g} {quantity.unit} {quantity.words}".replace("  ", " ")


def load_finished(plan: Plan, runs: Runs) -> Results:
    """Read the runs of a plan that are finished; a control whose method's run is not finished is not looked for."""
    from layerwise.lab.experiments.chain import finished_runs

    results = Results(plan)
    for chain in plan.chains():
        results.records |= finished_runs(chain, runs)
    return results


def placed(plan: Plan, settings: Settings) -> Plan:
    """Write threads and device, which decide how numbers are rounded, into the configurations of a plan's runs."""
    device = settings.device.partition(":")[0]
    if settings.threads is None and device == "cpu":
        return plan

    def of(run: PlannedRun) -> PlannedRun:
        threads = settings.threads or run.configuration.threads
        return replace(run, configuration=replace(run.configuration, threads=threads, device=device))

    return replace(plan, runs=tuple(map(of, plan.runs)))


def cards_of(device: str) -> int:
    """Count the GPUs that runs are divided among."""
    return card_count() if device == "cuda" else 0


def side_by_side(settings: Settings, most: int) -> tuple[int, int]:
    """Give the number of processes side by side, ``most`` at most, and of those that decode ahead for each of them."""
    cores, threads = usable_cores(), settings.threads or 1
    jobs = settings.jobs or default_jobs(settings.device, cores=cores, threads=threads, cards=cards_of(settings.device))
    jobs = max(1, min(jobs, most))
    if settings.engine != "local":  # a cluster gives a task its cores
        return jobs, 0
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
    return jobs, loader_count(cores=cores, threads=threads, processes=jobs * shared)


def chains_left(plan: Plan, results: Results, settings: Settings) -> list[Chain]:
    """Give the chains with a run that is not finished; a finished method stays at the head of its controls.

    Of chains of the same runs, as a sweep of a rule's argument makes of the plain arm, the first stands for all.
    """
    from layerwise.lab.experiments.chain import Chain

    different: dict[Any, tuple[PlannedRun, ...]] = {}
    for chain in plan.chains():
        different.setdefault(tuple((run.configuration.name, run.arm.control) for run in chain), chain)
    where = {"out": settings.out, "data_dir": settings.data_dir, "device": settings.device}
    return [
        Chain(runs=chain, labels=plan.labels(chain[0].subject), **where)
        for chain in different.values()
        if any(run.key not in results.records for run in chain)
    ]


def fail_alike(runs: Sequence[PlannedRun], failures: Sequence[Failure]) -> bool:
    """Say whether runs fail whatever they are: every arm has failed in the same way, in two seeds or settings.

    No run was finished. The subjects of a recipe are tried each. Controls, which wait for a method's run, do not count.
    """

    def arms(runs: Sequence[PlannedRun]) -> set[tuple[str, str]]:
        return {("" if run.task is not None else run.subject, run.arm.name) for run in runs}

    def seeds(runs: Sequence[PlannedRun]) -> set[tuple[str, int]]:
        return {(run.subject, run.seed) for run in runs}

    named = {failure.doing for failure in failures}
    methods = [run for run in runs if run.arm.control is None]
    failed = [run for run in methods if run.label in named]
    one_cause = len({failure.kind for failure in failures}) == 1
    return one_cause and arms(failed) == arms(methods) and len(seeds(failed)) >= min(2, len(seeds(methods)))


def carry_out(
    plan: Plan, settings: Settings, display: Display | None = None, *, engine: Engine | None = None
) -> Outcome:
    """Do the runs of a plan that are not finished yet; tables and report are not written.

    ``engine`` is the one that the settings name, or another.
    """
    from layerwise.lab.experiments.chain import Advance, Finished, Memory, Skipped

    display = display or Display()
    clock = time.perf_counter()
    runs = Runs(settings.out)
    _check_writable(settings.out, plan.name)
    plan = placed(plan, settings)
    outcome = Outcome(plan, settings, load_finished(plan, runs), set_aside=runs.set_aside)
    outcome.found = len(outcome.results.records)
    for record in outcome.results.records.values():
        runs.tidy(record)
    chains = chains_left(plan, outcome.results, settings)
    # Runs beside one another take each other's time: where that is what is asked, they go one by one.
    outcome.jobs, loaders = side_by_side(settings, 1 if plan.quantity.name == "seconds" else len(chains))
    chains = [replace(chain, loaders=loaders) for chain in chains]
    planned = {run.key: run for run in plan.runs}
    asked = [run for chain in chains for run in chain.runs]  # of equal chains the first alone
    left = [run for run in asked if run.key not in outcome.results.records]
    outcome.repeated = outcome.planned - outcome.found - len(left)
    skipped: dict[Key, str] = {}
    failures: list[Failure] = []
    told: set[str] = set()

    def on_failure(failure: Failure) -> None:
        failures.append(failure)
        if len(outcome.results.records) == outcome.found:
            outcome.alike = fail_alike(left, failures)

    def on_message(worker: int, message: object) -> None:
        if isinstance(message, Advance):
            display.advance(worker, message.run, message.done, message.total)
        elif isinstance(message, Memory) and settings.engine == "local" and engine is None:
            how = {"jobs": outcome.jobs, "cards": cards_of(settings.device)}
            words = memory_words(settings.device, message.used, message.whole, **how)
            if words and not told:  # runs of one plan differ little
                told.add(words)
                display.say(words)
        elif isinstance(message, Failure):
            outcome.failures.append(message)
            on_failure(message)
        elif isinstance(message, Skipped):
            skipped[message.key] = message.reason
        elif isinstance(message, Finished) and message.key not in outcome.results.records:
            record = runs.find(message.configuration)
            if record is not None:
                outcome.results.records[message.key] = record
                display.finished(worker, planned[message.key].label, outcome.result_words(record), record.diverged)

    def stop() -> bool:
        if interrupt.requested and not outcome.interrupted:
            outcome.interrupted = True
            display.stopping()
        return interrupt.requested or outcome.alike

    # Processes that share runs are ended by SIGTERM when one of them has died: no other process would do so.
    with Interrupt(*([signal.SIGTERM] if engine is None else [])) as interrupt:
        display.begin(outcome, outcome.jobs)
        try:
            do = engine or _engine(settings)
            outcome.failures += do(chains, outcome.jobs, on_message=on_message, on_failure=on_failure, stop=stop)
        finally:
            display.end()
        outcome.interrupted = interrupt.requested
    # Runs of one configuration are one run: it may have been done under another name.
    outcome.results.records |= load_finished(plan, runs).records
    outcome.skipped += outcome.results.leave_out_unreadable()
    failed = {failure.doing for failure in outcome.failures}
    for run in [] if outcome.interrupted or outcome.alike else asked:
        if run.key not in outcome.results.records and run.label not in failed:
            outcome.skipped.append(f"{run.label}: {skipped.get(run.key, 'the process that was to do it ended')}")
    outcome.seconds = time.perf_counter() - clock
    return outcome


def _engine(settings: Settings) -> Engine:
    """Give what does chains side by side: processes of this machine, or a Ray cluster."""
    if settings.engine == "local":
        return _local
    from layerwise.lab.experiments import ray as cluster

    return partial(cluster.run_chains, address=settings.address)


def _local(chains: Sequence[Chain], jobs: int, **told: Any) -> list[Failure]:
    from layerwise.lab.experiments.chain import do_placed

    return run_jobs(do_placed, chains, jobs, rest=lambda chain, doing: chain.rest(doing), **told)


def _check_writable(out: Path, name: str) -> None:
    """Refuse a folder in which runs and pages cannot be written, before anything is trained."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as probe, alone_in(Path(probe)):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"out={str(out)!r} cannot be written ({reason}): give another folder with --out") from error
    refuse_links(Runs(out).path, out)
    OwnFolder(out / name, out)
    check_page(out / "report.html", out)
