"""What a terminal, or a program, gets when the runs of an experiment are done.

A terminal gets numbers, verdicts, one sentence, the page and the next command. ``--explain`` adds every number, every
comparison and how it is judged.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from layerwise.lab.errors import columns, shown
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.saved import NAME
from layerwise.lab.report.tables import Entry, ResultTable, Row, brief, further, result_table
from layerwise.lab.report.trials import cost
from layerwise.lab.report.verdicts import MEANINGS, Verdict, headline, note, standings, verdicts
from layerwise.lab.report.words import SMOKE, capital, item_of
from layerwise.lab.stats.comparison import MINIMUM_PAIRS
from layerwise.lab.stats.wording import listed

NARROWEST = 60  # columns below which a table is not squeezed any more
LONGEST_NAME = 30  # letters of an arm's name in a line of a table; longer ones take several lines

LONGEST_HEADING = 14
"""Letters of a subject's name in a line above a column, unless its numbers or a word of it are longer."""

MOST_ROWS = 8  # verdicts that have a row each; of more, those on several subjects share a row
MOST_SUBJECTS = 4  # subjects that have a column each in a table of verdicts; on more, the verdicts are counted
UNTUNED = "Nothing was tuned"  # how the note of a comparison begins in which every arm has the task's own values

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


def _text(words: str, style: str = "", *, lines: bool = False) -> Text:
    """Make text whose control characters are escaped and whose brackets are no markup."""
    return Text(shown(words, lines=lines), style=style)


def _bare() -> Table:
    return Table(box=None, padding=(0, 1, 0, 0), title_justify="left", title_style="bold", header_style="")


def _heading(words: str, width: int) -> Text:
    return Text("\n".join(textwrap.wrap(shown(words), width, break_on_hyphens=False)))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def tables(whole: ResultTable, width: int) -> Iterator[Table]:
    """Lay a table of results out for a terminal of so many columns: one table a section.

    There are several, with some of the columns each, where they do not fit side by side. The paper's number stands in
    the same cell, in brackets, where there is room, else in a line below.
    """
    width = max(width, NARROWEST)
    for title, rows in whole.sections:
        name = min(LONGEST_NAME, max([len(whole.corner), *(len(shown(row.words)) for row in rows)])) + 2
        inside = _widths(whole, rows, inside=True)
        fits = name + sum(inside) + len(inside) <= width
        widths = inside if fits else _widths(whole, rows, inside=False)
        parts: list[dict[int, int]] = [{}]
        for place, each in enumerate(widths):
            if parts[-1] and sum(parts[-1].values()) + len(parts[-1]) + each + 1 > width - name:
                parts.append({})
            parts[-1][place] = each
        for part in parts:
            yield _table(whole, title, rows, part, inside=fits)


def _widths(whole: ResultTable, rows: Sequence[Row], *, inside: bool) -> list[int]:
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


def _cell(one: Entry, *, inside: bool) -> list[str]:
    """Write a cell: in one line, or with what stands below it."""
    if inside and one.lines:
        return [shown(f"{one.text} ({', '.join(one.below)})")]
    return [shown(line) for line in (one.text, *(words for _, words in one.lines))]


def _table(whole: ResultTable, title: str, rows: Sequence[Row], widths: dict[int, int], *, inside: bool) -> Table:
    made = _bare()
    if title:
        made.title = _text(title)
    made.add_column(_text(whole.corner), max_width=LONGEST_NAME + 2, overflow="fold")
    for place, width in widths.items():
        made.add_column(_heading(whole.columns[place], width), justify="right", no_wrap=True)
    for row in rows:
        entries = [row.entries[place] for place in widths]
        cells = [_cell(one, inside=inside)[0] for one in entries]
        made.add_row(Padding(_text(row.words), (0, 0, 0, 2)), *map(Text, cells))
        if row.remark:
            made.add_row(Padding(_text(f"({row.remark})"), (0, 0, 0, 4)))
        below = dict.fromkeys(name for one in entries for name, _ in one.lines if not inside)
        for name in sorted(below, key=lambda name: name.startswith("paper")):  # the paper's last, else as they come
            lines = (dict(one.lines).get(name, "") for one in entries)
            made.add_row(_text(f"    {name}", "dim"), *(_text(line, "dim") for line in lines))
    return made


