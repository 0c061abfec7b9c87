"""What the person at the terminal, or a program, reads when the runs of any demo are done."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from layerwise.lab.plan import Outcome
from layerwise.lab.records import Cell
from layerwise.lab.verdict import Comparison


@dataclass(frozen=True)
class Shown:
    """What a demo found, ready to be printed.

    Attributes:
        table: of the results.
        verdicts: what is judged, the conclusion, and the comparisons behind it.
        note: how the intervals were made.
        key: what the columns of the table are, or "".
    """

    table: Table
    verdicts: Sequence[tuple[str, str, Sequence[Comparison]]]
    note: str
    key: str = ""


def console() -> Console:
    """Make a console on the standard output; at most 80 columns are asked for where there is no terminal."""
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 80)


def plain_table(title: str, columns: Iterable[str]) -> Table:
    """Make an empty table without lines: the first column for names, then numbers.

    Args:
        title: of the table.
        columns: headings of the numbers.

    Returns:
        The table.
    """
    made = Table(box=None, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    made.add_column("", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def cell_text(cell: Cell | None) -> str:
    """Write mean ± sd with two decimals, with one where the sd needs the room; one seed has no sd."""
    if cell is None:
        return "-"
    if math.isnan(cell.sd):
        return f"{cell.mean:.2f}"
    return f"{cell.mean:.2f} ± {cell.sd:.2f}" if cell.sd < 10 else f"{cell.mean:.1f} ± {cell.sd:.1f}"


def show(outcome: Outcome, shown: Shown, command: str, target: Console, quiet: bool) -> None:
    """Print the outcome: table, verdict, where the report is, and the next command.

    Args:
        outcome: of a demo.
        shown: what it found.
        command: one to try next, or "".
        target: where.
        quiet: leave out the table.
    """
    if outcome.results.records:
        if not quiet:
            target.print()
            target.print(shown.table)
            if shown.key:
                target.print(shown.key, markup=False)
            target.print()
        for subject, conclusion, comparisons in shown.verdicts:
            target.print(f"[bold]{subject}[/bold]: {conclusion}")
            if not quiet:
                for comparison in comparisons:
                    target.print(f"  {capital(comparison.sentence)}", markup=False)
        if not quiet:
            target.print(shown.note, markup=False)
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


def capital(sentence: str) -> str:
    """Begin a sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def comparisons_json(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Give the numbers and the sentence of each comparison."""
    return [vars(comparison) | {"sentence": comparison.sentence} for comparison in comparisons]


def cell_json(cell: Cell) -> dict[str, Any]:
    """Give mean, sd and number of runs; the sd of one run is None."""
    return {"mean": cell.mean, "sd": None if math.isnan(cell.sd) else cell.sd, "runs": cell.count}


def whole_json(outcome: Outcome, **found: object) -> str:
    """Write an outcome for a program.

    Args:
        outcome: of a demo.
        found: what the demo found.

    Returns:
        One JSON object: what was found, the files, and whether it is complete.
    """
    results = outcome.results
    whole = {
        "dataset": outcome.dataset,
        "seeds": list(results.seeds),
        "iterations": outcome.run_length,
        "planned": outcome.planned,
        "finished": len(results.records),
        "found": outcome.found,
        "set_aside": [str(path) for path in outcome.renamed],
        "interrupted": outcome.interrupted,
        "failures": [vars(failure) for failure in outcome.failures],
        **found,
        "report": str(outcome.report) if results.records else None,
        "runs": str(outcome.folder),
        "seconds": outcome.seconds,
    }
    return json.dumps(whole, indent=2, allow_nan=False)
