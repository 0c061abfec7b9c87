"""What a recipe will take on this machine, from ten updates of each of its subjects."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments.chain import Chain, make_rule, make_trial
from layerwise.lab.experiments.plan import Plan, PlannedRun
from layerwise.lab.experiments.pool import run_jobs
from layerwise.lab.experiments.runner import Settings, placed, side_by_side
from layerwise.lab.experiments.tuned_recipe import TunedRecipe
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training.devices import begin_memory, device_of_worker, peak_memory
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import StoppedError

STEPS = 10  # updates, and batches of a test, that are timed


def estimate(
    plan: Plan | TunedRecipe, settings: Settings, say: Callable[[str], None] = lambda words: None
) -> dict[str, Any]:
    """Do ten updates of each subject of a plan, and part of a test; nothing is written.

    Of a recipe that is tuned they are those of each arm: a control takes as long as its method, which it follows.
    """
    bench, whole = (None, plan) if isinstance(plan, Plan) else (plan, plan.untuned)
    plan = placed(places.ready(whole, settings.data_dir), settings)
    jobs, loaders = side_by_side(settings, 1 if plan.quantity.name == "seconds" else len(plan.chains()))
    rows = []
    for subject in plan.subjects:
        runs = [run for run in plan.runs if run.subject == subject.name]
        methods = [run for run in runs if run.arm.control is None]
        first = next((run for run in methods if run.arm.rule is not None), methods[0])
        say(f"measuring {subject.words}")
        if bench is None:
            (found,) = _measured([first], settings, loaders)
            rows.append({"subject": subject.name, "words": subject.words, "runs": len(runs), **found})
            continue
        counts = Counter(run.arm.of or run.arm.name for run in runs)
        for arm in plan.arms_of(subject.name):
            counts[arm.of or arm.name] += len(bench.space(subject.name, arm).settings) * bench.seeds
        each = list({run.arm.name: run for run in methods}.values())
        for run, found in zip(each, _measured(each, settings, loaders), strict=True):
            words = f"{subject.words}: {run.arm.words}"
            rows.append({"subject": subject.name, "words": words, "runs": counts[run.arm.name], **found})
    hours = sum(row["runs"] * row["hours_a_run"] for row in rows) / jobs
    about = {"device": settings.device, "jobs": jobs, "tuned": bench is not None}
    return {**about, "subjects": rows, "hours": hours}


def _measured(runs: Sequence[PlannedRun], settings: Settings, loaders: int) -> list[dict[str, Any]]:
    """Measure runs in a process of their own, so that its memory is theirs too."""
    where = {"out": settings.out, "data_dir": settings.data_dir, "device": settings.device}
    chain = Chain(runs=tuple(runs), loaders=loaders, **where)
    found: list[dict[str, Any]] = []
    failures = run_jobs(measure, [chain], 1, on_message=lambda worker, message: found.append(message))
    if len(found) < len(runs):
        reason = failures[0].reason if failures else "interrupted"
        raise UsageError(reason.removeprefix("UsageError: "))
    return found


def measure(chain: Chain, link: Any) -> None:
    """Do ten updates of each run of a chain and ten batches of its test, and send what they took."""
    torch.set_num_threads(chain.threads)
    for run in chain.runs:
        link.send(_taken(run, chain))


def _taken(run: PlannedRun, chain: Chain) -> dict[str, Any]:
    device = device_of_worker(chain.device, 0, 1)
    begin_memory(device)
    configuration = run.configuration
    trial = make_trial(run, configuration, chain)
    updates, every, epochs = trial.total, trial.test_every, trial.epochs
    batches, evaluate = trial.batches, trial.evaluate
    clock: list[float] = []

    def timed(epoch: int, skip: int) -> Any:
        for batch in batches(epoch, skip):
            clock.append(_now(device))
            yield batch

    trial.batches, trial.evaluate = timed, lambda model, stop: {}
    trial.iterations, trial.epochs, trial.test_every = STEPS + 1, None, None
    training = Training(trial, make_rule(configuration, Runs(chain.out).folder(configuration), None), configuration)
    training.run()
    steps = [after - before for before, after in pairwise(clock[1:])]
    clock.clear()

    def stop() -> bool:
        clock.append(_now(device))
        return len(clock) > STEPS

    with suppress(StoppedError):
        evaluate(trial.model, stop)
    batch = (clock[-1] - clock[0]) / max(1, len(clock) - 1)
    tests = (epochs or 0) if every is None else 1 + math.ceil((updates or 0) / every)
    update, test = statistics.median(steps or [0.0]), batch * (trial.test_batches or len(clock))
    return {
        "updates": updates,  # None where it is not known beforehand
        "seconds_an_update": update,
        "seconds_a_test": test,
        "hours_a_run": ((updates or 0) * update + tests * test) / 3600,
        "memory": peak_memory(device),
    }


def _now(device: str) -> float:
    """Give the time when the device has done what it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def words(found: dict[str, Any]) -> str:
    """Write an estimate as a table for a terminal, with the hours of all runs."""
    head = ("subject", "runs", "updates", "s an update", "hours a run", "GB a process")
    lines: list[tuple[str, ...]] = [head]
    for row in found["subjects"]:
        numbers = (row["seconds_an_update"], row["hours_a_run"], row["memory"] / 1e9)
        counts = (str(row["runs"]), "not known" if row["updates"] is None else f"{row['updates']:,}")
        lines.append((row["words"], *counts, *(f"{number:.2g}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    runs = sum(row["runs"] for row in found["subjects"])
    whole = f"{runs} runs: {found['hours']:.2g} hours on {found['device']}, {found['jobs']} side by side"
    how = f"Measured: {STEPS} updates and {STEPS} batches of a test, one at a time."
    if found["tuned"]:
        how += (
            " Trials are counted, but not those beyond the edges of grids, nor methods at the rates of their controls."
        )
    return "\n".join([*table, "", f"{whole}, if they do not slow one another.", how])
