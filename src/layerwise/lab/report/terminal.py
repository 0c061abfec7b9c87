"""What a terminal, or a program, gets when the runs of an experiment are done.

A terminal gets numbers, verdicts, one sentence, the page and the next command. ``--explain`` adds every number, every
comparison and how it is judged.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from layerwise.lab.errors import columns, shown
from layerwise.lab.experiments.plan import QUANTITIES, Quantity
from layerwise.lab.experiments.results import Cell, Results, summarise
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.saved import NAME
from layerwise.lab.report.sheets import Entry, Row, Sheet, entry, missing
from layerwise.lab.report.verdicts import Verdict, verdicts
from layerwise.lab.report.words import SMOKE, capital, item_of, item_words, last_step, place_words, value_words
from layerwise.lab.stats.comparison import ALPHA, MINIMUM_PAIRS, Comparison
from layerwise.lab.stats.conclusions import note
from layerwise.lab.stats.wording import counted, decimals_of, listed, probability, signed

NARROWEST = 60
"""Columns below which a table is not squeezed any more."""

LONGEST_NAME = 30
"""Letters of an arm's name in a line of a table; longer ones take several lines."""

LONGEST_HEADING = 14
"""Letters of a subject's name in a line above a column, unless its numbers or a word of it are longer."""

MOST_ROWS = 8
"""Verdicts that have a row each; of more, those on several subjects share a row."""

MOST_SUBJECTS = 4
"""Subjects that have a column each in a table of verdicts; on more, the verdicts are counted."""

UNTUNED = "Nothing was tuned"
"""How the note of a comparison begins in which every arm has the task's own values."""

MEANING = (
    "YES: shown to be better. no: shown to be worse. unclear: neither is shown, which is no proof that they are equal."
)

UNFAIR = (
    "Untuned: every arm has the task's own values, which favours the arm that they were chosen for. "
    "--tune NAME=VALUE,VALUE gives every arm the same budget."
)


def console() -> Console:
    """Make a console on the standard output, as wide as the terminal is or ``COLUMNS`` says; 80 columns in a pipe."""
    return Console(highlight=False, soft_wrap=False, width=columns())


# --- Numbers ----------------------------------------------------------------------------------------------------------


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
            yield _table(whole, title, rows, {place: widths[place] for place in places}, inside=fits)


