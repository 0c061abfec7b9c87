"""The tables of results, ours beside the paper's, as plain data: the page, the terminal and Markdown print the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from layerwise.lab.experiments.plan import QUANTITIES, Arm, PaperValue, Quantity
from layerwise.lab.experiments.results import Cell, Results, summarise
from layerwise.lab.report.words import (
    capital,
    in_unit,
    item_of,
    item_words,
    last_step,
    number,
    place_words,
    plain_arm,
    value_words,
)
from layerwise.lab.stats.wording import listed

FAR = 2.0
"""Standard deviations of the paper from which a difference to it is marked."""

LARGEST_CHOICES = 20_000
"""So many choices of runs are enumerated for the best of several; beyond, the bound for all runs is taken."""


@dataclass(frozen=True)
class Entry:
    """One cell."""

    main: str = "–"
    spread: str = ""  # its standard deviation with "±"
    lines: tuple[tuple[str, str], ...] = ()  # what stands below it: name, as "paper", and words
    off: float | None = None  # distance to the paper's number in the paper's standard deviations
    best: bool = False  # the best mean of its column in its section

    @property
    def text(self) -> str:
        """Number and spread."""
        return f"{self.main} {self.spread}".rstrip()

    @property
    def off_words(self) -> str:
        """The distance to the paper's number in words, or ""."""
        return "" if self.off is None else f"{self.off:+.1f} sd".replace("-", "\N{MINUS SIGN}")


BLANK = Entry("")


@dataclass(frozen=True)
class Row:
    """One line."""

    words: str
    entries: tuple[Entry, ...]
    item: str = ""  # the arm or group whose colour it has
    remark: str = ""  # what is missing or diverged


@dataclass(frozen=True)
class ResultTable:
    """One table; the title of a section is "" where there is only one."""

    heading: str
    lead: str  # what its numbers are
    corner: str  # heading of the first column
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]
    notes: tuple[str, ...] = ()


def entry(cell: Cell | None, quantity: Quantity, paper: PaperValue | None = None) -> Entry:
    """Write a cell with the paper's number below it."""
    lines = ((paper.label, paper_words(paper, quantity)),) if paper is not None else ()
    if cell is None or not cell.count:
        return Entry(lines=lines)
    spread = f"± {number(cell.sd, quantity, cell.sd)}" if math.isfinite(cell.sd) else ""
    off = None
    if paper is not None and paper.mean is not None and paper.sd and not paper.full_scale:
        off = (cell.mean - paper.mean) / paper.sd
    return Entry(number(cell.mean, quantity, cell.sd), spread, lines, off)


def paper_words(paper: PaperValue, quantity: Quantity) -> str:
    """Write a number of the paper; one without a mean is lost."""
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


def result_table(results: Results) -> ResultTable:
    """Make the table that a plan's layout asks for, and below it those of the plan's other quantities."""
    return results.once(_with_others)


def _with_others(results: Results) -> ResultTable:
    whole = _Layout(results).made()
    sections, notes = list(whole.sections), list(whole.notes)
    for beside in results.beside():
        plan, other = beside.plan, _Layout(beside).made()
        blank = [BLANK] * (len(whole.columns) - len(other.columns))
        for title, rows in other.sections:
            name = f"{title}: {in_unit(plan.quantity)}".removeprefix(": ")
            sections.append((name, tuple(replace(row, entries=(*blank, *row.entries)) for row in rows)))
        notes += [note for note in other.notes if note not in notes]
        for (subject, arm, against, step), each in beside.comparisons().items():
            if step == last_step(plan) and against == plan.arm(arm).against[0]:
                more = relative_times(beside, subject, [plan.arm(arm)], beside.values(subject, against))
                percent = f" ({_percent(statistics.fmean(more))})" if plan.quantity.take == "first" and more else ""
                notes.append(f"{plan.subject(subject).words}, {plan.quantity.words}{percent}: {each.sentence}")
    return replace(whole, sections=tuple(sections), notes=tuple(notes))


