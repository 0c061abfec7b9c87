"""The page: one HTML file that needs no network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise.lab.experiments.plan import Quantity
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report import charts, layers
from layerwise.lab.report.figures import Figure, Table, slugs
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.looks import Look, looks
from layerwise.lab.report.origins import caveats, origins, rule_words
from layerwise.lab.report.sheets import FAR
from layerwise.lab.report.templates import rendered
from layerwise.lab.report.verdicts import verdict_lines, verdicts
from layerwise.lab.report.words import SMOKE, capital, item_of, number, place_words
from layerwise.lab.stats.conclusions import note

MOST_DRAWN = 24
"""Subjects of which the differences are drawn; all stand in the table."""

MOST_ROWS = 30
"""Comparisons that are shown at once; more are there to be opened."""

MOST_METRICS = 8
"""Metrics whose curves are drawn; all stand in the table."""


@dataclass(frozen=True)
class Row:
    """A row of charts.

    Attributes:
        heading: above it.
        lead: what it shows.
        legend: of its charts.
        figures: id and figure of each.
        curves: the scale that learning curves begin with, ``"log"`` or ``"linear"``; "" for other charts.
    """

    heading: str
    lead: str
    legend: list[Look]
    figures: list[tuple[str, Figure]]
    curves: str = ""


@dataclass(frozen=True)
class Page:
    """A page and its figures.

    Attributes:
        html: the page, with every string escaped.
        figures: all figures in it, by name.
    """

    html: str
    figures: list[Figure]


def build(outcomes: Sequence[Outcome], command: str) -> Page:
    """Make the page of one outcome or of several, a section each.

    Args:
        outcomes: of any plans.
        command: the command line that made it, or "".

    Returns:
        The page and its figures.
    """
    figures: dict[str, Figure] = {}
    keys = [f"experiment-{place}" for place in range(1, len(outcomes) + 1)]
    experiments = [
        _section(outcome, key, f"{key}-" if len(outcomes) > 1 else "", figures)
        for outcome, key in zip(outcomes, keys, strict=True)
    ]
    title = outcomes[0].plan.title if len(outcomes) == 1 else f"{len(outcomes)} experiments"
    tabs = [
        (f"{it['key']}-tab-{pane.key}", f"{it['key']}-pane-{pane.key}") for it in experiments for pane in it["panes"]
    ]
    html = rendered(
        "page.html.j2",
        figures,
        title=title,
        experiments=experiments,
        command=command,
        tabs=tabs,
        far=FAR,
        most_rows=MOST_ROWS,
        viridis=layers.VIRIDIS,
        z_limit=layers.Z_LIMIT,
        factor=layers.factor_words,
    )
    return Page(html, [replace(figure, name=name) for name, figure in figures.items()])


def _section(outcome: Outcome, key: str, prefix: str, figures: dict[str, Figure]) -> dict[str, Any]:
    """Gather what the template needs of one experiment, and its figures."""
    plan, results = outcome.plan, outcome.results
    shown, found, table = looks(plan), verdicts(results), sheet(results)
    entries = [one for _, lines in table.sections for line in lines for one in line.entries]
    grouped = any(arm.group for arm in plan.arms)
    words = {arm.name: arm.words for arm in plan.arms}
    names = slugs(subject.name for subject in plan.subjects)
    drawn = [
        charts.differences(own, shown, f"differences-{names[subject.name]}")
        for subject in plan.subjects[:MOST_DRAWN]
        if (own := [verdict for verdict in found if verdict.subject == subject.name])
    ]
    rows = chart_rows(outcome, shown, prefix)
    panes, (chosen, left_out) = layers.panes(results), layers.chosen_maps(results)
    maps = [figure for pane in panes for row in pane.rows for figure in row.figures]
    figures |= {f"{prefix}{figure.name}": figure for figure in [*drawn, *maps, *chosen]}
    figures |= {name: figure for row in rows for name, figure in row.figures}
    swept = sorted({name for subject in plan.subjects for name in subject.varied})
    return {
        "key": key,
        "prefix": prefix,
        "plan": plan,
        "corner": "solver" if all(subject.constants.get("solver") for subject in plan.subjects) else "case",
        "headline": headline(outcome),
        "notices": notices(outcome),
        "rows": verdict_lines(results),
        "verdicts": found,
        "place": place_words(plan),
        "note": note(max(1, results.family), len(plan.seeds)),
        "table": table,
        "offs": any(one.off is not None for one in entries),
        "bold": any(one.best for one in entries),
        "looks": shown,
        "charts": rows,
        "differences": [(f"{prefix}{figure.name}", figure) for figure in drawn],
        "metrics": metrics_table(results),
        "panes": panes,
        "grouped": grouped,
        "choices": chosen,
        "left_out": left_out,
        "factor_tables": layers.factor_tables(results),
        "origins": origins(outcome),
        "arms": [
            {
                "item": item_of(arm),
                "words": arm.words,
                "rule": rule_words(arm) + (f"; {', '.join(swept)} as swept" if swept and arm.rule else ""),
                "against": ", ".join(words.get(name, name) for name in arm.against) or "–",
            }
            for arm in plan.arms
        ],
        "caveats": caveats(outcome, grouped=grouped, mapped=len(layers.ruled(results))),
    }


def notices(outcome: Outcome) -> list[str]:
    """Say what the reader must know before anything else: an incomplete plan, failures, the smoke scale."""
    found: list[str] = []
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


def metrics_of(results: Results) -> list[str]:
    """Name the metrics that the runs ended with: what the plan compares first, the training loss last."""
    names = dict.fromkeys(name for record in results.records.values() for name in record.summary["finals"])
    first = results.plan.quantity.name
    return sorted(names, key=lambda name: (name != first, name == "training_loss"))


def metrics_table(results: Results) -> Table:
    """Give every metric at the end of the runs, a line a subject and arm; empty where there is only one metric."""
    plan, names = results.plan, metrics_of(results)
    if len(names) < 2:
        return Table((), ())
    rows = []
    for subject in plan.subjects:
        for arm in plan.arms_of(subject.name):
            finals = [one.summary["finals"] for one in results.of(subject.name, arm.name).values() if not one.diverged]
            cells = [_final_words([each.get(name) for each in finals], name, plan.quantity) for name in names]
            rows.append((f"{subject.words}, {arm.words}" if len(plan.subjects) > 1 else arm.words, *cells))
    return Table(("arm", *(name.replace("_", " ") for name in names)), rows)


def _final_words(values: Sequence[Any], name: str, judged: Quantity) -> str:
    """Write mean and standard deviation of the finite values."""
    finite = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if not finite:
        return "–"
    quantity = judged if name == judged.name else Quantity(name=name, words=name, unit="")
    sd = statistics.stdev(finite) if len(finite) > 1 else math.nan
    spread = f" ± {number(sd, quantity, sd)}" if math.isfinite(sd) else ""
    return f"{number(statistics.fmean(finite), quantity, sd)}{spread}"


def chart_rows(outcome: Outcome, shown: dict[str, Look], prefix: str = "") -> list[Row]:
    """Draw the rows of charts that the plan's layout asks for.

    Args:
        outcome: of any plan.
        shown: how arms and groups are drawn.
        prefix: of the ids.

    Returns:
        Rows with at least one figure.
    """
    plan, results = outcome.plan, outcome.results
    made: list[tuple[str, str, dict[str, Figure], bool]] = []
    if plan.layout in ("thresholds", "best"):
        lead = (
            "Mean over seeds at the end of the runs; upright strokes: ± one standard deviation. An arm without a "
            "threshold is a level line, the plain one with its standard deviation as a band."
        )
        heading = f"{capital(plan.quantity.words)} by threshold"
        made.append((heading, lead, charts.thresholds(results, shown), False))
        lead = "Mean over phases and seeds. With none chosen a run is plain training."
        made.append(("How many layers were chosen", lead, charts.counts(results, shown), False))
    more = " Of a group of arms, that in the middle of its values." if any(arm.group for arm in plan.arms) else ""
    lead = f"Bold lines: mean over seeds; bands: ± one standard deviation; thin lines: seeds.{more}"
    span = f"Of many updates, the mean over each of {charts.SPANS} spans. "
    if plan.step_unit == "epoch":
        span = "The mean over the batches of an epoch. "
    curves = []
    for name in metrics_of(results)[:MOST_METRICS]:
        judged, quantity = name == plan.quantity.name, plan.quantity
        words = f"{quantity.words}, {quantity.unit}".rstrip(", ") if judged else name.replace("_", " ")
        falling = not quantity.higher_is_better if judged else "loss" in name or "error" in name
        drawn = charts.curves(results, shown, name, words, falling=falling)
        heading = f"Learning curves: {words}" if name != "training_loss" else "Training loss"
        curves.append((heading, (span if name == "training_loss" else "") + lead, drawn, True))
    made = [*made[:1], *curves, *made[1:]] if made else curves
    rows = []
    for heading, lead, figures, of_steps in made:
        if figures:
            used = {words for figure in figures.values() for words in figure.data["words"]["arm"]}
            scale = next(iter(figures.values())).spec["layer"][-1]["encoding"]["y"]["scale"].get("type", "linear")
            legend = [look for look in shown.values() if look.words in used]
            named = [(f"{prefix}{figure.name}", figure) for figure in figures.values()]
            rows.append(Row(heading, lead, legend, named, scale if of_steps else ""))
    return rows
