"""The page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise.lab.experiments.plan import Quantity, quantity_of
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report import charts, layers
from layerwise.lab.report.figures import Figure, Style, Table, slugs, styles
from layerwise.lab.report.provenance import caveats, provenance, rule_words
from layerwise.lab.report.rendering import rendered
from layerwise.lab.report.tables import FAR, end, entry, metrics, result_table
from layerwise.lab.report.trials import cost, trial_rows
from layerwise.lab.report.verdicts import MEANINGS, headline, note, standings, verdicts
from layerwise.lab.report.words import SMOKE, capital, in_unit, item_of, place_words

MOST_DRAWN = 24  # subjects of which the differences are drawn; all stand in the table
MOST_ROWS = 30  # comparisons that are shown at once; more are there to be opened
MOST_METRICS = 8  # metrics whose curves are drawn; all stand in the table


@dataclass(frozen=True)
class ChartRow:
    """A row of charts."""

    heading: str
    lead: str
    legend: list[Style]
    figures: list[Figure]
    curves: str  # the scale that learning curves begin with, ``"log"`` or ``"linear"``; "" for other charts


@dataclass(frozen=True)
class Page:
    """A page, with every string escaped, and the figures in it."""

    html: str
    figures: list[Figure]


def build(outcomes: Sequence[Outcome], command: str) -> Page:
    """Make the page of one outcome or of several, a section each, with the command line that made it, or ""."""
    figures: dict[str, Figure] = {}
    keys = [f"experiment-{place}" for place in range(1, len(outcomes) + 1)]
    experiments = [
        _section(outcome, key, f"{key}-" if len(outcomes) > 1 else "", figures)
        for outcome, key in zip(outcomes, keys, strict=True)
    ]
    html = rendered(
        "page.html.j2",
        figures,
        title=outcomes[0].plan.title if len(outcomes) == 1 else f"{len(outcomes)} experiments",
        experiments=experiments,
        command=command,
        tabs=[
            (f"{it['key']}-tab-{pane.key}", f"{it['key']}-pane-{pane.key}")
            for it in experiments
            for pane in it["panes"]
        ],
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
    shown, found, table = styles(plan), verdicts(results), result_table(results)
    entries = [one for _, lines in table.sections for line in lines for one in line.entries]
    grouped = any(arm.group for arm in plan.arms)
    words = {arm.name: arm.words for arm in plan.arms}
    names = slugs(subject.name for subject in plan.subjects)
    drawn = [
        charts.differences(own, shown, f"differences-{names[subject.name]}")
        for subject in plan.subjects[:MOST_DRAWN]
        if (own := [verdict for verdict in found if verdict.subject == subject.name])
    ]
    rows = chart_rows(results, shown)
    panes, (chosen, left_out) = layers.panes(results), layers.chosen_maps(results)
    maps = [figure for pane in panes for *_, drawings in pane.rows for figure in drawings]
    curves = [figure for row in rows for figure in row.figures]
    figures |= {f"{prefix}{figure.name}": figure for figure in (*drawn, *maps, *chosen, *curves)}
    return {
        "key": key,
        "prefix": prefix,
        "plan": plan,
        "corner": "solver" if all(subject.constants.get("solver") for subject in plan.subjects) else "case",
        "headline": headline(outcome),
        "notices": notices(outcome),
        "verdicts": [each for verdict in found for each in verdict.split()],
        "standings": standings(results),
        "meanings": MEANINGS,
        "trials": trial_rows(plan),
        "trials_cost": "" if plan.tuning is None else cost(plan.tuning),
        "place": place_words(plan),
        "note": note(max(1, results.family), len(plan.seeds)),
        "table": table,
        "offs": any(one.off is not None for one in entries),
        "bold": any(one.best for one in entries),
        "styles": shown,
        "charts": rows,
        "differences": drawn,
        "metrics": metrics_table(results),
        "panes": panes,
        "grouped": grouped,
        "choices": chosen,
        "left_out": left_out,
        "factor_tables": layers.factor_tables(results),
        "provenance": provenance(outcome),
        "arms": [
            (item_of(arm), arm.words, rule_words(plan, arm), ", ".join(words.get(n, n) for n in arm.against) or "–")
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


def metrics_table(results: Results) -> Table:
    """Give every metric at the end of the runs, a line a subject and arm; empty where there is only one metric."""
    plan, shown = results.plan, sorted_metrics(results)
    if len(shown) < 2:
        return Table()
    rows = [
        (
            f"{subject.words}, {arm.words}" if len(plan.subjects) > 1 else arm.words,
            *(entry(end(results, subject.name, arm.name, each.name), each).text for each in shown),
        )
        for subject in plan.subjects
        for arm in plan.arms_of(subject.name)
    ]
    return Table(("arm", *(each.name.replace("_", " ") for each in shown)), rows)


def sorted_metrics(results: Results) -> list[Quantity]:
    """Give the metrics that the runs ended with: what the plan compares first, the training loss last."""
    first = results.plan.quantity.name
    return sorted(metrics(results), key=lambda each: (each.name != first, each.name == "training_loss"))


def chart_row(
    heading: str, lead: str, shown: Mapping[str, Style], figures: Mapping[str, Figure], *, curves: bool = False
) -> list[ChartRow]:
    """Put figures into a row with the legend of their arms; there is none without a figure."""
    drawn = list(figures.values())
    if not drawn:
        return []
    used = {words for figure in drawn for words in figure.data["words"]["arm"]}
    legend = [style for style in shown.values() if style.words in used]
    if any(len(figure.data["words"].get("measure", ())) > 1 for figure in drawn):
        legend = [replace(style, dash=(1, 0)) for style in legend]  # dashes tell the quantities apart
    scale = drawn[0].spec["layer"][-1]["encoding"]["y"]["scale"].get("type", "linear")
    return [ChartRow(heading, lead, legend, drawn, scale if curves else "")]


def curve_rows(results: Results, shown: Mapping[str, Style]) -> list[ChartRow]:
    """Draw the learning curves of each metric.

    What the plan shows beside its own quantity, in the same unit, is drawn in the same figures.
    """
    plan, quantity = results.plan, results.plan.quantity
    more = " Of a group of arms, that in the middle of its values." if any(arm.group for arm in plan.arms) else ""
    lead = f"Bold lines: mean over seeds; bands: ± one standard deviation; thin lines: seeds.{more}"
    span = f"Of many updates, the mean over each of {charts.SPANS} spans."
    if plan.step_unit == "epoch":
        span = "The mean over the batches of an epoch."
    found = sorted_metrics(results)
    others = [each for each in map(quantity_of, plan.beside) if each.take == "last" and each.unit == quantity.unit]
    beside = {each.name: each.words for each in others if each in found}
    rows: list[ChartRow] = []
    for each in [each for each in found if each.name not in beside][:MOST_METRICS]:
        words, told = in_unit(each), lead
        falling, within = "loss" in each.name or "error" in each.name, {}
        if each is quantity:
            falling, within = not quantity.higher_is_better, beside
            told += f" Solid: {quantity.words}; dashed: {', '.join(beside.values())}." if beside else ""
        heading = f"Learning curves: {words}"
        if each.name == "training_loss":
            heading, told = "Training loss", f"{span} {lead}"
        figures = charts.curves(results, shown, each.name, words, falling=falling, beside=within)
        rows += chart_row(heading, told, shown, figures, curves=True)
    return rows


def chart_rows(results: Results, shown: Mapping[str, Style]) -> list[ChartRow]:
    """Draw the rows of charts that the plan's layout asks for."""
    if results.plan.layout not in ("thresholds", "best"):
        return curve_rows(results, shown)
    heading = f"{capital(results.plan.quantity.words)} by threshold"
    lead = (
        "Mean over seeds at the end of the runs; upright strokes: ± one standard deviation. An arm without a "
        "threshold is a level line, the plain one with its standard deviation as a band."
    )
    chosen = "Mean over phases and seeds. With none chosen a run is plain training."
    return [
        *chart_row(heading, lead, shown, charts.thresholds(results, shown)),
        *curve_rows(results, shown),
        *chart_row("How many layers were chosen", chosen, shown, charts.counts(results, shown)),
    ]