class _Layout:
    """Lays the table of a plan's own quantity out, and keeps which of the paper's numbers it shows."""

    def __init__(self, results: Results) -> None:
        self.results, self.plan, self.quantity = results, results.plan, results.plan.quantity
        self.used: list[PaperValue] = []

    def made(self) -> ResultTable:
        """Make the table that the plan's layout asks for."""
        makers = {"thresholds": self.thresholds, "best": self.best, "times": self.times}
        return makers.get(self.plan.layout, self.steps)()

    def table(
        self, lead: str, corner: str, columns: Sequence[str], sections: Sequence[tuple[str, tuple[Row, ...]]]
    ) -> ResultTable:
        """Put the parts together."""
        return ResultTable(capital(self.quantity.words), lead, corner, tuple(columns), tuple(sections), self.notes())

    def lead(self, what: str) -> str:
        """Say what the numbers are."""
        unit = f" in {self.quantity.unit}" if self.quantity.unit else ""
        several = "mean ± standard deviation over seeds" if len(self.plan.seeds) > 1 else "of one seed"
        return f"{self.quantity.words}{unit}, {several}{what}"

    def notes(self) -> tuple[str, ...]:
        """Give what the paper's values have to say, and those that no cell of the table shows."""
        plan = self.plan
        notes = dict.fromkeys(value.note for value in self.used if value.note)
        names = {subject.name: subject.words for subject in plan.subjects}
        arms = {arm.name: arm.words for arm in plan.arms} | item_words(plan)
        for value in plan.paper:
            if value in self.used or value.quantity or value.subject not in names or value.arm not in arms:
                continue
            step = "" if value.step is None else f" after {plan.step_unit} {value.step:,}"
            said = paper_words(value, self.quantity) + (f": {value.note}" if value.note else "")
            notes[f"{capital(value.label)}, {names[value.subject]}, {arms[value.arm]}{step}: {said}"] = None
        return tuple(notes)

    def paper(self, subject: str, item: str, step: int | None = None) -> PaperValue | None:
        """Give the paper's number for a cell that is shown."""
        found = self.results.paper(subject, item, step)
        self.used += [found] if found is not None else []
        return found

    def entry(self, subject: str, arm: str, step: int | None = None) -> Entry:
        """Write an arm's cell with the paper's number."""
        return entry(self.results.cell(subject, arm, step), self.quantity, self.paper(subject, arm, step))

    def groups(self, subject: str) -> dict[str, list[Arm]]:
        """Give the groups of a subject's arms, in order of their values."""
        found: dict[str, list[Arm]] = {}
        for arm in self.plan.arms_of(subject):
            if arm.group:
                found.setdefault(arm.group, []).append(arm)
        return {name: sorted(arms, key=lambda arm: arm.value or 0.0) for name, arms in found.items()}

    def marked(self, entries: Sequence[Entry], cells: Sequence[Cell | None]) -> list[Entry]:
        """Mark the best mean of a line or column."""
        means = [cell.mean for cell in cells if cell and cell.count]
        # Where all are equal none is better than another.
        best = (max if self.quantity.higher_is_better else min)(means) if len(set(means)) > 1 else None
        return [
            replace(each, best=bool(cell and cell.count and cell.mean == best))
            for each, cell in zip(entries, cells, strict=True)
        ]

    def steps(self) -> ResultTable:
        """Arms by steps, a section a subject."""
        plan, sections = self.plan, []
        for subject in plan.subjects:
            arms = plan.arms_of(subject.name)
            columns = []
            for step in plan.columns or (None,):
                cells = [self.results.cell(subject.name, arm.name, step) for arm in arms]
                columns.append(self.marked([self.entry(subject.name, arm.name, step) for arm in arms], cells))
            rows = tuple(
                Row(arm.words, entries, item_of(arm), missing(self.results, subject.name, [arm]))
                for arm, entries in zip(arms, zip(*columns, strict=True), strict=True)
            )
            sections.append((subject.words, rows))
        lead = self.lead(f", after so many {plan.step_unit}s" if plan.columns else ", at the end of the runs")
        corner = plan.step_unit if plan.columns else ""
        return self.table(lead, corner, [f"{step:,}" for step in plan.columns] or ["last"], sections)

    def thresholds(self) -> ResultTable:
        """Groups by values, a section a subject; arms without a value, and the paper's best, have their own columns."""
        plan, sections = self.plan, []
        values = sorted({arm.value for arm in plan.arms if arm.group and arm.value is not None})
        first = any(not arm.group for arm in plan.arms)
        last = any(value.arm in {arm.group for arm in plan.arms if arm.group} for value in plan.paper)
        for subject in plan.subjects:
            rows = []
            for arm in plan.arms_of(subject.name):
                if not arm.group:
                    entries = (self.entry(subject.name, arm.name), *[BLANK] * (len(values) + last))
                    rows.append(Row(arm.words, entries, arm.name, missing(self.results, subject.name, [arm])))
            for group, arms in self.groups(subject.name).items():
                places = {arm.value: self.results.cell(subject.name, arm.name) for arm in arms}
                cells = [places.get(value) for value in values]
                entries = self.marked([entry(cell, self.quantity) for cell in cells], cells)
                paper = self.paper(subject.name, group)
                best = Entry(paper_words(paper, self.quantity) if paper else "–")
                entries = (*[BLANK] * first, *entries, *[best] * last)
                rows.append(Row(group, entries, group, missing(self.results, subject.name, arms)))
            sections.append((subject.words, tuple(rows)))
        columns = [*["none"] * first, *map(value_words, values), *["paper's best"] * last]
        lead = self.lead(", at the end of the runs, by threshold; an arm without one stands in the column “none”")
        return self.table(lead, "threshold", columns, sections)

    def by_subject(self, lead: str, rows: Mapping[str, Sequence[Entry]]) -> ResultTable:
        """Put rows of entries, one a subject, below the names of arms and groups."""
        lines = tuple(
            Row(
                subject.words,
                tuple(rows[subject.name]),
                remark=missing(self.results, subject.name, self.plan.arms_of(subject.name)),
            )
            for subject in self.plan.subjects
        )
        return self.table(lead, "", list(item_words(self.plan).values()), [("", lines)])

    def best(self) -> ResultTable:
        """Subjects by arms and groups: of a group the best mean and, as in the paper, each seed's best single run."""
        plan, rows, beside = self.plan, {}, dict[tuple[int, int], None]()
        for subject in plan.subjects:
            groups, plain = self.groups(subject.name), plain_arm(plan, subject.name)
            most = max((len(arms) for arms in groups.values()), default=1)
            present = {arm.name for arm in plan.arms_of(subject.name)}
            entries = rows[subject.name] = list[Entry]()
            for item in item_words(plan):
                if item in groups:
                    entries.append(self.best_entry(subject.name, item, groups[item]))
                    continue
                one = self.entry(subject.name, item) if item in present else Entry()
                values = list(self.results.values(subject.name, item).values())
                if plain is not None and item == plain.name and most > 1 and values:
                    count = min(most, len(values))
                    best = number(best_of(values, most, self.quantity), self.quantity)
                    one = replace(one, lines=((f"best of {count} run{'s' * (count > 1)}", best), *one.lines))
                    beside[count, most] = None
                entries.append(one)
        lead = (
            ", at the end of the runs. Of a group: the mean at the threshold whose mean is best, which is chosen by "
            "the test images. “Best of so many values” is the paper's way: the best single run over all thresholds of "
            "a seed, mean over seeds"
        )
        if beside:
            pairs = [
                f"best of {runs} plain run{'s' * (runs > 1)} beside best of {values} values" for runs, values in beside
            ]
            way = "higher" if self.quantity.higher_is_better else "lower"
            lead += f". Shown is the {listed(pairs)}: the more values, the {way} their best by chance alone"
        return self.by_subject(self.lead(lead), rows)

    def best_entry(self, subject: str, group: str, arms: Sequence[Arm]) -> Entry:
        """Write the best mean of a group and, below it, the best run."""
        pick, paper = max if self.quantity.higher_is_better else min, self.paper(subject, group)
        cells = [(arm, cell) for arm in arms if (cell := self.results.cell(subject, arm.name)) and cell.count]
        if not cells:
            return entry(None, self.quantity, paper)
        arm, cell = pick(cells, key=lambda pair: pair[1].mean)
        by_seed: dict[int, list[float]] = {}
        for each in arms:
            for seed, value in self.results.values(subject, each.name).items():
                by_seed.setdefault(seed, []).append(value)
        whole = [pick(values) for values in by_seed.values() if len(values) == len(arms)]
        lines = [("at", value_words(arm.value))]
        if whole:
            lines.append((f"best of {len(arms)} values", number(statistics.fmean(whole), self.quantity)))
        one = entry(cell, self.quantity, paper)
        return replace(one, lines=(*lines, *one.lines))

    def times(self) -> ResultTable:
        """Subjects by arms and groups: the plain arm's time, and the others' relative to it, paired by seed."""
        rows: dict[str, list[Entry]] = {}
        for subject in self.plan.subjects:
            plain = plain_arm(self.plan, subject.name)
            base = self.results.values(subject.name, plain.name) if plain else {}
            entries = rows[subject.name] = []
            for item in item_words(self.plan):
                if plain is not None and item == plain.name:
                    entries.append(self.entry(subject.name, item))
                    continue
                members = [arm for arm in self.plan.arms_of(subject.name) if item_of(arm) == item]
                more = relative_times(self.results, subject.name, members, base)
                sd = f"± {statistics.stdev(more):.1f}" if len(more) > 1 else ""
                paper = self.paper(subject.name, item)
                lines = ((paper.label, paper.gain or paper_words(paper, self.quantity)),) if paper else ()
                entries.append(Entry(_percent(statistics.fmean(more)) if more else "–", sd, lines))
        lead = (
            "running time without the tests, mean ± standard deviation: of the plain arm in seconds, and so the "
            "paper's, whatever unit it prints; of the others in % more than the plain run of the same seed, and of the "
            "paper in % more than its plain mean"
        )
        return self.by_subject(lead, rows)