def _numbers(results: Results, width: int, *, explain: bool) -> Iterator[RenderableType]:
    """Give the small table, and the names of metrics that it has no room for; or all tables."""
    whole, small = result_table(results), brief(results)
    first, *others = (replace(small, sections=(section,)) for section in small.sections)
    alone, names = len(results.plan.subjects) == 1, [each.words for each in further(results)]
    if not explain:
        yield _text(f"{capital(first.lead)}.")
        yield from tables(first, width)
        if names and not alone:
            yield _text(f"Measured too: {listed(names)}; shown with --explain.")
        return
    yield _text(f"{capital(whole.lead)}.")
    for each in (whole, *([small] if alone and names else others)):
        for table in tables(each, width):
            yield ""
            yield table
    yield from map(_text, whole.notes)


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def verdict_table(results: Results, *, whole: bool = False) -> Table | None:
    """Lay the verdicts out, a row for each method and control; None where nothing is compared.

    ``whole`` gives every verdict a row, however many there are, and names the values of groups.
    """
    rows = [verdict.split()[0] if verdict.alone else verdict for verdict in verdicts(results)]
    if not rows:
        return None
    quantity, subjects = results.plan.quantity, {row.subject: row.subject_words for row in rows}
    than = f"{'higher' if quantity.higher_is_better else 'lower'} {quantity.words} than"
    alone, named = len(subjects) == 1, len({row.words for row in rows}) > 1  # one method stands in the heading
    begin = ["", than] if named else [f"{rows[0].words}: {than}"]
    if whole or alone or len(rows) <= MOST_ROWS:
        begin = begin if alone else ["", *begin]
        headings = [*begin, "", f"{quantity.difference_unit or 'difference'} [95 % interval]"]
        names = [[row.subject_words] * (not alone) + [row.words] * named + [row.against] for row in rows]
        cells = [[row.answer(named=whole), " ".join(filter(None, (*row.difference(), row.remarks)))] for row in rows]
    else:
        together: dict[tuple[str, str], dict[str, Verdict]] = {}
        for row in rows:
            together.setdefault((row.words, row.against), {})[row.subject] = row
        names = [[words] * named + [against] for words, against in together]
        if len(subjects) <= MOST_SUBJECTS:
            headings = [*begin, *subjects.values()]
            cells = [
                [_short(found[name]) if name in found else "–" for name in subjects] for found in together.values()
            ]
        else:
            headings = [*begin, f"on {len(subjects)} subjects"]
            counts = [Counter(row.answer() for row in found.values()) for found in together.values()]
            cells = [[", ".join(f"{word} {count}" for word, count in each.items())] for each in counts]
    made, before = _bare(), [""]
    for heading in headings:
        made.add_column(
            _heading(heading, LONGEST_HEADING if heading in subjects.values() else LONGEST_NAME), overflow="fold"
        )
    for begin, ends in zip(names, cells, strict=True):
        told = ["" if begin[: place + 1] == before[: place + 1] else name for place, name in enumerate(begin)]
        made.add_row(*map(_text, told), *(Text(end, style="bold" if end.startswith("YES") else "") for end in ends))
        before = begin
    return made


def _short(verdict: Verdict) -> str:
    """Write a verdict, with the mean difference where it is of one arm."""
    difference, _ = verdict.difference(whole=False)
    return f"{verdict.answer()} {difference}".rstrip() if verdict.alone else verdict.answer()


def standing_table(results: Results) -> Table | None:
    """Lay out what each method is on each subject, in the fixed words; None where nothing was tuned."""
    found = standings(results)
    if not found:
        return None
    made, alone, before = _bare(), len(results.plan.subjects) == 1, ""
    for heading in ([] if alone else ["tuned arms"]) + ["tuned method" if alone else "method", ""]:
        made.add_column(_heading(heading, LONGEST_NAME), overflow="fold")
    for each in found:
        begin = [] if alone else ["" if each.subject == before else each.subject_words]
        made.add_row(*map(_text, (*begin, each.words)), Text(each.word, style="bold" if each.word == "helps" else ""))
        before = each.subject
    return made


def _verdict(outcome: Outcome, *, explain: bool) -> Iterator[RenderableType]:
    """Give the table of verdicts, what makes them weigh less, and what they mean together."""
    plan, results = outcome.plan, outcome.results
    standing = standing_table(results)
    if standing is not None:
        yield standing
        yield ""
    table = verdict_table(results, whole=explain)
    if table is not None:
        yield table
        if any(words.startswith(UNTUNED) for words in plan.notes):
            yield _text(UNFAIR)
    yield _text(headline(outcome))
    if plan.tuning is not None:
        yield _text(cost(plan.tuning))
    if explain:
        if standing is not None:
            yield _text(MEANINGS)
        for verdict in verdicts(results):
            each = None if verdict.grouped else verdict.alone
            # Rows say of how many pairs they are, where these are too few.
            if each and (len(each.seeds) >= MINIMUM_PAIRS or each.diverged or each.diverged_against):
                yield _text(f"{verdict.subject_words}: {each.sentence}")
        yield _text(MEANING)
        yield _text(note(max(1, results.family), len(plan.seeds)))


# --- Together ---------------------------------------------------------------------------------------------------------


