"""Finished runs made up by hand and written as the engine writes them, so that tests of reports train nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_helpers import series_of

from layerwise.lab.experiments import controls
from layerwise.lab.experiments.plan import Plan, PlannedRun
from layerwise.lab.experiments.recipe import Recipe, load
from layerwise.lab.experiments.runner import Outcome, Settings, load_finished
from layerwise.lab.report.files import listing
from layerwise.lab.report.saved import PLAN, RUNS, as_json
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.files import OwnFolder
from layerwise.lab.runs.folder import Record, Runs
from layerwise.lab.runs.record import Recorder
from layerwise.lab.runs.store import signed

LAYERS = ["conv1", "conv2", "ip1"]


def finish(
    out: Path,
    planned: PlannedRun,
    value: float,
    *,
    configuration: Configuration | None = None,
    layers: list[str] = LAYERS,
    selections: list[dict[str, Any]] | None = None,
    diverged_at: int | None = None,
    quantity: str = "test_error",
    seconds: float = 10.0,
    steps: tuple[int, ...] = (0, 10, 20),
) -> Record:
    """Write a run that ends at a value, as the engine writes it; at other steps it is further off."""
    configuration = configuration or planned.configuration
    folder = Runs(out).folder(configuration)
    folder.begin({"subject": planned.subject, "arm": planned.arm.name})
    recorder = Recorder()
    for place, step in enumerate(steps):
        if diverged_at is not None and step > diverged_at:
            break
        recorder.add(quantity, step, place, value * (1.0 + (len(steps) - 1 - place)))
    for step in range(1, 21):
        recorder.add("training_loss", step, 1 + (step > 10), 2.0 / step)
    for step in (1, 10, 20):
        for number, layer in enumerate(layers, start=1):
            if configuration.rule is not None:
                recorder.add("factor", step, 1, number * 1.0, layer)
            recorder.add("rate", step, 1, 0.01 * number, layer)
            recorder.add("gradient_norm", step, 1, 10.0 ** (number - step / 10), layer)
            recorder.add("update_ratio", step, 1, 1e-3 * number, layer)
    factors = recorder.layer_means("factor")
    summary = {
        "finals": {quantity: recorder.finals().get(quantity), "training_loss": 0.1},
        "diverged_at": diverged_at,
        "iterations": steps[-1],
        "epochs": 0,
        "parameters": 431080,
        "layers": layers,
        "seconds": seconds + 1.0,
        "test_seconds": 1.0,
        "sessions": 1,
        "factor": {
            "mean": math.fsum(factors.values()) / len(factors) if factors else 1.0,
            "spread": recorder.spread("factor") or 1.0,
            "layers": factors,
        },
        "place": "lr",
        "decay": "auto",
        "selections": selections or [],
        "weights": "0",
        "threads": 1,
        "peak_memory": 400 * 2**20,
    }
    folder.finish(recorder, summary)
    record = folder.record()
    assert record is not None
    return record


def finish_plan(plan: Plan, out: Path, value: Callable[[PlannedRun], float], **more: Any) -> None:
    """Write every run of a plan, controls after the run that they repeat."""
    for chain in plan.chains():
        method = None
        for planned in chain:
            configuration = planned.configuration
            if planned.arm.control is not None:
                assert method is not None
                configuration = controls.configuration_of_control(configuration, planned.arm.control, method)
            given = {name: each(planned) if callable(each) else each for name, each in more.items()}
            record = finish(out, planned, value(planned), configuration=configuration, **given)
            if planned.arm.control is None:
                method = record


def outcome_of(plan: Plan, out: Path, pages: Path, **changes: Any) -> Outcome:
    """Gather the finished runs of a plan; its pages go to another folder."""
    results = load_finished(plan, Runs(out))
    found = {"found": len(results.records), **changes}
    return Outcome(plan, Settings(out=pages), results, **found)


def only(plan: Plan, subject: str, *arms: str) -> Plan:
    """Keep some arms of one subject."""
    runs = tuple(run for run in plan.runs if run.subject == subject and run.arm.name in arms)
    chosen = tuple(arm for arm in plan.arms if arm.name in arms)
    return replace(plan, subjects=(plan.subject(subject),), arms=chosen, runs=runs)


def listed(plan: Plan, out: Path) -> Path:
    """Write the plan of an experiment and the list of its finished runs, as beside its page; give the folder."""
    outcome = outcome_of(plan, out, out)
    names = {PLAN: signed(json.loads(as_json(plan))), RUNS: json.dumps(listing(outcome)).encode()}
    OwnFolder(outcome.folder, out).write(names)
    return outcome.folder


MEANS = {"plain": 1.5, "layer-adaptive": 1.3, "mean-factor": 1.3}
"""Last test errors: the method beats the plain arm and not the control."""


def noise(seed: int) -> float:
    """Give a seed's own deviation."""
    return 0.01 * ((7 * seed) % 5 - 2)


