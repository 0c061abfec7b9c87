"""What the person at the terminal reads when the runs are done: the table, the verdict, what to do next."""

from __future__ import annotations

import json
import math
import sys

from rich.console import Console
from rich.table import Table

from layerwise.lab.demo import Outcome
from layerwise.lab.results import Cell
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import conclusion, confidence_note


def console() -> Console:
    """Make a console on the standard output; at most 80 columns are asked for where there is no terminal."""
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 80)


def cell_text(cell: Cell) -> str:
    """Write mean ± sd with two decimals, with one where the sd needs the room; one seed has no sd."""
    if math.isnan(cell.sd):
        return f"{cell.mean:.2f}"
    return f"{cell.mean:.2f} ± {cell.sd:.2f}" if cell.sd < 10 else f"{cell.mean:.1f} ± {cell.sd:.1f}"


def table(outcome: Outcome) -> Table:
    """Make the table of test errors, at most 80 columns wide.

    Args:
        outcome: of the demo.

    Returns:
        Three rows a solver; an arm with fewer runs than planned, or with diverged ones, says so.
    """
    results = outcome.results
    made = Table(
        box=None,
        padding=(0, 1, 0, 0),
        title=f"test error in %, mean ± sd over {len(results.seeds)} seeds, after so many iterations",
        title_justify="left",
        title_style="bold",
    )
    made.add_column("", no_wrap=True)
    for iteration in results.record_at:
        made.add_column(str(iteration), justify="right", no_wrap=True)
    for solver in results.solvers:
        made.add_row(f"[bold]{SOLVERS[solver]}[/bold]")
        for arm, words in ARMS.items():
            cells = {cell.iteration: cell_text(cell) for cell in results.cells(solver, arm)}
            made.add_row(f"  {words}", *(cells.get(iteration, "-") for iteration in results.record_at))
            count, diverged = len(results.of(solver, arm)), results.diverged(solver, arm)
            if count < len(results.seeds) or diverged:
                made.add_row(f"    ({count} runs{f', {diverged} diverged' if diverged else ''})")
    return made


def show(outcome: Outcome, command: str, target: Console, quiet: bool) -> None:
    """Print the outcome: table, verdict, where the report is, and the next command.

    Args:
        outcome: of the demo.
        command: one to try next, or "".
        target: where.
        quiet: leave out the table.
    """
    if outcome.results.records:
        if not quiet:
            target.print()
            target.print(table(outcome))
            target.print()
        for plain, control in outcome.results.comparisons():
            target.print(f"[bold]{plain.solver}[/bold]: {conclusion(plain, control)}")
            if not quiet:
                target.print(f"  {_capital(plain.sentence)}", markup=False)
                target.print(f"  {_capital(control.sentence)}", markup=False)
        if not quiet:
            target.print(confidence_note(outcome.results.family, len(outcome.results.seeds)), markup=False)
        target.print()
    for failure in outcome.failures:
        target.print(f"FAILED {failure.doing} ({failure.job}): {failure.reason}", markup=False)
        if failure.details and not quiet:
            target.print(failure.details, markup=False)
    count = len(outcome.results.records)
    if outcome.interrupted or outcome.failures:
        how = "Interrupted" if outcome.interrupted else "Incomplete"
        rest = "the table is of these; the same command goes on with the rest." if count else "nothing is kept."
        target.print(f"{how}: {count} of {outcome.planned} runs are finished; {rest}", markup=False)
    if count:
        target.print(f"Report: {outcome.report}  ({outcome.seconds:.0f} s)", markup=False, soft_wrap=True)
    if command and not quiet:
        target.print(f"Next:   {command}", markup=False, soft_wrap=True)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def as_json(outcome: Outcome) -> str:
    """Write the outcome for a program.

    Args:
        outcome: of the demo.

    Returns:
        One JSON object: the errors, the verdict, the files, and whether it is complete.
    """
    results = outcome.results
    errors = [
        {
            "solver": solver,
            "arm": arm,
            "iteration": cell.iteration,
            "mean": cell.mean,
            "sd": None if math.isnan(cell.sd) else cell.sd,
            "runs": cell.count,
            "diverged": results.diverged(solver, arm),
        }
        for solver in results.solvers
        for arm in ARMS
        for cell in results.cells(solver, arm)
    ]
    verdict = [
        {
            "solver": solver,
            "conclusion": conclusion(*pair),
            "comparisons": [vars(comparison) | {"sentence": comparison.sentence} for comparison in pair],
        }
        for solver, pair in zip(results.solvers, results.comparisons(), strict=True)
    ]
    whole = {
        "dataset": outcome.dataset,
        "seeds": list(results.seeds),
        "iterations": outcome.protocol.iterations,
        "planned": outcome.planned,
        "finished": len(results.records),
        "found": outcome.found,
        "set_aside": [str(path) for path in outcome.renamed],
        "interrupted": outcome.interrupted,
        "failures": [vars(failure) for failure in outcome.failures],
        "errors": errors,
        "verdict": verdict if results.records else [],
        "report": str(outcome.report) if results.records else None,
        "runs": str(outcome.folder),
        "seconds": outcome.seconds,
    }
    return json.dumps(whole, indent=2, allow_nan=False)
