"""The tables of results, ours beside the paper's, as plain data: the page, the terminal and Markdown print the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    members_of,
    number,
    place_words,
    plain_arm,
    value_words,
    with_unit,
)
from layerwise.lab.stats.wording import counted, listed, signed

FAR = 2.0  # standard deviations of the paper from which a difference to it is marked

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
    def below(self) -> list[str]:
        """What stands below it, a line each."""
        return [f"{name} {words}".strip() for name, words in self.lines]

    @property
    def off_words(self) -> str:
        """The distance to the paper's number in words, or ""."""
        return "" if self.off is None else f"{signed(self.off, 1)} sd"


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
    """Say how many runs are missing or diverged, and how many of the others reach what the quantity waits for."""
    planned = sum(results.planned[subject, arm.name] for arm in arms)
    count = sum(len(results.of(subject, arm.name)) for arm in arms)
    diverged = sum(len(results.diverged(subject, arm.name)) for arm in arms)
    parts = [f"{count} of {planned} runs"] if count < planned else []
    parts += [f"{diverged} of {count} diverged"] if diverged else []
    if results.plan.quantity.take == "first":
        reached = sum(len(results.values(subject, arm.name)) for arm in arms)
        parts += [f"reached by {reached} of {count - diverged}"] if reached < count - diverged else []
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
                percent = f" ({signed(statistics.fmean(more), 1)} %)" if plan.quantity.take == "first" and more else ""
                notes.append(f"{plan.subject(subject).words}, {plan.quantity.words}{percent}: {each.sentence}")
    return replace(whole, sections=tuple(sections), notes=tuple(notes))