def table_value(planned: PlannedRun) -> float:
    """Give the last test error of a run of Table I."""
    sign = -1 if planned.arm.name == "layer-adaptive" else 1
    return MEANS[planned.arm.name] + sign * noise(planned.seed)


def table_plan(**changes: Any) -> Plan:
    """Lay Table I out: three solvers, three arms, five seeds."""
    return load("singh2015-table1").plan("reduced", **changes)


TABLE_STEPS = (0, 200, 600, 1000, 1400, 1800)


def sweep_content(layout: str, quantity: str = "accuracy") -> dict[str, Any]:
    """Give a recipe with two groups over thresholds, two single arms and two networks."""

    def amplified(**selection: Any) -> dict[str, Any]:
        return {"name": "GradientAmplification", "selection": selection, "phases": "params_1"}

    constants = {
        "data": "digits5k",
        "inputs": "framed",
        "order": "shuffled",
        "batch_size": 32,
        "model": "resnet10",
        "width": 4,
        "solver": "sgd",
        "rate": 0.1,
        "epochs": 15,
    }
    grids = [
        {
            "group": group,
            "name": f"{measure}-{{value}}",
            "words": f"{group} at {{value}}",
            "values": [0.7, 1.5, 2.5],
            "against": ["plain", "all"],
            "rule": amplified(name="Directionality", measure=measure, threshold="{value}"),
        }
        for group, measure in (("G case 1", "G"), ("G′ case 1", "G_prime"))
    ]
    return {
        "title": "Accuracy over thresholds",
        "source": "Basodi et al. 2023, Figure 3",
        "layout": layout,
        "quantity": quantity,
        "claims": ["Better at all thresholds (section 5)."],
        "notes": ["Which figure is which is inferred."],
        "constants": {name: {"value": value, "source": "made up"} for name, value in constants.items()},
        "subjects": [
            {"name": "one", "words": "ResNet-10"},
            {"name": "two", "words": "ResNet-10, wider", "constants": {"width": 8}},
        ],
        "arms": [
            {"name": "plain", "words": "plain"},
            {"name": "all", "words": "every layer", "rule": amplified(name="AllLayers"), "against": ["plain"]},
        ],
        "grids": grids,
        "paper": [
            {"subject": "one", "arm": "plain", "mean": 92.39, "sd": 0.5},
            {"subject": "one", "arm": "G case 1", "mean": 93.90},
            {"subject": "two", "arm": "plain", "note": "lost: the table is cut"},
        ],
        "scales": {"full": {"seeds": 5, "needs": {"data": "digits", "time": "none", "memory": "none"}}},
    }


def sweep_plan(layout: str, quantity: str = "accuracy", **changes: Any) -> Plan:
    """Lay a sweep over thresholds out."""
    return Recipe(f"made-up-{layout}", sweep_content(layout, quantity)).plan("full", **changes)


def sweep_value(planned: PlannedRun) -> float:
    """Give the last accuracy of a run: G at 1.5 is better than anything."""
    base = {"plain": 90.0, "all": 90.2, "G-1.5": 92.0, "G-2.5": 88.0}.get(planned.arm.name, 90.0)
    sign = {"plain": 1, "all": 0.5}.get(planned.arm.name, -1)
    return base + 10 * sign * noise(planned.seed)


SWEEP_LAYERS = [f"layer{block}.{part}" for block in (1, 2, 3) for part in ("conv1", "bn1", "conv2", "bn2")]


def sweep_selections(planned: PlannedRun) -> list[dict[str, Any]]:
    """Give the choices of a run: as many layers as its threshold leaves, none at the highest."""
    if planned.arm.value is None:
        return []
    count = {0.7: 3, 1.5: 1, 2.5: 0}[planned.arm.value]
    z = [2.0 - 0.3 * place for place in range(len(SWEEP_LAYERS))]
    rows = {name: [0.1, z[place], place < count] for place, name in enumerate(SWEEP_LAYERS)}
    return [{"epoch": epoch, "layers": rows} for epoch in (6, 11)]


def series(results: Any, key: tuple[str, str, int], quantity: str) -> Iterator[tuple[int, float]]:
    """Read a series anew from the run's file."""
    yield from series_of(results.records[key], quantity)
