"""What the lab costs: its loop against a bare one, and runs side by side against one after another.

python -m benchmarks.lab [--rounds 15]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from layerwise.lab.experiments import recipe
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.runner import Settings, carry_out
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import Trial, build

LOOP_TARGET = 1.05
"""The lab's loop, with all its records, against a bare loop."""

SIDE_BY_SIDE_TARGET = 1.7
"""Runs a minute of two processes against one process, one thread each."""


def digits_plan(iterations: int, seeds: int, arms: tuple[str, ...]) -> Plan:
    """Lay out Table I's SGD on digits: its batches and its records, without the tests."""
    read = recipe.load("singh2015-table1")
    smoke = read.content["scales"]["smoke"]
    changed = {"data": "digits5k", "iterations": iterations, "test_every": iterations, "test_count": 100}
    content = {**read.content, "scales": {"smoke": {**smoke, "constants": changed, "columns": []}}}
    plan = recipe.Recipe("benchmark", content).plan("smoke", seeds=seeds)
    runs = tuple(run for run in plan.runs if run.subject == "sgd" and run.arm.name in arms)
    return dataclasses.replace(plan, runs=runs)


def update(trial: Trial, batches: Iterator[Any]) -> None:
    """Take an update as a person would write it, with the loss read as a progress bar would."""
    inputs, labels = trial.prepare(next(batches))
    trial.optimizer.zero_grad()
    loss = functional.cross_entropy(trial.model(inputs), labels)
    loss.backward()
    trial.optimizer.step()
    trial.scheduler.step()
    loss.item()


def bare_loop(trial: Trial, configuration: Configuration, iterations: int) -> Callable[[], None]:
    """Return the loop that a person would write."""

    def loop() -> None:
        batches = trial.batches(1, 0)
        for _ in range(iterations):
            update(trial, batches)

    return loop


def loop_ratio(arm: str, rounds: int, iterations: int = 100) -> dict[str, float]:
    """Time the lab's loop and a bare one in turn, with the same optimizer and adapter."""
    (run,) = digits_plan(iterations, 1, (arm,)).runs
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for which in (0, 1) if round_ % 2 else (1, 0):
            rule = rule_making.make_rule(run.configuration.rule, 0)
            trial = build(run.configuration)
            training = Training(trial, rule, run.configuration)
            trial.evaluate = lambda model, stop: {}
            loops = (bare_loop(trial, run.configuration, iterations), lambda training=training: training.run())
            start = time.perf_counter()
            loops[which]()
            if round_:
                times[which].append(1000 * (time.perf_counter() - start) / iterations)
    ratios = sorted(lab / bare for bare, lab in zip(*times, strict=True))
    return {
        "bare_ms": statistics.median(times[0]),
        "lab_ms": statistics.median(times[1]),
        "ratio": statistics.median(times[1]) / statistics.median(times[0]),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-len(ratios) // 4],
    }


def side_by_side(iterations: int = 600, seeds: int = 6) -> dict[str, float]:
    """Time the same runs in one process and in two, one thread each, with the start of the processes."""
    plan = digits_plan(iterations, seeds, ("plain",))
    seconds = {}
    for jobs in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            before = torch.get_num_threads()
            outcome = carry_out(plan, Settings(out=Path(folder), jobs=jobs, threads=1))
            torch.set_num_threads(before)
            seconds[jobs] = outcome.seconds
    return {"one_s": seconds[1], "two_s": seconds[2], "ratio": seconds[1] / seconds[2]}


def show(rounds: int) -> dict[str, dict[str, float]]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    print(f"{'the lab, LeNet, batch 64, 1 thread':<34}{'bare ms':>9}{'lab ms':>8}{'ratio':>7}  {'quartiles':<13}target")
    for arm in ("plain", "layer-adaptive"):
        row = loop_ratio(arm, rounds)
        result[arm] = row
        figures = f"{row['bare_ms']:>9.2f}{row['lab_ms']:>8.2f}{row['ratio']:>7.3f}"
        print(f"{arm:<34}{figures}  {row['ratio_low']:.3f}-{row['ratio_high']:.3f}  {LOOP_TARGET}")
    row = result["side by side"] = side_by_side()
    print(
        f"6 runs of 600 iterations: {row['one_s']:.1f} s in one process, {row['two_s']:.1f} s in two: "
        f"{row['ratio']:.2f} times as fast (target {SIDE_BY_SIDE_TARGET})"
    )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the lab costs.")
    parser.add_argument("--rounds", type=int, default=15)
    show(parser.parse_args().rounds)