def best_of(values: Sequence[float], count: int, quantity: Quantity) -> float:
    """Compute what the best of several runs is on average: over all choices of ``count``, or fewer, of the values."""
    pick = max if quantity.higher_is_better else min
    count = min(count, len(values))
    if math.comb(len(values), count) > LARGEST_CHOICES:
        return pick(values)
    return statistics.fmean(pick(chosen) for chosen in combinations(values, count))


def relative_times(results: Results, subject: str, arms: Sequence[Arm], base: Mapping[int, float]) -> list[float]:
    """Give the time of each run in % more than the plain run of its seed."""
    return [
        100.0 * (value / base[seed] - 1.0)
        for arm in arms
        for seed, value in results.values(subject, arm.name).items()
        if base.get(seed)
    ]


def _percent(value: float) -> str:
    return f"{value:+.1f} %".replace("-", "\N{MINUS SIGN}")


# --- The ends of the runs ---------------------------------------------------------------------------------------------


def metrics(results: Results) -> list[Quantity]:
    """Give what the runs recorded at their end, in the order of the records."""
    plan, finals = results.plan, [record.summary["finals"] for record in results.records.values()]
    known = QUANTITIES if plan.scale else {}  # a task's own metric may have any unit
    return [
        plan.quantity
        if name == plan.quantity.name
        else known.get(name) or Quantity(name=name, words=name.replace("_", " "), unit="", difference_unit="")
        for name in dict.fromkeys(name for each in finals for name, value in each.items() if value is not None)
    ]


