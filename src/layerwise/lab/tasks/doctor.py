"""What ``layerwise doctor`` reports about a user's own task: a dry run, and a short training with a monitor."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.methods import DEFAULT_ARMS, make_arms
from layerwise.lab.experiments.tuning import setting_words
from layerwise.lab.progress import duration
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.store import usable_cores
from layerwise.lab.stats.wording import counted
from layerwise.lab.tasks.findings import Finding, LayerNumbers, find, numbers_of
from layerwise.lab.tasks.layout import plan
from layerwise.lab.tasks.network_numbers import (
    Activations,
    Outputs,
    RoleNumbers,
    Spectrum,
    as_tables,
    layers_of,
    sharpness,
    spectra,
)
from layerwise.lab.tasks.task import Stream, TaskFile, TriedTask
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import StoppedError, Trial
from layerwise.layers import clean_name
from layerwise.rules import LayerAdaptive
from layerwise.sinks import Memory, Record

STEPS = 100  # updates of the short training: after as many, faults of initialisation, rate and graph have shown
SECONDS = 30.0  # after which it ends earlier
MOST_STEPS = 100_000  # a record of every update is kept in memory
UPDATES = 8  # of the dry run: the first ones take longer than the rest
UPDATE_SECONDS = 5.0  # after which the dry run ends with its second update or later
SEEDS = 5
WIDTH_UPDATES = 3  # after which activations are compared: rates that grow with the width show after as many

TRIED = "a few updates with the layer-adaptive rule: "  # how a problem begins that came up in them
NOT_FINITE = "the loss is not finite"  # how the problem begins of which the training reports more, if it has it too
NO_FORK = "where Python does not fork (macOS, Windows, any system from Python 3.14 on) the loader fails: "
"""How the note begins of a loader that works only with forked workers."""

BESIDE_SECONDS = 10.0  # to start the command, to start a worker, and to write the report: 3, 3 and 4 s of a free core
RUN_SECONDS = 0.15  # of a run beside its updates and tests: the task is built, and its files are written
Advance = Callable[[int, int], object]  # called with the updates that are done and with how many there will be


@dataclass(frozen=True)
class Checkup:
    """What a short training showed: a record and a loss of every update."""

    records: tuple[Record, ...]
    losses: tuple[float, ...]
    asked: int  # updates that were to be done
    seconds: float
    findings: tuple[Finding, ...]
    roles: tuple[RoleNumbers, ...] = ()
    spectra: tuple[Spectrum, ...] = ()  # if they were asked for

    @property
    def layers(self) -> list[LayerNumbers]:
        """Medians of every layer."""
        return numbers_of(self.records)

    @property
    def words(self) -> str:
        """How much was trained."""
        count = len(self.records)
        early = f" of {self.asked}, as the time was up" if self.ended_early else ""
        return f"{counted(count, 'update')}{early}, in {self.seconds:.1f} s"

    @property
    def ended_early(self) -> bool:
        """It was ended by the clock."""
        return len(self.records) < self.asked and all(map(math.isfinite, self.losses))


@dataclass(frozen=True)
class Examination:
    """What was found of a task; every sentence is a line."""

    described: list[str]  # what it is, what a comparison would do, and where a factor would act
    faults: list[str]  # of the dry run
    checkup: Checkup | None = None  # None where no update could be done
    notes: tuple[str, ...] = ()
    activations: Activations | None = None  # if they were asked for

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, a sentence each."""
        findings = self.checkup.findings if self.checkup else ()
        return [*self.faults, *(finding.sentence for finding in findings if finding.serious)]

    @property
    def conclusion(self) -> list[str]:
        """What is wrong, and what may be, in lines: "problem" or "note" at the beginning, "remedy" below."""
        lines = [f"{'problem':<12}{problem}" for problem in self.faults]
        for finding in self.checkup.findings if self.checkup else ():
            lines.append(f"{'problem' if finding.serious else 'note':<12}{finding.sentence}")
            lines.append(f"{'  remedy':<12}{finding.remedy}")
        lines += [f"{'note':<12}{note}" for note in self.notes]
        return lines if self.problems else [f"{'problems':<12}none found", *lines]

    @property
    def lines(self) -> list[str]:
        """Everything, as it is printed."""
        trained = [] if self.checkup is None else ["", f"{'trained':<12}{self.checkup.words}, without a rule"]
        return [*self.described, *trained, *self.measured, "", *self.conclusion]

    @property
    def measured(self) -> list[str]:
        """Sharpness by role, and what was asked for besides."""
        roles, spectrum = ((), ()) if self.checkup is None else (self.checkup.roles, self.checkup.spectra)
        return as_tables(roles, spectrum, self.activations)


