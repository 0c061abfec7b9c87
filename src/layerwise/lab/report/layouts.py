"""The table of results that each of the paper's layouts asks for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from layerwise.lab.experiments.plan import Arm, PaperValue, Plan, Quantity
from layerwise.lab.experiments.results import Results
from layerwise.lab.report.sheets import (
    Entry,
    Row,
    Sheet,
    best_marked,
    entry,
    lead_of,
    missing,
    notes_of,
    paper_words,
    steps,
)
from layerwise.lab.report.words import capital, item_of, item_words, last_step, number, plain_arm, value_words
from layerwise.lab.stats.wording import listed

LARGEST_CHOICES = 20_000
"""So many choices of runs are enumerated for the best of several; beyond, the bound for all runs is taken."""


def sheet(results: Results) -> Sheet:
    """Make the table that a plan's layout asks for.

    Args:
        results: the finished runs.

    Returns:
        The table.
    """
    return results.once(_with_others)


def _with_others(shown: Results) -> Sheet:
    """Put the tables of a plan's other quantities below its own, with what comparing them with plain shows."""
    makers: dict[str, Callable[[Results], Sheet]] = {"thresholds": _thresholds, "best": _best, "times": _times}
    make = makers.get(shown.plan.layout, steps)
    whole = make(shown)
    sections, notes = list(whole.sections), list(whole.notes)
    for results in shown.beside():
        plan, other = results.plan, make(results)
        blank = [Entry("")] * (len(whole.columns) - len(other.columns))
        unit = f", {plan.quantity.unit}" if plan.quantity.unit else ""
        sections += [
            (
                f"{title}: {plan.quantity.words}{unit}".removeprefix(": "),
                tuple(replace(row, entries=(*blank, *row.entries)) for row in rows),
            )
            for title, rows in other.sections
        ]
        notes += [note for note in other.notes if note not in notes]
        for (subject, arm, against, step), each in results.comparisons().items():
            if step == last_step(plan) and against == plan.arm(arm).against[0]:
                more = relative_times(results, subject, [plan.arm(arm)], results.values(subject, against))
                percent = f" ({_percent(statistics.fmean(more))})" if plan.quantity.take == "first" and more else ""
                notes.append(f"{plan.subject(subject).words}, {plan.quantity.words}{percent}: {each.sentence}")
    return replace(whole, sections=tuple(sections), notes=tuple(notes))


def groups_of(plan: Plan, subject: str) -> dict[str, list[Arm]]:
    """Give the groups of a subject's arms, in order of their values."""
    groups: dict[str, list[Arm]] = {}
    for arm in plan.arms_of(subject):
        if arm.group:
            groups.setdefault(arm.group, []).append(arm)
    return {name: sorted(arms, key=lambda arm: arm.value or 0.0) for name, arms in groups.items()}


def singles_of(plan: Plan, subject: str) -> list[Arm]:
    """Give the arms of a subject that are in no group."""
    return [arm for arm in plan.arms_of(subject) if not arm.group]


def _thresholds(results: Results) -> Sheet:
    """Groups by values, a section a subject; arms without a value, and the paper's best, have columns of their own."""
    plan, used, sections = results.plan, [], []
    values = sorted({arm.value for arm in plan.arms if arm.group and arm.value is not None})
    first = any(not arm.group for arm in plan.arms)
    last = any(value.arm in {arm.group for arm in plan.arms if arm.group} for value in plan.paper)
    blank = Entry("")
    for subject in plan.subjects:
        rows = []
        for arm in singles_of(plan, subject.name):
            paper = results.paper(subject.name, arm.name)
            used += [paper] if paper else []
            one = entry(results.cell(subject.name, arm.name), plan.quantity, paper)
            entries = (one, *[blank] * (len(values) + last))
            rows.append(Row(arm.words, entries, arm.name, missing(results, subject.name, [arm])))
        for group, arms in groups_of(plan, subject.name).items():
            places = {arm.value: results.cell(subject.name, arm.name) for arm in arms}
            cells = [places.get(value) for value in values]
            paper = results.paper(subject.name, group)
            used += [paper] if paper else []
            entries = best_marked(tuple(entry(cell, plan.quantity) for cell in cells), cells, plan.quantity)
            ends = (Entry(paper_words(paper, plan.quantity) if paper else "–"),) if last else ()
            entries = (*([blank] if first else []), *entries, *ends)
            rows.append(Row(group, entries, group, missing(results, subject.name, arms)))
        sections.append((subject.words, tuple(rows)))
    columns = (*(["none"] if first else []), *map(value_words, values), *(["paper's best"] if last else []))
    lead = lead_of(plan, ", at the end of the runs, by threshold; an arm without one stands in the column “none”")
    return Sheet(capital(plan.quantity.words), lead, "threshold", columns, tuple(sections), notes_of(plan, used))


def best_of(values: Sequence[float], count: int, quantity: Quantity) -> float:
    """Compute what the best of several runs is on average: over all choices of ``count`` of the values.

    Args:
        values: of single runs, at least one.
        count: of runs chosen; all of them where there are not more.
        quantity: says which way is better.

    Returns:
        The mean of the best.
    """
    pick = max if quantity.higher_is_better else min
    count = min(count, len(values))
    if math.comb(len(values), count) > LARGEST_CHOICES:
        return pick(values)
    return statistics.fmean(pick(chosen) for chosen in combinations(values, count))