def further(results: Results) -> list[Quantity]:
    """Give what the runs recorded at their end besides what they are judged by."""
    judged = results.plan.quantity.name
    same = {"accuracy": "test_error", "test_error": "accuracy"} if results.plan.scale else {}  # a recipe records both
    return [each for each in metrics(results) if each.name not in (judged, same.get(judged), "validation")]


def end(results: Results, subject: str, arm: str, name: str) -> Cell:
    """Summarise what the runs of an arm that did not diverge recorded at their end."""
    finals = [record.summary["finals"] for record in results.of(subject, arm).values() if not record.diverged]
    return summarise(-1, [value for each in finals if (value := each.get(name)) is not None])


def brief(results: Results) -> ResultTable:
    """Make a small table of the ends of the runs, a row for each arm or group of arms.

    On several subjects, a column for each, and a section for each metric, the judged one first. On one subject, a
    column for each step of the plan and each further metric.
    """
    plan, words = results.plan, item_words(results.plan)
    names = [subject.name for subject in plan.subjects]
    alone = len(names) == 1
    steps = (plan.columns if alone else ()) or (last_step(plan),)
    cells = {"": [(name, plan.quantity, step) for name in names for step in steps]}
    cells |= {f"{capital(each.words)}, last": [(name, each, None) for name in names] for each in further(results)}
    headings, place = [subject.words for subject in plan.subjects], place_words(plan)
    if alone:
        cells = {"": [cell for each in cells.values() for cell in each]}
        headings = [each.words if step is None else f"{step:,}" for _, each, step in cells[""]]
        place = f"after so many {plan.step_unit}s" if plan.columns else place
    sections: list[tuple[str, tuple[Row, ...]]] = []
    for title, each in cells.items():
        rows = [
            Row(words[item], tuple(_span(results, item, *cell) for cell in each), item, "" if title else left)
            for item, left in ((item, _missing(results, item)) for item in words)
        ]
        sections.append((title, tuple(rows)))
    seeds = "one seed" if len(plan.seeds) == 1 else f"mean ± standard deviation over {len(plan.seeds)} seeds"
    lead = f"{plan.quantity.words}{f' in {plan.quantity.unit}' if plan.quantity.unit else ''} {place}, {seeds}"
    lead += "; of a group the lowest and the highest mean" if any(arm.group for arm in plan.arms) else ""
    corner = plan.step_unit if alone and plan.columns else ""
    return ResultTable(capital(plan.quantity.words), lead, corner, tuple(headings), tuple(sections))


