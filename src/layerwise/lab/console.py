"""What the person at the terminal reads of the LeNet demo: the table and the verdict."""

from __future__ import annotations

from rich.table import Table

from layerwise.lab.demo import Outcome
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.terminal import Shown, cell_json, cell_text, comparisons_json, plain_table, whole_json
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import conclusion, confidence_note


def table(outcome: Outcome) -> Table:
    """Make the table of test errors, at most 80 columns wide.

    Args:
        outcome: of the demo.

    Returns:
        Three rows a solver; an arm with fewer runs than planned, or with diverged ones, says so.
    """
    results = outcome.results
    made = plain_table(
        f"test error in %, mean ± sd over {len(results.seeds)} seeds, after so many iterations",
        map(str, results.record_at),
    )
    for solver in results.solvers:
        made.add_row(f"[bold]{SOLVERS[solver]}[/bold]")
        for arm, words in ARMS.items():
            cells = {cell.iteration: cell_text(cell) for cell in results.cells(solver, arm)}
            made.add_row(f"  {words}", *(cells.get(iteration, "-") for iteration in results.record_at))
            count, diverged = len(results.of(solver, arm)), results.diverged(solver, arm)
            if count < len(results.seeds) or diverged:
                made.add_row(f"    ({count} runs{f', {diverged} diverged' if diverged else ''})")
    return made


def shown(outcome: Outcome) -> Shown:
    """Gather what the person reads of the LeNet demo.

    Args:
        outcome: of the demo.

    Returns:
        Table, one verdict a solver, and how the intervals were made.
    """
    results = outcome.results
    verdicts = [(pair[0].solver, conclusion(*pair), pair) for pair in results.comparisons()]
    return Shown(table(outcome), verdicts, confidence_note(results.family, len(results.seeds)))


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
            **cell_json(cell),
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
            "comparisons": comparisons_json(pair),
        }
        for solver, pair in zip(results.solvers, results.comparisons(), strict=True)
    ]
    return whole_json(outcome, errors=errors, verdict=verdict if results.records else [])