def _widths(whole: Sheet, rows: Sequence[Row], *, inside: bool) -> list[int]:
    """Give the width of each column."""
    return [
        max(
            [
                min(len(shown(column)), LONGEST_HEADING),
                *map(len, shown(column).split()),
                *(len(line) for row in rows for line in _cell(row.entries[place], inside=inside)),
            ]
        )
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


def _heading(words: str, width: int) -> Text:
    """Break the heading of a column into lines."""
    return Text("\n".join(textwrap.wrap(shown(words), width, break_on_hyphens=False)))


def _table(whole: Sheet, title: str, rows: Sequence[Row], widths: dict[int, int], *, inside: bool) -> Table:
    """Make one table of some of the columns."""
    made = _bare()
    if title:
        made.title = Text(shown(title))
    made.add_column(Text(shown(whole.corner)), max_width=LONGEST_NAME + 2, overflow="fold")
    for place, width in widths.items():
        made.add_column(_heading(whole.columns[place], width), justify="right", no_wrap=True)
    for row in rows:
        entries = [row.entries[place] for place in widths]
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


def _bare() -> Table:
    """Make a table without lines."""
    return Table(box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold", header_style="")


def metrics(results: Results) -> list[Quantity]:
    """Give what the runs recorded at their end besides what they are judged by, in the order of the records."""
    finals = [record.summary["finals"] for record in results.records.values()]
    names = dict.fromkeys(name for each in finals for name, value in each.items() if value is not None)
    judged, told = results.plan.quantity.name, None
    if results.plan.scale:  # a recipe records both, which say the same
        told = {"accuracy": "test_error", "test_error": "accuracy"}.get(judged)
    return [
        (QUANTITIES.get(name) if results.plan.scale else None)  # a task's own metric may have any unit
        or Quantity(name=name, words=name.replace("_", " "), unit="", difference_unit="")
        for name in names
        if name not in (judged, told, "validation")
    ]


def brief(results: Results) -> Sheet:
    """Make a small table of the ends of the runs, a row for each arm or group of arms.

    Args:
        results: the finished runs.

    Returns:
        On several subjects, a column for each, and a section for each metric, the judged one first. On one subject, a
        column for each step of the plan and each further metric.
    """
    plan, words = results.plan, item_words(results.plan)
    names = [subject.name for subject in plan.subjects]
    alone = len(names) == 1
    steps = (plan.columns if alone else ()) or (last_step(plan),)
    cells = {"": [(name, plan.quantity, step) for name in names for step in steps]}
    cells |= {f"{capital(each.words)}, last": [(name, each, None) for name in names] for each in metrics(results)}
    headings, place = [subject.words for subject in plan.subjects], place_words(plan)
    if alone:
        cells = {"": [cell for each in cells.values() for cell in each]}
        headings = [each.words if step is None else f"{step:,}" for _, each, step in cells[""]]
        place = f"after so many {plan.step_unit}s" if plan.columns else place
    sections: list[tuple[str, tuple[Row, ...]]] = []
    for title, each in cells.items():
        rows = {item: tuple(_spanned(results, item, *cell) for cell in each) for item in words}
        left = {item: "" if title else _left(results, item) for item in words}
        sections.append((title, tuple(Row(words[item], rows[item], item, left[item]) for item in words)))
    seeds = "one seed" if len(plan.seeds) == 1 else f"mean ± standard deviation over {len(plan.seeds)} seeds"
    lead = f"{plan.quantity.words}{f' in {plan.quantity.unit}' if plan.quantity.unit else ''} {place}, {seeds}"
    lead += "; of a group the lowest and the highest mean" if any(arm.group for arm in plan.arms) else ""
    corner = plan.step_unit if alone and plan.columns else ""
    return Sheet(capital(plan.quantity.words), lead, corner, tuple(headings), tuple(sections))


def _spanned(results: Results, item: str, subject: str, quantity: Quantity, step: int | None) -> Entry:
    """Write a number of an arm beside the paper's; of a group the lowest and the highest mean of its arms."""
    arms = [arm for arm in results.plan.arms_of(subject) if item_of(arm) == item]
    if quantity == results.plan.quantity:
        cells = [results.cell(subject, arm.name, step) for arm in arms]
        blank = entry(None, quantity, results.paper(subject, item, step))
    else:
        cells, blank = [_final(results, subject, arm.name, quantity.name) for arm in arms], Entry()
    known = sorted((cell for cell in cells if cell is not None and cell.count), key=lambda cell: cell.mean)
    if not known:
        return blank
    low, high = (entry(cell, quantity) for cell in (known[0], known[-1]))
    if len(known) == 1:
        return replace(blank, main=low.main, spread=low.spread)
    return replace(blank, main=f"{low.main} to {high.main}")


def _final(results: Results, subject: str, arm: str, name: str) -> Cell:
    """Summarise what the runs of an arm recorded at their end."""
    finals = [record.summary["finals"] for record in results.of(subject, arm).values() if not record.diverged]
    return summarise(-1, [value for each in finals if (value := each.get(name)) is not None])


def _left(results: Results, item: str) -> str:
    """Say how many runs of an arm or group are missing or diverged, on which subjects."""
    found: list[str] = []
    for subject in results.plan.subjects:
        arms = [arm for arm in results.plan.arms_of(subject.name) if item_of(arm) == item]
        if words := missing(results, subject.name, arms):
            found.append(words if len(results.plan.subjects) == 1 else f"{subject.words}: {words}")
    return "; ".join(found)


def _numbers(results: Results, width: int, *, explain: bool) -> Iterator[RenderableType]:
    """Give the small table, and the names of metrics that it has no room for; or all tables."""
    whole, small = sheet(results), brief(results)
    first, *others = (replace(small, sections=(section,)) for section in small.sections)
    alone, further = len(results.plan.subjects) == 1, [each.words for each in metrics(results)]
    if not explain:
        yield _text(f"{capital(first.lead)}.")
        yield from tables(first, width)
        if further and not alone:
            yield _text(f"Measured too: {listed(further)}; shown with --explain.")
        return
    yield _text(f"{capital(whole.lead)}.")
    for each in (whole, *([small] if alone and further else others)):
        for table in tables(each, width):
            yield ""
            yield table
    yield from map(_text, whole.notes)


# --- Verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What is judged of an arm, or of a group of arms, against another on one subject, where the plan judges it.

    Attributes:
        subject: its name.
        words: of the arm or the group.
        against: words of the other arm or group.
        comparisons: one; of a group one for each value.
    """

    subject: str
    words: str
    against: str
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> str:
        """``YES``: it is shown to be better; ``no``: to be worse; ``unclear``: neither is shown."""
        found = Counter("YES" if each.better else "no" if each.worse else "unclear" for each in self.comparisons)
        if len(found) == 1 and (len(self.comparisons) == 1 or "unclear" in found):
            return next(iter(found))
        told = [f"{word} at {found[word]}" for word in ("YES", "no") if found[word]]
        return f"{', '.join(told)} of {len(self.comparisons)}"

    @property
    def short(self) -> str:
        """The verdict, with the mean difference where it is of one arm."""
        return self.verdict if len(self.comparisons) > 1 else f"{self.verdict} {self.numbers(whole=False)}".rstrip()

    def numbers(self, *, whole: bool) -> str:
        """Write the mean difference, of a group the lowest and the highest.

        Args:
            whole: add the interval, and what keeps the difference from being called.
        """
        means = sorted(each.mean for each in self.comparisons if each.mean is not None)
        each, group = self.comparisons[0], len(self.comparisons) > 1
        ends = [] if group or each.low is None or each.high is None or not whole else [each.low, each.high]
        decimals = decimals_of([*means, *ends])
        words = [" to ".join(signed(mean, decimals) for mean in dict.fromkeys([*means[:1], *means[-1:]]))]
        if ends:
            words.append(f"[{', '.join(signed(end, decimals) if end else '0' for end in ends)}]")
        remarks: list[str] = []
        if whole and not group:
            if len(each.seeds) < MINIMUM_PAIRS:
                remarks.append(counted(len(each.seeds), "pair"))
            elif ends and each.adjusted_p is not None and each.adjusted_p >= ALPHA and min(ends) * max(ends) > 0:
                remarks.append(f"p {probability(each.adjusted_p, ALPHA)}")
            if each.diverged or each.diverged_against:
                remarks.append(f"diverged: {len(each.diverged)} against {len(each.diverged_against)}")
        words.append(f"({', '.join(remarks)})" if remarks else "")
        return " ".join(filter(None, words))


def judged(results: Results) -> list[Judged]:
    """Give what is judged, in the plan's order, of groups of arms together.

    Args:
        results: the finished runs.

    Returns:
        One for each subject, arm or group, and other arm or group that it is compared with.
    """
    plan, step, words = results.plan, last_step(results.plan), item_words(results.plan)
    found: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for subject in plan.subjects:
        for arm in plan.arms_of(subject.name):
            for other, column, each in results.compared.get((subject.name, arm.name), ()):
                if column == step:
                    key = (subject.name, item_of(arm), item_of(results.arms[other]))
                    found.setdefault(key, {})[value_words(arm.value) if arm.group else ""] = each
    made: list[Judged] = []
    for (subject, item, other), by_value in found.items():
        value, *others = by_value
        name = f"{words[item]} at {value}" if value and not others else words[item]
        made.append(Judged(subject, name, words[other], tuple(by_value.values())))
    return made


def verdict_table(results: Results, *, whole: bool = False) -> Table | None:
    """Lay the verdicts out.

    Args:
        results: the finished runs.
        whole: give every verdict a row, however many there are.

    Returns:
        A row for each method and control; None where nothing is compared.
    """
    rows, quantity = judged(results), results.plan.quantity
    subjects = {row.subject: results.plan.subject(row.subject).words for row in rows}
    than = f"{'higher' if quantity.higher_is_better else 'lower'} {quantity.words} than"
    alone, named = len(subjects) == 1, len({row.words for row in rows}) > 1  # one method stands in the heading
    begin = ["", than] if named or not rows else [f"{rows[0].words}: {than}"]
    if whole or alone or len(rows) <= MOST_ROWS:
        begin = begin if alone else ["", *begin]
        headings = [*begin, "", f"{quantity.difference_unit or 'difference'} [95 % interval]"]
        names = [[subjects[row.subject]] * (not alone) + [row.words] * named + [row.against] for row in rows]
        cells = [[row.verdict, row.numbers(whole=True)] for row in rows]
    else:
        together: dict[tuple[str, str], dict[str, Judged]] = {}
        for row in rows:
            together.setdefault((row.words, row.against), {})[row.subject] = row
        names = [[words] * named + [against] for words, against in together]
        if len(subjects) <= MOST_SUBJECTS:
            headings = [*begin, *subjects.values()]
            cells = [[found[name].short if name in found else "–" for name in subjects] for found in together.values()]
        else:
            headings = [*begin, f"on {len(subjects)} subjects"]
            counts = [Counter(row.verdict for row in found.values()) for found in together.values()]
            cells = [[", ".join(f"{word} {count}" for word, count in each.items())] for each in counts]
    made, before = _bare(), [""]
    for heading in headings:
        longest = LONGEST_HEADING if heading in subjects.values() else LONGEST_NAME
        made.add_column(_heading(heading, longest), overflow="fold")
    for begin, ends in zip(names, cells, strict=True):
        told = ["" if begin[: place + 1] == before[: place + 1] else name for place, name in enumerate(begin)]
        made.add_row(*map(_text, told), *(Text(end, style="bold" if end.startswith("YES") else "") for end in ends))
        before = begin
    return made if rows else None


def _text(words: str) -> Text:
    """Make text whose control characters are escaped and whose brackets are no markup."""
    return Text(shown(words))


# --- Together ---------------------------------------------------------------------------------------------------------


def show(
    outcome: Outcome, target: Console, *, quiet: bool = False, explain: bool = False, next_command: str = ""
) -> None:
    """Print the outcome: numbers, verdicts, where the report is, and the next command.

    Args:
        outcome: of a plan.
        target: where.
        quiet: print the verdicts, the failures and the place of the report only.
        explain: print every number and every comparison too, and how comparisons are judged.
        next_command: one to try next, or "".
    """
    plan, count = outcome.plan, len(outcome.results.records)
    parts: list[RenderableType] = []
    if count:
        parts = list(_verdict(outcome, explain=explain))
        if not quiet:
            title = plan.title if plan.source in plan.title else f"{plan.title} ({plan.source})"
            smoke = [_text(SMOKE)] if plan.scale == "smoke" else []
            numbers = _numbers(outcome.results, target.width, explain=explain)
            parts = ["", Text(shown(title), style="bold"), *smoke, *numbers, "", *parts]
    for part in parts:
        target.print(part)
    _say_ends(outcome, target, quiet=quiet)
    if count:
        took = "no run was needed" if outcome.found == count else f"{outcome.seconds:.0f} s"
        if explain:
            took += f"; {outcome.settings.out / 'report.html'} is a copy until the next report"
        target.print(_text(f"Report: {outcome.report}  ({took})"), soft_wrap=True)
    if next_command and not quiet:
        target.print(_text(f"Next:   {next_command}"), soft_wrap=True)


def _told(verdict: Verdict) -> bool:
    """Leave verdicts of too few pairs out: their rows say so."""
    return verdict.pairs >= MINIMUM_PAIRS or any(each.diverged or each.diverged_against for _, each in verdict.rows)


def _verdict(outcome: Outcome, *, explain: bool) -> Iterator[RenderableType]:
    """Give the table of verdicts, what makes them weigh less, and what they mean together."""
    plan, results = outcome.plan, outcome.results
    table = verdict_table(results, whole=explain)
    if table is not None:
        yield table
        if any(words.startswith(UNTUNED) for words in plan.notes):
            yield _text(UNFAIR)
    yield _text(headline(outcome))
    if explain:
        for verdict in filter(_told, verdicts(results)):
            begin = Text(shown(f"{verdict.subject_words}, {verdict.words}"), style="bold")
            yield begin.append(shown(f": {verdict.conclusion}"), style="not bold")
            if not verdict.grouped:
                for _, comparison in verdict.rows:
                    yield _text(f"  {capital(comparison.sentence)}")
        yield _text(MEANING)
        yield _text(note(max(1, results.family), len(plan.seeds)))


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
        if outcome.plan.name == NAME:  # made by `layerwise report`, which trains nothing
            rest = "the table is of these; the experiment's own command goes on with the rest"
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