def examine(
    task_file: TaskFile,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    spectrum: bool = False,
    widths: Mapping[str, Sequence[Any]] | None = None,
    advance: Advance = lambda done, total: None,
) -> Examination:
    """Try a task, do a few updates, say what a comparison would do, and train it for a little while.

    ``spectrum`` asks for those of the weights, ``widths``, a parameter and its values, for the activations at each.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"steps={steps!r}: must be from 1 to {MOST_STEPS:,}; {STEPS} is the default")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"seconds={seconds!r}: must be finite and above 0; {SECONDS:g} is the default")
    chosen = _widths(task_file, widths) if widths else None
    tried = task_file.tried(spawned=True)
    problems: list[str] = []
    try:
        plan(task_file, seeds=SEEDS, tried=tried)
    except UsageError as error:
        problems = [str(error)]
    jobs = max(1, min(usable_cores(), SEEDS * sum(arm.control is None for arm in make_arms())))
    with Stream(0), _one_thread():
        an_update, found = _updates(tried)
    with contextlib.redirect_stdout(io.StringIO()):
        diagnosis = layerwise.diagnose(tried.trial.optimizer, tried.trial.model).splitlines()
    more = [line.removeprefix("problem ").strip() for line in diagnosis if line.startswith("problem ")]
    kept = "\n".join(line for line in diagnosis if not line.startswith(("problem ", "problems ", "next "))).rstrip()
    described = [*_described(task_file, tried), *_times(tried, an_update, jobs), "", *kept.splitlines()]
    trained = None
    if math.isfinite(an_update):
        trained = train(task_file, steps=steps, seconds=seconds, spectrum=spectrum, advance=advance)
        if any(finding.kind == "non-finite" for finding in trained.findings):
            found = [problem for problem in found if not problem.startswith(NOT_FINITE)]
    faults: list[str] = []
    for problem in (*problems, *found, *more):
        # What cannot be attached is found three times: by the plan, by the updates and by the diagnosis.
        if not any(problem.removeprefix(TRIED) in other for other in faults):
            faults.append(problem)
    notes = (f"{NO_FORK}{' '.join(tried.spawned.split())}",) if tried.spawned else ()
    activations = None if chosen is None or faults else activations_of(task_file, *chosen)
    return Examination(described, faults, trained, notes, activations)


def _widths(task_file: TaskFile, widths: Mapping[str, Sequence[Any]]) -> tuple[str, list[Any]]:
    """Give the one parameter and its values, or refuse what cannot be drawn over a logarithm."""
    (name, given), *more = widths.items()
    values = list(dict.fromkeys(given))
    numbers = [value for value in values if isinstance(value, (int, float)) and value > 0]
    if more or len(numbers) != len(values) or len(values) < 2:
        raise UsageError(
            f"coordinate-check={dict(widths)!r}: give one parameter of the task and at least two numbers above 0, as "
            "width=16,32,64"
        )
    for value in values:
        task_file.with_values({name: value})
    return name, sorted(values)


def activations_of(task_file: TaskFile, name: str, values: Sequence[Any]) -> Activations:
    """Train a task a few updates at each value of a parameter, and give the mean |output| of its modules then."""
    found: list[dict[str, float]] = []
    for value in values:
        chosen = task_file.with_values({name: value})
        configuration = Configuration(trial=chosen.configuration(layers_every=MOST_STEPS), rule=None)
        with Stream(0), _one_thread():
            trial = _short(chosen.trial(configuration), WIDTH_UPDATES + 1)  # the last loss comes before its update
            outputs = Outputs(trial.model)
            Training(trial, None, configuration).run(lambda: False)
        found.append(outputs.read())
    means = {module: [each.get(module, math.nan) for each in found] for module in found[0]}
    return Activations(name, values, WIDTH_UPDATES, means)


def _described(task_file: TaskFile, tried: TriedTask) -> list[str]:
    trial = tried.trial
    parameters = list(trial.model.parameters())
    types = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    length, total = trial.epoch_length, trial.total
    scheduler = "no scheduler"
    if trial.scheduler is not None:
        scheduler = f"{type(trial.scheduler).__name__} stepped each {trial.schedule_unit}"
    passes = f"{trial.iterations} iterations" if trial.epochs is None else f"{trial.epochs} epochs"
    rows = {
        "task": f"{task_file.label}, {setting_words(task_file.settings) or 'no parameters'}",
        "model": f"{type(trial.model).__name__}, {sum(p.numel() for p in parameters):,} numbers, {', '.join(types)}",
        "optimizer": f"{type(trial.optimizer).__name__}, {scheduler}",
        "batches": f"{'an unknown number' if length is None else length} an epoch",
        "run": f"{passes}, {'an unknown number of' if total is None else total} updates",
        "metric": f"{tried.metric} is {tried.value:.4g} untrained, "
        f"{'higher' if tried.higher_is_better else 'lower'} is better; {tried.tests} times a run, "
        f"{tried.metric_seconds:.2g} s each",
        "validation": "there, so that --tune works" if tried.has_validation else "none, which --tune needs",
    }
    return [f"{name:<12}{words}" for name, words in rows.items()]


def _times(tried: TriedTask, seconds: float, jobs: int) -> list[str]:
    arms, total = make_arms(), tried.trial.total
    runs = SEEDS * len(arms)
    words = f"{', '.join(DEFAULT_ARMS)} at {SEEDS} seeds: {runs} runs, {jobs} side by side"
    if not math.isfinite(seconds):
        return [f"{'update':<12}not done", f"{'comparison':<12}{words}"]
    if total is None:
        words += "; how long is not known, as batches have no length"
    else:
        training = runs * (total * seconds + tried.tests * tried.metric_seconds + RUN_SECONDS) / jobs
        words += (
            f", about {duration(BESIDE_SECONDS + training)} on free cores ({BESIDE_SECONDS:.0f} s of it to start and "
            "to write the report), longer where they have other work"
        )
    return [f"{'update':<12}{1000 * seconds:.3g} ms, with the layer-adaptive rule", f"{'comparison':<12}{words}"]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as a run of a comparison does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _short(trial: Trial, steps: int, **changes: Any) -> Trial:
    """Give a trial of so many updates without a test."""
    untested: dict[str, Any] = {"evaluate": lambda model, stop: {}, "test_every": None}
    return replace(trial, iterations=steps, epochs=None, **untested, **changes)


def _updates(tried: TriedTask) -> tuple[float, list[str]]:
    """Do a few updates as the lab does them: the median of their seconds, without the first, and what went wrong."""
    trial = _short(tried.trial, UPDATES)
    moments: list[float] = []

    def stop() -> bool:
        moments.append(time.perf_counter())
        return training.position.iteration > 1 and moments[-1] - moments[0] > UPDATE_SECONDS

    try:
        training = Training(trial, LayerAdaptive(), Configuration(trial={}, rule={"name": "LayerAdaptive"}))
        with contextlib.suppress(StoppedError):
            training.run(stop)
            moments.append(time.perf_counter())
    except (TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        return math.nan, [f"{TRIED}{error}"]
    took = [later - earlier for earlier, later in pairwise(moments)]
    problems = []
    if training.diverged_at is not None:
        words = f"{NOT_FINITE} after {training.diverged_at} updates with the layer-adaptive rule"
        problems.append(f"{words}: is the rate too large?")
    without = [name for name, p in trial.model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        shown = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        problems.append(f"the loss gives no gradient to {shown}")
    problems += _unsaved(training)
    if training.adapter is not None:
        training.adapter.detach()
    return median(took[1:] or took), problems


def _unsaved(training: Training) -> list[str]:
    """Say why a checkpoint could not be read again."""
    buffer = io.BytesIO()
    try:
        torch.save(training.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # the user's scheduler or optimizer may keep anything
        reason = str(error).strip().partition("\n")[0]
        return [f"a checkpoint cannot be read again, so a stopped run begins anew: {type(error).__name__}: {reason}"]
    return []


def train(
    task_file: TaskFile,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    spectrum: bool = False,
    advance: Advance = lambda done, total: None,
) -> Checkup:
    """Train a task as it is, without a rule, and look at every update; on one thread, as a run of a comparison is."""
    configuration = Configuration(trial=task_file.configuration(layers_every=MOST_STEPS), rule=None)
    losses: list[torch.Tensor] = []
    memory = Memory()
    with Stream(0), _one_thread():
        whole = task_file.trial(configuration)
        steps = min(steps, whole.total or steps)

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            value = whole.loss(model, batch)
            losses.append(value.detach())
            return value

        trial = _short(whole, steps, loss=loss)
        monitor = layerwise.Monitor(trial.optimizer, trial.model, every=1, sinks=[memory])
        training = Training(trial, None, configuration)
        began = time.perf_counter()

        def stop() -> bool:
            advance(training.position.iteration, steps)
            return training.position.iteration > 0 and time.perf_counter() - began > seconds

        try:
            training.run(stop)
        except StoppedError:
            pass
        finally:
            monitor.detach()
        took = time.perf_counter() - began
    frozen = _layers(trial.model, lambda p: not p.requires_grad)
    ungiven = _layers(trial.model, lambda p: p.grad is None)
    layers = layers_of(trial.model, memory.records[0].layers) if memory.records else []
    return Checkup(
        records=tuple(memory.records),
        losses=tuple(torch.stack(losses).double().tolist()) if losses else (),
        asked=steps,
        seconds=took,
        findings=tuple(find(memory.records, diverged_at=training.diverged_at, frozen=frozen, ungiven=ungiven)),
        roles=tuple(sharpness(memory.records, layers)),
        spectra=tuple(spectra(layers)) if spectrum else (),
    )


def _layers(model: nn.Module, has: Callable[[nn.Parameter], bool]) -> list[str]:
    """Name the modules of whose own parameters each has something."""
    own = {clean_name(name): list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    return [name for name, parameters in own.items() if parameters and all(map(has, parameters))]