def _span(results: Results, item: str, subject: str, quantity: Quantity, step: int | None) -> Entry:
    """Write a number of an arm beside the paper's; of a group the lowest and the highest mean of its arms."""
    arms = [arm for arm in results.plan.arms_of(subject) if item_of(arm) == item]
    if quantity == results.plan.quantity:
        cells = [results.cell(subject, arm.name, step) for arm in arms]
        blank = entry(None, quantity, results.paper(subject, item, step))
    else:
        cells, blank = [end(results, subject, arm.name, quantity.name) for arm in arms], Entry()
    known = sorted((cell for cell in cells if cell is not None and cell.count), key=lambda cell: cell.mean)
    if not known:
        return blank
    low, high = (entry(cell, quantity) for cell in (known[0], known[-1]))
    if len(known) == 1:
        return replace(blank, main=low.main, spread=low.spread)
    return replace(blank, main=f"{low.main} to {high.main}")


def _missing(results: Results, item: str) -> str:
    """Say how many runs of an arm or group are missing or diverged, on which subjects."""
    found: list[str] = []
    for subject in results.plan.subjects:
        arms = [arm for arm in results.plan.arms_of(subject.name) if item_of(arm) == item]
        if words := missing(results, subject.name, arms):
            found.append(words if len(results.plan.subjects) == 1 else f"{subject.words}: {words}")
    return "; ".join(found)