def _best(results: Results) -> Sheet:
    """Subjects by arms and groups: of a group the best mean, and the paper's way, the best single run of each seed."""
    plan, used, sections = results.plan, [], []
    columns = item_words(plan)
    rows, beside = [], dict[tuple[int, int], None]()
    for subject in plan.subjects:
        groups = groups_of(plan, subject.name)
        most = max((len(arms) for arms in groups.values()), default=1)
        plain = plain_arm(plan, subject.name)
        singles = {arm.name: arm for arm in singles_of(plan, subject.name)}
        entries = []
        for item in columns:
            paper = results.paper(subject.name, item)
            used += [paper] if paper else []
            if item in groups:
                entries.append(_best_entry(results, subject.name, groups[item], paper))
            elif item in singles:
                one = entry(results.cell(subject.name, item), plan.quantity, paper)
                values = list(results.values(subject.name, item).values())
                if plain is not None and item == plain.name and most > 1 and values:
                    best = number(best_of(values, most, plan.quantity), plan.quantity)
                    count = min(most, len(values))
                    one = replace(one, lines=((f"best of {count} run{'s' * (count > 1)}", best), *one.lines))
                    beside.setdefault((count, most), None)
                entries.append(one)
            else:
                entries.append(Entry())
        incomplete = missing(results, subject.name, plan.arms_of(subject.name))
        rows.append(Row(subject.words, tuple(entries), "", incomplete))
    sections.append(("", tuple(rows)))
    lead = lead_of(
        plan,
        ", at the end of the runs. Of a group: the mean at the threshold whose mean is best, which is chosen by "
        "the test images. “Best of so many values” is the paper's way: the best single run over all thresholds of a "
        f"seed, mean over seeds{_beside(list(beside), plan.quantity)}",
    )
    return Sheet(capital(plan.quantity.words), lead, "", tuple(columns.values()), tuple(sections), notes_of(plan, used))


def _beside(counts: Sequence[tuple[int, int]], quantity: Quantity) -> str:
    """Say what stands beside the best of so many values: the best of how many plain runs, and that it is no measure."""
    if not counts:
        return ""
    pairs = [f"best of {runs} plain run{'s' * (runs > 1)} beside best of {values} values" for runs, values in counts]
    way = "higher" if quantity.higher_is_better else "lower"
    return f". Shown is the {listed(pairs)}: the more values, the {way} their best by chance alone"


def _best_entry(results: Results, subject: str, arms: Sequence[Arm], paper: PaperValue | None) -> Entry:
    """Write the best mean of a group and, below it, the best run."""
    quantity = results.plan.quantity
    pick = max if quantity.higher_is_better else min
    cells = [(arm, cell) for arm in arms if (cell := results.cell(subject, arm.name)) and cell.count]
    if not cells:
        return entry(None, quantity, paper)
    arm, cell = pick(cells, key=lambda pair: pair[1].mean)
    by_seed: dict[int, list[float]] = {}
    for each in arms:
        for seed, value in results.values(subject, each.name).items():
            by_seed.setdefault(seed, []).append(value)
    whole = [pick(values) for values in by_seed.values() if len(values) == len(arms)]
    lines = [("at", value_words(arm.value))]
    if whole:
        lines.append((f"best of {len(arms)} values", number(statistics.fmean(whole), quantity)))
    one = entry(cell, quantity, paper)
    return replace(one, lines=(*lines, *one.lines))


def _times(results: Results) -> Sheet:
    """Subjects by arms and groups: the plain arm's time, and the others' relative to it, paired by seed."""
    plan, used, rows = results.plan, [], []
    columns = item_words(plan)
    for subject in plan.subjects:
        plain = plain_arm(plan, subject.name)
        base = results.values(subject.name, plain.name) if plain else {}
        entries = []
        for item in columns:
            members = [arm for arm in plan.arms_of(subject.name) if item_of(arm) == item]
            paper = results.paper(subject.name, item)
            used += [paper] if paper else []
            if plain is not None and item == plain.name:
                entries.append(entry(results.cell(subject.name, item), plan.quantity, paper))
                continue
            more = relative_times(results, subject.name, members, base)
            sd = f"± {statistics.stdev(more):.1f}" if len(more) > 1 else ""
            lines: tuple[tuple[str, str], ...] = ()
            if paper:
                lines = ((paper.label, paper.gain or paper_words(paper, plan.quantity)),)
            entries.append(Entry(f"{_percent(statistics.fmean(more))}" if more else "–", sd, lines))
        rows.append(Row(subject.words, tuple(entries), "", missing(results, subject.name, plan.arms_of(subject.name))))
    lead = (
        "running time without the tests, mean ± standard deviation: of the plain arm in seconds, and so the paper's, "
        "whatever unit it prints; of the others in % more than the plain run of the same seed, and of the paper in % "
        "more than its plain mean"
    )
    return Sheet(
        capital(plan.quantity.words), lead, "", tuple(columns.values()), (("", tuple(rows)),), notes_of(plan, used)
    )


def relative_times(results: Results, subject: str, arms: Sequence[Arm], base: dict[int, float]) -> list[float]:
    """Give the time of each run in % more than the plain run of its seed."""
    return [
        100.0 * (value / base[seed] - 1.0)
        for arm in arms
        for seed, value in results.values(subject, arm.name).items()
        if base.get(seed)
    ]


def _percent(value: float) -> str:
    return f"{value:+.1f} %".replace("-", "\N{MINUS SIGN}")
