"""The tables of results, ours beside the paper's, as plain data: the page, the terminal and Markdown print the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from layerwise.lab.experiments.plan import Arm, PaperValue, Plan, Quantity
from layerwise.lab.experiments.results import Cell, Results
from layerwise.lab.report.words import capital, item_of, item_words, number

FAR = 2.0
"""Standard deviations of the paper from which a difference to it is marked."""


@dataclass(frozen=True)
class Entry:
    """One cell.

    Attributes:
        main: the number, or "–".
        spread: its standard deviation with "±", or "".
        lines: what stands below it: name, as "paper", and words.
        off: distance to the paper's number in the paper's standard deviations; None where it has none.
        best: the best mean of its column in its section.
    """

    main: str = "–"
    spread: str = ""
    lines: tuple[tuple[str, str], ...] = ()
    off: float | None = None
    best: bool = False

    @property
    def text(self) -> str:
        """Number and spread."""
        return f"{self.main} {self.spread}".rstrip()

    @property
    def off_words(self) -> str:
        """The distance to the paper's number in words, or ""."""
        return "" if self.off is None else f"{self.off:+.1f} sd".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        words: of it.
        entries: one a column.
        item: the arm or group whose colour it has, or "".
        remark: what is missing or diverged, or "".
    """

    words: str
    entries: tuple[Entry, ...]
    item: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes:
        heading: of it.
        lead: what its numbers are.
        corner: heading of the first column.
        columns: headings of the others.
        sections: title and lines; the title is "" where there is only one section.
        notes: below it.
    """

    heading: str
    lead: str
    corner: str
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    notes: tuple[str, ...] = field(default=())


def entry(cell: Cell | None, quantity: Quantity, paper: PaperValue | None = None) -> Entry:
    """Write a cell with the paper's number below it.

    Args:
        cell: ours, or None.
        quantity: of it.
        paper: the paper's number; one without a mean is lost.

    Returns:
        The entry.
    """
    lines = ((paper.label, paper_words(paper, quantity)),) if paper is not None else ()
    if cell is None or not cell.count:
        return Entry(lines=lines)
    spread = f"± {number(cell.sd, quantity, cell.sd)}" if math.isfinite(cell.sd) else ""
    off = None
    if paper is not None and paper.mean is not None and paper.sd and not paper.full_scale:
        off = (cell.mean - paper.mean) / paper.sd
    return Entry(number(cell.mean, quantity, cell.sd), spread, lines, off)


def paper_words(paper: PaperValue, quantity: Quantity) -> str:
    """Write a number of the paper."""
    if paper.mean is None:
        return "a curve" if "a curve only" in paper.note else "lost"
    sd = "" if paper.sd is None else f" ± {number(paper.sd, quantity, paper.sd)}"
    gain = f" ({paper.gain})" if paper.gain else ""
    return number(paper.mean, quantity, paper.sd or math.nan) + sd + gain


def missing(results: Results, subject: str, arms: Sequence[Arm]) -> str:
    """Say how many runs are missing or diverged."""
    planned = sum(results.planned[subject, arm.name] for arm in arms)
    count = sum(len(results.of(subject, arm.name)) for arm in arms)
    diverged = sum(len(results.diverged(subject, arm.name)) for arm in arms)
    parts = [f"{count} of {planned} runs"] if count < planned else []
    parts += [f"{diverged} of {count} diverged"] if diverged else []
    return ", ".join(parts)


def lead_of(plan: Plan, what: str) -> str:
    """Say what the numbers of a table are."""
    unit = f" in {plan.quantity.unit}" if plan.quantity.unit else ""
    several = "mean ± standard deviation over seeds" if len(plan.seeds) > 1 else "of one seed"
    return f"{plan.quantity.words}{unit}, {several}{what}"


def notes_of(plan: Plan, used: Sequence[PaperValue]) -> tuple[str, ...]:
    """Give what the paper's values have to say, and those that no cell of the table shows."""
    notes = list(dict.fromkeys(value.note for value in used if value.note))
    for value in plan.paper:
        if value not in used and not value.quantity:
            names = {subject.name: subject.words for subject in plan.subjects}
            arms = {arm.name: arm.words for arm in plan.arms} | item_words(plan)
            if value.subject not in names or value.arm not in arms:
                continue
            step = "" if value.step is None else f" after {plan.step_unit} {value.step:,}"
            said = paper_words(value, plan.quantity) + (f": {value.note}" if value.note else "")
            notes.append(f"{capital(value.label)}, {names[value.subject]}, {arms[value.arm]}{step}: {said}")
    return tuple(notes)


def _marked(rows: Sequence[Row], cells: Sequence[Sequence[Cell | None]], quantity: Quantity) -> tuple[Row, ...]:
    """Mark the best mean of every column."""
    columns = zip(*(row.entries for row in rows), strict=True)
    marked = [
        best_marked(column, line, quantity) for column, line in zip(columns, zip(*cells, strict=True), strict=True)
    ]
    return tuple(replace(row, entries=entries) for row, entries in zip(rows, zip(*marked, strict=True), strict=True))


def steps(results: Results) -> Sheet:
    """Arms by steps, a section a subject."""
    plan, used, sections = results.plan, [], []
    steps = plan.columns or (None,)
    for subject in plan.subjects:
        rows, cells = [], []
        for arm in plan.arms_of(subject.name):
            line = results.cells(subject.name, arm.name)
            papers = [results.paper(subject.name, arm.name, step) for step in steps]
            used += [paper for paper in papers if paper is not None]
            entries = tuple(entry(cell, plan.quantity, paper) for cell, paper in zip(line, papers, strict=True))
            rows.append(Row(arm.words, entries, item_of(arm), missing(results, subject.name, [arm])))
            cells.append(line)
        sections.append((subject.words, _marked(rows, cells, plan.quantity)))
    what = f", after so many {plan.step_unit}s" if plan.columns else ", at the end of the runs"
    columns = tuple(f"{step:,}" for step in plan.columns) or ("last",)
    corner = plan.step_unit if plan.columns else ""
    return Sheet(
        capital(plan.quantity.words), lead_of(plan, what), corner, columns, tuple(sections), notes_of(plan, used)
    )


def best_marked(entries: Sequence[Entry], cells: Sequence[Cell | None], quantity: Quantity) -> tuple[Entry, ...]:
    """Mark the best mean of a line."""
    means = [cell.mean for cell in cells if cell and cell.count]
    # Where all are equal none is better than another.
    best = (max if quantity.higher_is_better else min)(means) if len(set(means)) > 1 else None
    return tuple(
        replace(each, best=bool(cell and cell.count and cell.mean == best))
        for each, cell in zip(entries, cells, strict=True)
    )
