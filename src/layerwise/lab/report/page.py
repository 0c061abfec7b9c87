"""The page: one HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

import layerwise
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report import charts, layers, maps, sweeps
from layerwise.lab.report.drawing import Drawing, slugs
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.looks import COLOURS, Look, looks
from layerwise.lab.report.origins import caveats, origins, rule_words
from layerwise.lab.report.sheets import FAR
from layerwise.lab.report.templates import template
from layerwise.lab.report.verdicts import verdicts
from layerwise.lab.report.words import FOUND, SMOKE, capital, item_of, place_words
from layerwise.lab.stats.conclusions import note

MOST_DRAWN = 24
"""Verdicts that have a drawing; further ones are said in words and stand in the table."""

SMALL = 290
"""Widest drawing that stands four in a row, in pixels."""


@dataclass(frozen=True)
class Row:
    """A row of charts.

    Attributes:
        heading: above it.
        lead: what it shows.
        legend: of its charts.
        drawings: title and drawing of each.
    """

    heading: str
    lead: str
    legend: list[Look]
    drawings: list[tuple[str, Drawing]]


@dataclass(frozen=True)
class Page:
    """A page and its figures.

    Attributes:
        html: the page, with every string escaped.
        figures: all drawings in it.
    """

    html: str
    figures: list[Drawing]


def build(outcome: Outcome, command: str, drawn: Callable[[Drawing], None] = lambda drawing: None) -> Page:
    """Make the page of an outcome.

    Args:
        outcome: of any plan.
        command: the command line that made it, or "".
        drawn: given each drawing but the maps as soon as it is there.

    Returns:
        The page and its figures.
    """
    plan, results = outcome.plan, outcome.results
    shown, found, table = looks(plan), verdicts(results), sheet(results)
    reach = {
        subject.name: charts.reach_of(c for v in found if v.subject == subject.name for _, c in v.rows)
        for subject in plan.subjects
    }
    panes, (chosen, left_out) = maps_of(results)
    rows = chart_rows(outcome, shown)
    for _, drawing in (one for row in rows for one in row.drawings):
        drawn(drawing)
    names = slugs(f"{v.subject} {v.item}" for v in found)
    cards = []
    for v in found[:MOST_DRAWN]:
        name = f"differences-{names[f'{v.subject} {v.item}']}"
        cards.append((v, charts.differences(v, shown[v.item], reach[v.subject], name)))
        drawn(cards[-1][1])
    entries = [one for _, lines in table.sections for line in lines for one in line.entries]
    grouped = any(arm.group for arm in plan.arms)
    words = {arm.name: arm.words for arm in plan.arms}
    html = template("page.html.j2").render(
        plan=plan,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        headline=headline(outcome),
        notices=notices(outcome),
        cards=cards,
        undrawn=found[MOST_DRAWN:],
        several=len({v.item for v in found}) > 1,
        place=place_words(plan),
        note=note(max(1, results.family), len(plan.seeds), planned=not plan.found),
        table=table,
        offs=any(one.off is not None for one in entries),
        bold=any(one.best for one in entries),
        far=FAR,
        looks=shown,
        chart_rows=rows,
        panes=panes,
        quantities=[pane.key for pane in panes],
        viridis=", ".join(maps.VIRIDIS),
        choices=chosen,
        left_out=left_out,
        z_limit=maps.Z_LIMIT,
        small=SMALL,
        middle=grouped,
        factor_tables=layers.factor_tables(results),
        factor=layers.factor_words,
        command=command,
        origins=origins(outcome),
        arms=[
            {
                "item": item_of(arm),
                "words": arm.words,
                "rule": rule_words(arm),
                "against": ", ".join(words.get(name, name) for name in arm.against) or "–",
            }
            for arm in plan.arms
        ],
        caveats=caveats(outcome, grouped=grouped, mapped=len(layers.ruled(results))),
        colours=COLOURS,
        version=layerwise.__version__,
    )
    others = [drawing for row in rows for _, drawing in row.drawings]
    return Page(html, [*(drawing for _, drawing in cards), *others, *maps_drawn(results)])


def maps_of(results: Results) -> tuple[list[layers.Pane], tuple[list[tuple[str, Drawing]], list[str]]]:
    """Draw what each layer did and which were chosen, once; see ``layers.panes`` and ``layers.chosen_maps``."""
    return results.once(_maps_of)


def _maps_of(results: Results) -> tuple[list[layers.Pane], tuple[list[tuple[str, Drawing]], list[str]]]:
    return layers.panes(results), layers.chosen_maps(results)


def maps_drawn(results: Results) -> list[Drawing]:
    """Give the drawings of all maps of layers."""
    panes, (chosen, _) = maps_of(results)
    return [
        *(drawing for pane in panes for row in pane.rows for _, drawing in row.drawings),
        *(drawing for _, drawing in chosen),
    ]


def notices(outcome: Outcome) -> list[str]:
    """Say what the reader must know before anything else: an incomplete plan, failures, the smoke scale."""
    found = [FOUND] if outcome.plan.found else []
    if not outcome.complete:
        begin = "Interrupted: " if outcome.interrupted else ""
        failed = "".join(f" {failure.doing} failed: {failure.reason}." for failure in outcome.failures)
        count = len(outcome.results.records)
        found.append(
            f"{begin}{count} of {outcome.planned} runs are finished. Everything below is made from these.{failed}"
        )
    if outcome.plan.scale == "smoke":
        found.append(SMOKE)
    return found


def chart_rows(outcome: Outcome, shown: dict[str, Look]) -> list[Row]:
    """Draw the rows of charts that the plan's layout asks for.

    Args:
        outcome: of any plan.
        shown: how arms and groups are drawn.

    Returns:
        Rows with at least one drawing.
    """
    plan, results = outcome.plan, outcome.results
    quantity = plan.quantity
    title = f"{quantity.words}, {quantity.unit}".rstrip(", ")
    bands = "Lines: mean over seeds; bands: ± one standard deviation. One scale for all panels."
    more = " Of a group of arms, that in the middle of its values." if any(arm.group for arm in plan.arms) else ""
    made: list[tuple[str, str, dict[str, Drawing]]] = []
    if plan.layout in ("thresholds", "best"):
        lead = (
            "Mean over seeds at the end of the runs; upright strokes: ± one standard deviation. An arm without a "
            "threshold is a level line, the plain one with its standard deviation as a band."
        )
        made.append((f"{capital(quantity.words)} by threshold", lead, sweeps.thresholds(results, shown)))
        lead = "Mean over phases and seeds. With none chosen a run is plain training."
        made.append(("How many layers were chosen", lead, sweeps.counts(results, shown)))
    if quantity.name != "seconds":
        falling = not quantity.higher_is_better
        made.append(
            ("Learning curves", bands + more, charts.curves(results, shown, quantity.name, title, falling=falling))
        )
    span = f"The mean over the batches of each of up to {charts.SPANS} spans of updates."
    if plan.step_unit == "epoch":
        span = "The mean over the batches of an epoch."
    made.append(
        (
            "Training loss",
            f"{span} {bands}{more}",
            charts.curves(results, shown, "training_loss", "training loss", falling=True),
        )
    )
    subjects = {subject.name: subject.words for subject in plan.subjects}
    rows = []
    for heading, lead, drawings in made:
        if drawings:
            used = {look.key: look for drawing in drawings.values() for look in drawing.legend}
            legend = [look for look in shown.values() if look.key in used]
            rows.append(Row(heading, lead, legend, [(subjects[name], one) for name, one in drawings.items()]))
    return rows
