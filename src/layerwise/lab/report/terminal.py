"""What the person at the terminal, or a program, reads when the runs of an experiment are done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from layerwise.lab.experiments.outcome import Outcome
from layerwise.lab.printing import columns, shown
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.sheets import Entry, Row, Sheet
from layerwise.lab.report.verdicts import Verdict, verdicts
from layerwise.lab.report.words import FOUND, SMOKE, capital
from layerwise.lab.stats.comparison import MINIMUM_PAIRS
from layerwise.lab.stats.conclusions import note
from layerwise.lab.stats.wording import listed

NARROWEST = 60
"""Columns below which a table is not squeezed any more."""

LONGEST_NAME = 30
"""Letters of an arm's name in a line of a table; longer ones take several lines."""


def console() -> Console:
    """Make a console on the standard output, as wide as the terminal is or ``COLUMNS`` says; 80 columns in a pipe."""
    return Console(highlight=False, soft_wrap=False, width=columns())


def tables(whole: Sheet, width: int) -> Iterator[Table]:
    """Lay a table of results out for a terminal.

    Args:
        whole: the table.
        width: columns of the terminal.

    Returns:
        One table a section, or several with some of the columns each where they do not fit side by side. The paper's
        number stands in the same cell, in brackets, where there is room, else in a line below.
    """
    width = max(width, NARROWEST)
    for title, rows in whole.sections:
        name = min(LONGEST_NAME, max([len(whole.corner), *(len(shown(row.words)) for row in rows)])) + 2
        inside = _widths(whole, rows, inside=True)
        below = _widths(whole, rows, inside=False)
        fits = name + sum(inside) + len(inside) <= width
        widths = inside if fits else below
        for places in _spread(widths, width - name):
            yield _table(whole, title, rows, places, inside=fits)


def _widths(whole: Sheet, rows: Sequence[Row], *, inside: bool) -> list[int]:
    """Give the width of each column."""
    return [
        max([len(shown(column)), *(len(line) for row in rows for line in _cell(row.entries[place], inside=inside))])
        for place, column in enumerate(whole.columns)
    ]


def _spread(widths: Sequence[int], room: int) -> list[list[int]]:
    """Put columns into as few tables as have room for them."""
    parts: list[list[int]] = [[]]
    used = 0
    for place, width in enumerate(widths):
        if parts[-1] and used + width + 1 > room:
            parts.append([])
            used = 0
        parts[-1].append(place)
        used += width + 1
    return parts


def _cell(one: Entry, *, inside: bool) -> list[str]:
    """Write a cell: in one line, or with what stands below it."""
    below = [f"{name} {words}".strip() for name, words in one.lines]
    if inside and below:
        return [shown(f"{one.text} ({', '.join(below)})")]
    return [shown(line) for line in (one.text, *(words for _, words in one.lines))]


