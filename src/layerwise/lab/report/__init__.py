"""The report: one HTML page that needs no network."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from layerwise.lab.demo import Outcome
from layerwise.lab.report import charts
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.store import write_whole
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import LOWER, conclusion, confidence_note

VIRIDIS = "#440154, #414487, #2a788e, #22a884, #7ad151, #fde725"
"""Colour scale of the heat-maps, from low to high."""


def summary(outcome: Outcome) -> str:
    """Say in one sentence what came out.

    Args:
        outcome: of the demo.

    Returns:
        The sentence.
    """
    pairs = outcome.results.comparisons()
    count = len(pairs)
    plain = sum(pair[0].outcome == LOWER for pair in pairs)
    both = sum(pair[0].outcome == LOWER and pair[1].outcome == LOWER for pair in pairs)
    digits = "full MNIST" if outcome.dataset == "mnist" else "5,000 MNIST digits"
    begin = f"After {outcome.protocol.iterations:,} iterations of LeNet on {digits},"
    if not plain:
        return f"{begin} the layer-adaptive rule is not shown to lower the test error with any of {count} solvers."
    more = f"with {both} of these" if both else "with none of these"
    return (
        f"{begin} the layer-adaptive rule has a lower test error than the plain solver with {plain} of "
        f"{count} solvers, and {more} it is shown to be more than a larger global rate."
    )


def _table(outcome: Outcome) -> list[dict[str, Any]]:
    """Give the rows of the table of errors; the lowest mean of a solver and column is marked."""
    results = outcome.results
    groups = []
    for solver in results.solvers:
        cells = {arm: {cell.iteration: cell for cell in results.cells(solver, arm)} for arm in ARMS}
        best = {
            iteration: min((cell.mean for row in cells.values() if (cell := row.get(iteration))), default=None)
            for iteration in results.record_at
        }
        rows = [
            {
                "arm": arm,
                "words": words,
                "cells": [cells[arm].get(iteration) for iteration in results.record_at],
                "count": len(results.of(solver, arm)),
                "diverged": results.diverged(solver, arm),
            }
            for arm, words in ARMS.items()
        ]
        groups.append({"solver": SOLVERS[solver], "rows": rows, "best": best})
    return groups


def _origins(outcome: Outcome) -> list[tuple[str, str]]:
    """Say how, on what and with what the runs were made; runs of several machines are all named."""
    records = list(outcome.results.records.values())
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items())) for record in records
    )
    machines = Counter("{processor}, {cores} cores, {system}".format(**record["hardware"]) for record in records)
    seconds = sum(record["seconds"] for record in records)
    now = f"{outcome.seconds:.0f} s in {outcome.jobs} process{'es' if outcome.jobs > 1 else ''}"
    if outcome.found == len(records):
        now = "no run was needed this time"
    return [
        ("Data", outcome.title),
        (
            "Network",
            "Caffe's LeNet, 431,080 parameters; pixels / 256; batches of 64 in file order, unshuffled",
        ),
        (
            "Schedule",
            f"{outcome.protocol.iterations:,} iterations; base rate 0.01, policy inv; weight decay 0.0005",
        ),
        ("Seeds", ", ".join(str(seed) for seed in outcome.results.seeds)),
        (
            "Runs",
            f"{len(records)} of {outcome.planned} finished; {outcome.found} of them were found finished",
        ),
        ("Versions", "; ".join(versions)),
        ("Hardware", "; ".join(machines)),
        ("Time", f"{now}; all runs together {seconds:.0f} s, each on one thread"),
    ]


def _caveats(outcome: Outcome) -> list[str]:
    """Say what the page does not show."""
    results = outcome.results
    caveats = [
        "PyTorch keeps the learning rate outside the velocity, Caffe inside it. Under this slowly "
        "falling rate the difference is far below the spread between seeds, but the numbers are not those "
        "of Caffe to the last digit.",
        "The base rate is that of Caffe for every arm; none was tuned. The control shows one other global "
        "rate, not the best one.",
        "Seeds change the initial weights only: data and their order are the same, so the intervals "
        "do not speak of other data. All runs share one test set.",
    ]
    if outcome.dataset == "digits5k":
        caveats.append(
            "4,000 training digits and 1,000 test digits are a fifteenth and a tenth of MNIST: these "
            "errors are not the paper's. With --data-dir the full MNIST is run as in the paper's Table I."
        )
    if len(results.seeds) < 10:
        caveats.append(f"{len(results.seeds)} seeds, where the paper had ten runs: small differences need more.")
    diverged = sum(results.diverged(solver, arm) for solver in results.solvers for arm in ARMS)
    if diverged:
        caveats.append(
            f"{diverged} runs diverged (a loss that is not finite). They are kept in every mean: from "
            "then on their test error counts as 90 %, that of guessing."
        )
    return caveats


def render(outcome: Outcome, command: str) -> str:
    """Make the page.

    Args:
        outcome: of the demo, with at least one finished run.
        command: the command line that made it.

    Returns:
        HTML, with every string escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    results = outcome.results
    pairs = results.comparisons()
    heat, low, high = charts.heat_maps(results)
    resolution = 100.0 / outcome.test_count
    panels = {
        "error": charts.curves(results, "test_error", "test error, %", floor=resolution),
        "loss": charts.curves(results, "training_loss", "training loss, nats", floor=1e-4),
        "heat": heat,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        summary=summary(outcome),
        complete=len(results.records) == outcome.planned,
        finished=len(results.records),
        planned=outcome.planned,
        interrupted=outcome.interrupted,
        failures=outcome.failures,
        verdicts=[
            {
                "solver": pair[0].solver,
                "conclusion": conclusion(*pair),
                "sentences": [comparison.sentence[:1].upper() + comparison.sentence[1:] for comparison in pair],
                "chart": Markup(drawing),
            }
            for pair, drawing in zip(pairs, charts.differences(pairs), strict=True)
        ],
        note=confidence_note(results.family, len(results.seeds)),
        record_at=results.record_at,
        table=_table(outcome),
        names=SOLVERS,
        arms=ARMS,
        panels={name: {solver: Markup(drawing) for solver, drawing in row.items()} for name, row in panels.items()},
        rate_low=low,
        rate_high=high,
        viridis=VIRIDIS,
        factors=[
            {
                "solver": SOLVERS[solver],
                "layers": results.layer_factors(solver),
                "spread": results.spread(solver),
                "mean": results.mean_factor(solver),
            }
            for solver in results.solvers
            if results.layer_factors(solver)
        ],
        command=command,
        origins=_origins(outcome),
        caveats=_caveats(outcome),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def prepare() -> None:
    """Import what a report needs and start its renderer, so that an interrupted demo does not wait for them.

    Meant for a thread beside the runs. A module that is missing is reported where it is needed.
    """
    with suppress(ImportError):
        import jinja2  # noqa: F401
        import scipy.special  # noqa: F401

        charts.svg({"data": {"values": [{}]}, "mark": "point"}, "", "nothing")


def write_report(outcome: Outcome, command: str) -> Path:
    """Write the page to the folder of the outcome.

    Args:
        outcome: of the demo, with at least one finished run.
        command: the command line that made it.

    Returns:
        The file.
    """
    write_whole(outcome.report, render(outcome, command).encode())
    return outcome.report
