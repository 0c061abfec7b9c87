"""One run of Table I with all that the lab records, and many of them side by side against bare loops.

Needs MNIST in the folder that `LAYERWISE_DATA` names; the part is left out, saying so, without it.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.plan import Plan, PlannedRun
from layerwise.lab.experiments.runner import Settings, carry_out
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.training import trial

from .lab import update
from .timing import Row

ONE_RUN_TARGET = 20.0
"""Seconds, with two threads; Caffe, the paper's engine, took 45.6 on two cores and 52.4 on one."""
ALL_RUNS, ALL_RUNS_TARGET = 60, 15.0
"""Runs of the paper's table, and the minutes that all of them may take."""
THROUGHPUT_TARGET = 1.25
"""Of the lab's runs, against bare loops in PyTorch's default layout, one after another with two threads."""
METHODS = ("plain", "layer-adaptive")


def table_plan(seeds: int) -> Plan:
    """Lay out Table I in full: three solvers, without and with the method; 2,000 iterations, 11 tests of 10,000."""
    plan = recipe.load("singh2015-table1").plan("full", seeds=seeds)
    return dataclasses.replace(plan, runs=tuple(run for run in plan.runs if run.arm.name in METHODS))


def lab_seconds(plan: Plan, data: Path, jobs: int, threads: int) -> float:
    """Time the lab's runs of a plan, from the start of its processes to the last record."""
    with tempfile.TemporaryDirectory() as out:
        before = torch.get_num_threads()
        outcome = carry_out(plan, Settings(out=Path(out), data_dir=data, jobs=jobs, threads=threads))
        torch.set_num_threads(before)
    return outcome.seconds


def bare_seconds(run: PlannedRun, data: Path) -> float:
    """Time the loop that a person would write for a run: default layout, the loss read at each step, the same tests."""
    trained = {**run.configuration.trial, "memory_format": "contiguous"}
    configuration: Configuration = dataclasses.replace(run.configuration, trial=trained)
    built = trial.build(configuration, data)
    rule = rule_making.make_rule(configuration.rule, 0)
    if rule is not None:
        place: Any = {"apply": configuration.apply, "decay": configuration.decay}
        layerwise.LayerwiseLR(built.optimizer, rule, built.model, **place)
    start = time.perf_counter()
    batches = built.batches(1, 0)
    for iteration in range(built.total or 0):
        if iteration % (built.test_every or 1) == 0:
            built.evaluate(built.model, lambda: False)
        update(built, batches)
    built.evaluate(built.model, lambda: False)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, Row]:
    """Print the table and return its rows; `rounds` is not used, since a run takes long enough."""
    folder = os.environ.get("LAYERWISE_DATA")
    if not folder:
        print("\nTable I: left out, since LAYERWISE_DATA names no folder with MNIST")
        return {}
    data, torch_threads = Path(folder), torch.get_num_threads()
    plan = table_plan(seeds=1)
    try:
        one = [
            lab_seconds(dataclasses.replace(plan, runs=(run,)), data, 1, 2) for run in plan.runs if run.subject == "sgd"
        ]
    except UsageError as error:
        print(f"\nTable I: left out: {error}")
        return {}
    rows: dict[str, Row] = {"one run": {"seconds": max(one), "target": ONE_RUN_TARGET}}
    print(
        f"\nTable I, one run, 2 threads, all recording on: {max(one):.1f} s (target {ONE_RUN_TARGET:.0f}; Caffe 45.6)"
    )
    torch.set_num_threads(2)
    bare = sum(bare_seconds(run, data) for run in plan.runs)
    lab = lab_seconds(plan, data, 2, 1)
    torch.set_num_threads(torch_threads)
    minutes = lab / len(plan.runs) * ALL_RUNS / 60
    rows["runs side by side"] = {
        "runs": len(plan.runs),
        "lab_s": lab,
        "bare_s": bare,
        "throughput": bare / lab,
        "target": THROUGHPUT_TARGET,
        "minutes_of_60": minutes,
        "minutes_target": ALL_RUNS_TARGET,
    }
    print(
        f"{len(plan.runs)} runs: {lab:.1f} s in the lab, 2 processes of one thread; {bare:.1f} s as bare loops one\n"
        f"after another with 2 threads: {bare / lab:.2f} times the throughput (target {THROUGHPUT_TARGET})\n"
        f"{ALL_RUNS} runs at this speed: {minutes:.1f} minutes (target {ALL_RUNS_TARGET:.0f})"
    )
    return rows