def show(
    outcome: Outcome, target: Console, *, quiet: bool = False, explain: bool = False, next_command: str = ""
) -> None:
    """Print the outcome: numbers, verdicts, where the report is, and the next command.

    ``quiet`` prints the verdicts, the failures and the place of the report only; ``explain`` every number and every
    comparison too, and how comparisons are judged. Of a tuning that is not finished nothing but its state is printed.
    """
    plan, count = outcome.plan, 0 if outcome.plan.of_trials else len(outcome.results.records)
    parts: list[RenderableType] = []
    if count:
        parts = list(_verdict(outcome, explain=explain))
        if not quiet:
            title = plan.title if plan.source in plan.title else f"{plan.title} ({plan.source})"
            smoke = [_text(SMOKE)] if plan.scale == "smoke" else []
            numbers = _numbers(outcome.results, target.width, explain=explain)
            parts = ["", _text(title, "bold"), *smoke, *numbers, "", *parts]
    for part in (*parts, *_ends(outcome, quiet=quiet)):
        target.print(part)
    if count:
        took = "no run was needed" if outcome.found == count else f"{outcome.seconds:.0f} s"
        if explain:
            took += f"; {outcome.settings.out / 'report.html'} is a copy until the next report"
        target.print(_text(f"Report: {outcome.report}  ({took})"), soft_wrap=True)
    if next_command and not quiet:
        target.print(_text(f"Next:   {next_command}"), soft_wrap=True)


def _ends(outcome: Outcome, *, quiet: bool) -> Iterator[Text]:
    """Say which runs failed, were skipped, or are not finished."""
    for alike in outcome.causes():
        failure = alike[0]
        job = f" ({failure.job})" if failure.job != failure.doing else ""
        yield _text(f"FAILED {failure.doing}{job}: {failure.reason}")
        if failure.details and not quiet:
            yield _text(failure.details, lines=True)
        if len(alike) > 1:
            yield _text(f"FAILED in the same way: {listed([other.doing for other in alike[1:]])}.")
    for words in outcome.skipped:
        yield _text(f"Skipped {words}")
    if outcome.not_begun:
        yield _text(f"Not begun: the other {outcome.not_begun} runs, as every arm failed in the same way.")
    count = len(outcome.results.records)
    if not outcome.complete:
        how = "Interrupted" if outcome.interrupted else "Incomplete"
        rest = "the same command goes on"
        if outcome.failures and not outcome.interrupted:
            rest = "correct what failed, then start the command again"
        elif count and not outcome.plan.of_trials:
            rest = "the table is of these; the same command goes on with the rest"
        if outcome.plan.name == NAME:  # made by `layerwise report`, which trains nothing
            rest = "the table is of these; the experiment's own command goes on with the rest"
        runs = "runs of the tuning" if outcome.plan.of_trials else "runs"
        yield _text(f"{how}: {count} of {outcome.planned} {runs} are finished; {rest}.")


def as_json(outcome: Outcome) -> str:
    """Write the outcome for a program: the table, every comparison, the files, and whether it is complete."""
    plan, results = outcome.plan, outcome.results
    judged: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (subject, arm, *_), each in results.comparisons().items():
        rows = judged.setdefault((subject, item_of(results.arms[arm])), [])
        rows.append(vars(each) | {"sentence": each.sentence})
    of_plan = ("title", "source", "scale", "layout", "step_unit", "seeds")
    of_outcome = ("planned", "found", "complete", "interrupted", "skipped", "not_begun", "seconds")
    whole = {
        "plan": plan.name,
        **{name: getattr(plan, name) for name in of_plan},
        "quantity": plan.quantity.name,
        "unit": plan.quantity.unit,
        "finished": len(results.records),
        **{name: getattr(outcome, name) for name in of_outcome},
        "set_aside": [str(path) for path in outcome.set_aside],
        "failures": [vars(failure) for failure in outcome.failures],
        "headline": headline(outcome),
        "table": results.table().to_dicts(),
        "verdict": [{"subject": subject, "arm": item, "comparisons": rows} for (subject, item), rows in judged.items()],
        **_tuned(results),
        "report": str(outcome.report) if results.records and not plan.of_trials else None,
        "runs": str(outcome.settings.out / "store"),
    }
    return json.dumps(finite(whole), indent=2, allow_nan=False)


def _tuned(results: Results) -> dict[str, Any]:
    """Give how the arms were tuned, and what each method is in the fixed words; nothing where nothing was tuned."""
    tuning = results.plan.tuning
    if tuning is None:
        return {}
    return {"tuning": asdict(tuning), "standings": [vars(each) for each in standings(results)]}


def finite(value: Any) -> Any:
    """Give None for numbers that JSON does not have, as the value of a diverged task."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
