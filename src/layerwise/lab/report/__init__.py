"""The report of the LeNet demo: one HTML page that needs no network."""

from __future__ import annotations

from typing import Any

from layerwise.lab.demo import Outcome
from layerwise.lab.report import charts
from layerwise.lab.report.page import fill
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.terminal import capital
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import LOWER, conclusion

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
    return fill(
        "lenet.html.j2",
        outcome,
        command,
        summary=summary(outcome),
        about=[
            ("Network", "Caffe's LeNet, 431,080 parameters; pixels / 256; batches of 64 in file order, unshuffled"),
            (
                "Schedule",
                f"{outcome.protocol.iterations:,} iterations; base rate 0.01, policy inv; weight decay 0.0005",
            ),
        ],
        caveats=_caveats(outcome),
        legend=charts.LOOK.legend(),
        verdicts=[
            {
                "subject": pair[0].solver,
                "conclusion": conclusion(*pair),
                "sentences": [capital(comparison.sentence) for comparison in pair],
                "chart": Markup(drawing),
            }
            for pair, drawing in zip(pairs, charts.differences(pairs), strict=True)
        ],
        record_at=results.record_at,
        table=_table(outcome),
        names=SOLVERS,
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
    )