def _table(whole: Sheet, title: str, rows: Sequence[Row], places: Sequence[int], *, inside: bool) -> Table:
    """Make one table."""
    made = Table(box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    if title:
        made.title = Text(shown(title))
    made.add_column(Text(shown(whole.corner)), max_width=LONGEST_NAME + 2, overflow="fold")
    for place in places:
        made.add_column(Text(shown(whole.columns[place])), justify="right", no_wrap=True)
    for row in rows:
        entries = [row.entries[place] for place in places]
        cells = [_cell(one, inside=inside)[0] for one in entries]
        made.add_row(Padding(Text(shown(row.words)), (0, 0, 0, 2)), *map(Text, cells))
        if row.remark:
            made.add_row(Padding(Text(shown(f"({row.remark})")), (0, 0, 0, 4)))
        if not inside:
            below = dict.fromkeys(name for one in entries for name, _ in one.lines)
            for name in sorted(below, key=lambda name: name.startswith("paper")):  # the paper's last, else as they come
                lines = [Text(shown(dict(one.lines).get(name, "")), style="dim") for one in entries]
                made.add_row(
                    Text("    " + shown(name), style="dim"), *(Text(shown(line), style="dim") for line in lines)
                )
    return made


def show(outcome: Outcome, target: Console, *, quiet: bool = False, next_command: str = "") -> None:
    """Print the outcome: tables, verdict, where the report is, and the next command.

    Args:
        outcome: of a plan.
        target: where.
        quiet: print the conclusions, the failures and the place of the report only.
        next_command: one to try next, or "".
    """
    plan, count = outcome.plan, len(outcome.results.records)

    def say(words: str, **style: Any) -> None:
        target.print(Text(shown(words), **style))

    if count:
        whole = sheet(outcome.results)
        if not quiet:
            target.print()
            say(plan.title if plan.source in plan.title else f"{plan.title} ({plan.source})", style="bold")
            if plan.scale == "smoke":
                say(SMOKE)
            say(f"{capital(whole.lead)}.")
            for table in tables(whole, target.width):
                target.print()
                target.print(table)
            for words in whole.notes:
                say(words)
            target.print()
        say(headline(outcome))
        told, untold = told_apart(verdicts(outcome.results))
        for verdict in told:
            begin = Text(shown(f"{verdict.subject_words}, {verdict.words}"), style="bold")
            target.print(begin.append(shown(f": {verdict.conclusion}"), style="not bold"))
            if not quiet and not verdict.grouped:
                for _, comparison in verdict.rows:
                    say(f"  {capital(comparison.sentence)}")
        if told and untold:
            names = listed([f"{verdict.subject_words}, {verdict.words}" for verdict in untold])
            say(f"Too few runs to tell, fewer than {MINIMUM_PAIRS} pairs being finished: {names}.")
        if not quiet:
            say(note(max(1, outcome.results.family), len(plan.seeds), planned=not plan.found))
            if plan.found:
                say(FOUND)
        target.print()
    _say_ends(outcome, target, quiet=quiet)
    if count:
        took = "no run was needed" if outcome.found == count else f"{outcome.seconds:.0f} s"
        if not quiet:
            took += f"; {outcome.settings.out / 'report.html'} is a copy until the next report"
        target.print(Text(shown(f"Report: {outcome.report}  ({took})")), soft_wrap=True)
    if next_command and not quiet:
        target.print(Text(shown(f"Next:   {next_command}")), soft_wrap=True)


def told_apart(found: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Tell verdicts with something to say from those of too few pairs, which all say the same."""
    told = [
        verdict
        for verdict in found
        if verdict.pairs >= MINIMUM_PAIRS or any(each.diverged or each.diverged_against for _, each in verdict.rows)
    ]
    return told, [verdict for verdict in found if verdict not in told]


def _say_ends(outcome: Outcome, target: Console, *, quiet: bool) -> None:
    """Say which runs failed, were skipped, or are not finished."""
    for alike in outcome.causes():
        failure = alike[0]
        job = f" ({failure.job})" if failure.job != failure.doing else ""
        target.print(Text(shown(f"FAILED {failure.doing}{job}: {failure.reason}")))
        if failure.details and not quiet:
            target.print(Text(shown(failure.details, lines=True)))
        if len(alike) > 1:
            target.print(Text(shown(f"FAILED in the same way: {listed([other.doing for other in alike[1:]])}.")))
    for words in outcome.skipped:
        target.print(Text(shown(f"Skipped {words}")))
    if outcome.not_begun:
        target.print(Text(f"Not begun: the other {outcome.not_begun} runs, as every arm failed in the same way."))
    count = len(outcome.results.records)
    if not outcome.complete:
        how = "Interrupted" if outcome.interrupted else "Incomplete"
        rest = "the same command goes on"
        if outcome.failures and not outcome.interrupted:
            rest = "correct what failed, then start the command again"
        elif count:
            rest = "the table is of these; the same command goes on with the rest"
        target.print(Text(f"{how}: {count} of {outcome.planned} runs are finished; {rest}."))


def as_json(outcome: Outcome) -> str:
    """Write the outcome for a program.

    Args:
        outcome: of a plan.

    Returns:
        One JSON object: the table, the verdict with every comparison, the files, and whether it is complete.
    """
    plan, results = outcome.plan, outcome.results
    whole = {
        "plan": plan.name,
        "title": plan.title,
        "source": plan.source,
        "scale": plan.scale,
        "layout": plan.layout,
        "quantity": plan.quantity.name,
        "unit": plan.quantity.unit,
        "step_unit": plan.step_unit,
        "seeds": list(plan.seeds),
        "planned": outcome.planned,
        "finished": len(results.records),
        "found": outcome.found,
        "complete": outcome.complete,
        "interrupted": outcome.interrupted,
        "set_aside": [str(path) for path in outcome.set_aside],
        "skipped": list(outcome.skipped),
        "failures": [vars(failure) for failure in outcome.failures],
        "not_begun": outcome.not_begun,
        "headline": headline(outcome),
        "table": results.table().to_dicts(),
        "verdict": [
            {
                "subject": verdict.subject,
                "arm": verdict.item,
                "conclusion": verdict.conclusion,
                "comparisons": [vars(each) | {"sentence": each.sentence} for each in verdict.comparisons],
            }
            for verdict in verdicts(results)
        ],
        "report": str(outcome.report) if results.records else None,
        "runs": str(outcome.settings.out / "store"),
        "seconds": outcome.seconds,
    }
    return json.dumps(finite(whole), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """Give None for numbers that JSON does not have, as the value of a diverged task."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