class _Layout:
    """Lays the table of a plan's own quantity out, and keeps which of the paper's numbers it shows."""

    def __init__(self, results: Results) -> None:
        self.results, self.plan, self.quantity = results, results.plan, results.plan.quantity
        self.pick = max if self.quantity.higher_is_better else min
        self.members = {subject.name: members_of(self.plan, subject.name) for subject in self.plan.subjects}
        self.used: list[PaperValue] = []

    def made(self) -> ResultTable:
        """Make the table that the plan's layout asks for."""
        makers = {"thresholds": self.thresholds, "best": self.best, "times": self.times}
        return makers.get(self.plan.layout, self.steps)()

    def table(
        self, lead: str, corner: str, columns: Iterable[str], sections: Sequence[tuple[str, Iterable[Row]]]
    ) -> ResultTable:
        """Put the parts together."""
        rows = tuple((title, tuple(lines)) for title, lines in sections)
        return ResultTable(capital(self.quantity.words), lead, corner, tuple(columns), rows, self.notes())

    def lead(self, what: str) -> str:
        """Say what the numbers are."""
        several = "mean ± standard deviation over seeds" if len(self.plan.seeds) > 1 else "of one seed"
        return f"{with_unit(self.quantity)}, {several}{what}"

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

    def marked(self, entries: Iterable[Entry], cells: Sequence[Cell | None]) -> list[Entry]:
        """Mark the best mean of a line or column; where all are equal none is better than another."""
        means = [cell.mean for cell in cells if cell and cell.count]
        best = self.pick(means) if len(set(means)) > 1 else None
        return [
            replace(each, best=bool(cell and cell.count and cell.mean == best))
            for each, cell in zip(entries, cells, strict=True)
        ]

    def steps(self) -> ResultTable:
        """Arms by steps, a section a subject."""
        plan, sections = self.plan, []
        for subject in plan.subjects:
            arms, columns = plan.arms_of(subject.name), []
            for step in plan.columns or (None,):
                cells = [self.results.cell(subject.name, arm.name, step) for arm in arms]
                columns.append(self.marked((self.entry(subject.name, arm.name, step) for arm in arms), cells))
            rows = [
                Row(arm.words, entries, item_of(arm), missing(self.results, subject.name, [arm]))
                for arm, entries in zip(arms, zip(*columns, strict=True), strict=True)
            ]
            sections.append((subject.words, rows))
        lead = self.lead(f", after so many {plan.step_unit}s" if plan.columns else ", at the end of the runs")
        corner = plan.step_unit if plan.columns else ""
        return self.table(lead, corner, [f"{step:,}" for step in plan.columns] or ["last"], sections)

    def thresholds(self) -> ResultTable:
        """Groups by values, a section a subject; arms without a value, and the paper's best, have their own columns."""
        plan, sections, groups = self.plan, [], {arm.group for arm in self.plan.arms if arm.group}
        values = sorted({arm.value for arm in plan.arms if arm.group and arm.value is not None})
        first = any(not arm.group for arm in plan.arms)
        last = any(value.arm in groups for value in plan.paper)
        for subject in plan.subjects:
            alone, grouped = list[Row](), list[Row]()
            for item, arms in self.members[subject.name].items():
                remark = missing(self.results, subject.name, arms)
                if item not in groups:
                    entries = (self.entry(subject.name, item), *[BLANK] * (len(values) + last))
                    alone.append(Row(arms[0].words, entries, item, remark))
                    continue
                places = {arm.value: self.results.cell(subject.name, arm.name) for arm in arms}
                cells = [places.get(value) for value in values]
                marked = self.marked((entry(cell, self.quantity) for cell in cells), cells)
                paper = self.paper(subject.name, item)
                best = Entry(paper_words(paper, self.quantity) if paper else "–")
                grouped.append(Row(item, (*[BLANK] * first, *marked, *[best] * last), item, remark))
            sections.append((subject.words, [*alone, *grouped]))
        columns = [*["none"] * first, *map(value_words, values), *["paper's best"] * last]
        lead = self.lead(", at the end of the runs, by threshold; an arm without one stands in the column “none”")
        return self.table(lead, "threshold", columns, sections)

    def by_subject(self, make: Callable[[str, str, Sequence[Arm]], Entry]) -> list[Row]:
        """Make a row a subject, with an entry an arm or group."""
        return [
            Row(
                subject.words,
                tuple(
                    make(subject.name, item, self.members[subject.name].get(item, ())) for item in item_words(self.plan)
                ),
                remark=missing(self.results, subject.name, self.plan.arms_of(subject.name)),
            )
            for subject in self.plan.subjects
        ]

    def best(self) -> ResultTable:
        """Subjects by arms and groups: of a group the best mean and, as in the paper, each seed's best single run."""
        rows, items = self.by_subject(self.best_entry), item_words(self.plan)
        lead = (
            ", at the end of the runs. Of a group: the mean at the threshold whose mean is best, which is chosen by "
            "the test images. “Best of so many values” is the paper's way: the best single run over all thresholds of "
            "a seed, mean over seeds"
        )
        beside = dict.fromkeys(runs for subject in self.members if (runs := self.best_plain(subject)))
        if beside:
            pairs = [f"best of {counted(runs, 'plain run')} beside best of {values} values" for runs, values in beside]
            way = "higher" if self.quantity.higher_is_better else "lower"
            lead += f". Shown is the {listed(pairs)}: the more values, the {way} their best by chance alone"
        return self.table(self.lead(lead), "", items.values(), [("", rows)])

    def best_plain(self, subject: str) -> tuple[int, int] | None:
        """Give of how many plain runs the best is shown, beside that of how many values of a group."""
        plain = plain_arm(self.plan, subject)
        count = len(self.results.values(subject, plain.name)) if plain else 0
        most = max((len(arms) for arms in self.members[subject].values()), default=1)
        return (min(most, count), most) if count and most > 1 else None

    def best_entry(self, subject: str, item: str, arms: Sequence[Arm]) -> Entry:
        """Write the best mean of a group and, below it, the best run; of the plain arm the best of as many runs."""
        if not arms:
            return Entry()
        lines: list[tuple[str, str]] = []
        if not arms[0].group:
            one, plain, best = self.entry(subject, item), plain_arm(self.plan, subject), self.best_plain(subject)
            if best is not None and plain == arms[0]:
                value = best_of(list(self.results.values(subject, item).values()), best[1], self.quantity)
                lines = [(f"best of {counted(best[0], 'run')}", number(value, self.quantity))]
            return replace(one, lines=(*lines, *one.lines))
        cells = [(arm, cell) for arm in arms if (cell := self.results.cell(subject, arm.name)) and cell.count]
        if not cells:
            return entry(None, self.quantity, self.paper(subject, item))
        arm, cell = self.pick(cells, key=lambda pair: pair[1].mean)
        by_seed: dict[int, list[float]] = {}
        for each in arms:
            for seed, value in self.results.values(subject, each.name).items():
                by_seed.setdefault(seed, []).append(value)
        whole = [self.pick(values) for values in by_seed.values() if len(values) == len(arms)]
        lines = [("at", value_words(arm.value))]
        if whole:
            lines.append((f"best of {len(arms)} values", number(statistics.fmean(whole), self.quantity)))
        one = entry(cell, self.quantity, self.paper(subject, item))
        return replace(one, lines=(*lines, *one.lines))

    def times(self) -> ResultTable:
        """Subjects by arms and groups: the plain arm's time, and the others' relative to it, paired by seed."""
        lead = (
            "running time without the tests, mean ± standard deviation: of the plain arm in seconds, and so the "
            "paper's, whatever unit it prints; of the others in % more than the plain run of the same seed, and of the "
            "paper in % more than its plain mean"
        )
        rows = self.by_subject(self.time_entry)
        return self.table(lead, "", item_words(self.plan).values(), [("", rows)])

    def time_entry(self, subject: str, item: str, arms: Sequence[Arm]) -> Entry:
        """Write the time of the plain arm, or how much more that of another item is."""
        plain = plain_arm(self.plan, subject)
        if plain is not None and item == plain.name:
            return self.entry(subject, item)
        more = relative_times(self.results, subject, arms, self.results.values(subject, plain.name) if plain else {})
        sd = f"± {statistics.stdev(more):.1f}" if len(more) > 1 else ""
        paper = self.paper(subject, item)
        lines = ((paper.label, paper.gain or paper_words(paper, self.quantity)),) if paper else ()
        return Entry(f"{signed(statistics.fmean(more), 1)} %" if more else "–", sd, lines)


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
    members = {name: members_of(plan, name) for name in names}
    sections: list[tuple[str, tuple[Row, ...]]] = []
    for title, each in cells.items():
        rows: list[Row] = []
        for item in words:
            entries = (_span(results, item, members[cell[0]].get(item, ()), *cell) for cell in each)
            left = {} if title else {name: missing(results, name, members[name].get(item, ())) for name in names}
            remarks = [
                remark if alone else f"{plan.subject(name).words}: {remark}" for name, remark in left.items() if remark
            ]
            rows.append(Row(words[item], tuple(entries), item, "; ".join(remarks)))
        sections.append((title, tuple(rows)))
    seeds = "one seed" if len(plan.seeds) == 1 else f"mean ± standard deviation over {len(plan.seeds)} seeds"
    lead = f"{with_unit(plan.quantity)} {place}, {seeds}"
    lead += "; of a group the lowest and the highest mean" if any(arm.group for arm in plan.arms) else ""
    corner = plan.step_unit if alone and plan.columns else ""
    return ResultTable(capital(plan.quantity.words), lead, corner, tuple(headings), tuple(sections))


def _span(
    results: Results, item: str, arms: Sequence[Arm], subject: str, quantity: Quantity, step: int | None
) -> Entry:
    """Write a number of an arm beside the paper's; of a group the lowest and the highest mean of its arms."""
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
