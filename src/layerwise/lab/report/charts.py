"""Charts of differences, learning curves, thresholds and counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.results import Cell, Results, summarise
from layerwise.lab.report.figures import (
    HEIGHT,
    ZOOM,
    Figure,
    Spec,
    Style,
    Table,
    columns_of,
    encodings,
    layer,
    of_arms,
    quantitative,
    scaled,
    slugs,
    tip,
    unique,
    written,
)
from layerwise.lab.report.verdicts import Verdict
from layerwise.lab.report.words import in_unit, item_of, members_of, plain_arm, value_words
from layerwise.lab.stats.wording import listed

POINTS = 100  # most points of a curve that are drawn as they are
SPANS = 60  # a longer series, as the training loss of every update, is averaged over as many spans of updates
SEED_POINTS = 2400  # most points of single seeds in a chart; of more, means and bands alone are drawn
MOST_LINES = 24  # curves of one chart; beyond, nobody could tell them apart
MOST_SUBJECTS = 24  # charts of a row, a subject each
TABLE_STEPS = 8  # most steps in the table of a chart
FEW_STEPS = 8  # so many steps all have a tick; between them there is none

LOG_SPREAD = 5.0
"""A quantity that falls begins on a logarithmic scale where its largest value is so many times its smallest."""

NAMED = 4  # so many arms are named in the summary of a chart
ONE_SEED, MEAN = "datum.seed !== null", "datum.seed === null"  # tell the rows of single seeds from those of their mean
MEASURE_DASHES = ([1, 0], [4, 3], [1, 2], [8, 3, 1, 3])  # of several quantities in one chart

Series = dict[int, list[tuple[int, float]]]
"""Seed -> steps and values."""


def differences(found: Sequence[Verdict], shown: Mapping[str, Style], name: str) -> Figure:
    """Draw the paired differences of one subject: a tick a seed, the mean and its interval, a line at 0.

    Of a group of arms, what it is compared with first is drawn: one line a value.
    """
    rows = [
        (verdict, *pair) for verdict in found if verdict.first or not verdict.grouped for pair in verdict.comparisons
    ]
    alone = len({verdict.item for verdict in found}) == 1 and not found[0].grouped
    labels = unique(
        f"{verdict.words} at {value}"
        if verdict.grouped
        else f"{'' if alone else f'{verdict.words} '}against {verdict.against}"
        for verdict, value, _ in rows
    )
    items = list(shown)
    lines: list[tuple[Any, ...]] = []
    for place, (verdict, _, each) in enumerate(rows):
        arm = items.index(verdict.item)
        lines += [(place, arm, *pair, None, None) for pair in zip(each.seeds, each.differences, strict=True)]
        if each.mean is not None:
            lines.append((place, arm, None, each.mean, each.low, each.high))
    first = rows[0][2]
    unit = f" in {first.unit}" if first.unit else ""
    better = "better →" if first.higher_is_better else "← better"
    x = quantitative("value", f"difference{unit}, {better}", axis={"tickCount": 5, "format": ".6~g"})
    y = {"field": "row", "type": "nominal", "sort": labels, "title": None, "axis": {"labelLimit": 170, "grid": False}}
    color = encodings(list(shown.values()))["color"]
    label, number = tip("row", "comparison"), ".4~g"
    ends = [tip("value", "mean", number), tip("low", "from", number), tip("high", "to", number)]
    of_seed = {"x": x, "y": y, "tooltip": [label, tip("seed", "seed"), tip("value", "difference", number)]}
    interval = {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": color}
    of_mean = {"x": x, "y": y, "color": color, "tooltip": [label, *ends]}
    layers = [
        {"data": {"values": [{}]}, **layer("rule", {"x": {"datum": 0}}, color="var(--muted)")},
        layer("rule", interval, MEAN, "datum.low !== null", strokeWidth=3),
        layer("tick", of_seed, ONE_SEED, thickness=2, size=12, yOffset=9, color="var(--muted)"),
        layer("point", of_mean, MEAN, filled=True, size=70, opacity=1),
    ]
    compared = list(zip(labels, (each for _, _, each in rows), strict=True))
    table = Table(
        ("comparison", "mean", "from", "to", "each seed"),
        [
            (label, *map(written, (each.mean, each.low, each.high)), ", ".join(map(written, each.differences)))
            for label, each in compared
        ],
    )
    ranked = sorted((each.mean, label) for label, each in compared if each.mean is not None)
    told = [
        f"{written(mean)} {label if label.startswith('against ') else f'for {label}'}"
        for mean, label in dict.fromkeys([*ranked[:1], *ranked[-1:]])
    ]
    summary = f"The mean difference{unit} is {' and '.join(told)}." if told else "No pair of runs is finished."
    data = columns_of(("row", "arm", "seed", "value", "low", "high"), lines)
    words = {"row": labels, "arm": [style.words for style in shown.values()]}
    title = f"Differences in {first.quantity}, {found[0].subject_words}"
    return Figure(name, title, summary, of_arms(layers, height=36 * len(rows)), {**data, "words": words}, table)


def representatives(plan: Plan, subject: str) -> dict[str, str]:
    """Choose an arm for each item of a subject: of a group, that in the middle of its values: item -> arm."""
    return {item: arms[(len(arms) - 1) // 2].name for item, arms in members_of(plan, subject).items()}


def seed_curves(results: Results, subject: str, arm: str, quantity: str) -> Series:
    """Give the finite values of a quantity by seed; series of more than ``POINTS`` steps are averaged in ``SPANS``.

    What was measured before the first update is left out: it is that of guessing, and would take half the scale.
    """
    series = {seed: results.series((subject, arm, seed), quantity) for seed in results.of(subject, arm)}
    last = max((pairs[-1][0] for pairs in series.values() if pairs), default=0)
    longest = max(map(len, series.values()), default=0)
    span = 1 if longest <= POINTS else last / SPANS
    found: Series = {}
    for seed, pairs in series.items():
        spans: dict[int, list[float]] = {}
        for step, value in pairs:
            if step > 0 and math.isfinite(value):
                spans.setdefault(round(math.ceil(step / span) * span), []).append(value)
        found[seed] = [(step, math.fsum(values) / len(values)) for step, values in sorted(spans.items())]
    return found


def curve(seeds: Series) -> list[Cell]:
    """Summarise curves over seeds."""
    gathered: dict[int, list[float]] = {}
    for pairs in seeds.values():
        for step, value in pairs:
            gathered.setdefault(step, []).append(value)
    return [summarise(step, values) for step, values in sorted(gathered.items())]


def curves(
    results: Results,
    shown: Mapping[str, Style],
    quantity: str,
    words: str,
    *,
    falling: bool,
    beside: Mapping[str, str] | None = None,
) -> dict[str, Figure]:
    """Draw learning curves: each seed, their mean, and a band of ± one standard deviation: subject -> figure.

    A quantity that is falling may have a logarithmic scale. ``beside`` holds further quantities, name -> words, that
    are drawn in the same figures and told apart by dashes. Subjects without a value are left out.
    """
    plan = results.plan
    recorded = dict.fromkeys(name for record in results.records.values() for name in record.summary["finals"])
    names, of = slugs(subject.name for subject in plan.subjects), f"curve-{slugs([*recorded, quantity])[quantity]}"
    found = {}
    for subject in plan.subjects[:MOST_SUBJECTS]:
        lines = {
            (item, measure): seeds
            for item, arm in list(representatives(plan, subject.name).items())[:MOST_LINES]
            for measure in (quantity, *(beside or ()))
            if any((seeds := seed_curves(results, subject.name, arm, measure)).values())
        }
        if lines:
            name, title = f"{of}-{names[subject.name]}", f"{words}, {subject.words}"
            measures = {quantity: words.partition(",")[0], **(beside or {})}
            found[subject.name] = _curves(plan, name, title, lines, shown, measures, words, falling=falling)
    return found


def _curves(
    plan: Plan,
    name: str,
    title: str,
    lines: Mapping[tuple[str, str], Series],
    shown: Mapping[str, Style],
    measures: Mapping[str, str],
    words: str,
    *,
    falling: bool,
) -> Figure:
    items, names, several = list(dict.fromkeys(item for item, _ in lines)), list(measures), len(measures) > 1
    used = [shown[item] for item in items]
    means = {key: curve(seeds) for key, seeds in lines.items()}
    cells = [cell for each in means.values() for cell in each]
    each_seed = sum(len(pairs) for seeds in lines.values() for pairs in seeds.values()) <= SEED_POINTS
    least, most, last = min(c.mean for c in cells), max(c.mean for c in cells), max(c.step for c in cells)
    log = falling and least > 0 and most > LOG_SPREAD * least
    rows: list[tuple[Any, ...]] = []
    for (item, measure), seeds in lines.items():
        begin = (items.index(item), names.index(measure))
        if each_seed and len(seeds) > 1:
            rows += [(*begin, seed, *pair, None, None) for seed, pairs in seeds.items() for pair in pairs]
        for cell in means[item, measure]:
            sd = cell.sd if cell.count > 1 else 0.0
            low = cell.mean / 2 if log and cell.mean <= sd else cell.mean - sd  # a logarithmic axis has no 0
            rows.append((*begin, None, cell.step, cell.mean, low, cell.mean + sd))
    data: dict[str, Any] = columns_of(("arm", "measure", "seed", "step", "value", "low", "high"), rows)
    data["words"] = {"arm": [style.words for style in used], "measure": list(measures.values())}
    if not several:  # pages of many runs are large
        del data["measure"], data["words"]["measure"]
    axis: Spec = {"grid": False, "tickCount": 5, "format": "~s" if last >= 10_000 else ",d"}
    if last <= FEW_STEPS:
        axis["values"] = list(range(1, last + 1))
    x = quantitative("step", plan.step_unit, axis=axis)
    scale = {"type": "log"} if log else {}
    y = quantitative("value", words, scale=scale, axis={"tickCount": 6, "format": ".4~g"})
    look = encodings(used)
    told = [tip("arm", "arm"), tip("who", "seed"), tip("step", plan.step_unit, ",d"), tip("value", words, ".5~g")]
    dash = look["strokeDash"]
    if several:
        told.insert(1, tip("measure", "of"))
        dash = scaled("measure", list(measures.values()), MEASURE_DASHES[: len(measures)])
    apart = {"field": "measure"}
    band = {"y": {**y, "field": "low"}, "y2": {"field": "high"}, "detail": apart}
    thin = {"y": y, "detail": [{"field": "seed"}, apart]}
    bold = {"y": y, "strokeDash": dash, "detail": apart}
    layers = [
        {"params": [ZOOM], **layer("area", band, MEAN, opacity=0.14, clip=True)},
        layer("line", thin, ONE_SEED, strokeWidth=0.8, opacity=0.4, clip=True),
        layer("line", bold, MEAN, strokeWidth=2, clip=True),
        # The style sheet shows the one under the pointer.
        layer("point", {"y": y, "tooltip": told}, filled=True, size=110, opacity=0, clip=True),
    ]
    who = {"calculate": "datum.seed === null ? 'mean' : '' + datum.seed", "as": "who"}
    spec = of_arms(layers, [who], height=HEIGHT, encoding={"x": x, "color": look["color"]})
    labels = {key: shown[key[0]].words + (f", {measures[key[1]]}" if several else "") for key in lines}
    steps = sorted({cell.step for cell in cells})
    steps = sorted({*steps[:: -(-len(steps) // TABLE_STEPS)][: TABLE_STEPS - 1], steps[-1]})
    at = {key: {cell.step: cell for cell in each} for key, each in means.items()}
    table = Table(
        ("arm", *(f"{plan.step_unit} {step:,}" for step in steps)),
        [(labels[key], *(_mean_words(at[key].get(step)) for step in steps)) for key in lines],
    )
    ends = [f"{labels[key]} at {written(each[-1].mean)}" for key, each in means.items()]
    if len(ends) > NAMED:
        finals, what = [each[-1].mean for each in means.values()], "curves" if several else "arms"
        ends = [f"{len(ends)} {what} between {written(min(finals))} and {written(max(finals))}"]
    summary = f"At {plan.step_unit} {last:,} the mean {words.partition(',')[0]} ends with {listed(ends)}."
    return Figure(name, title, summary, spec, data, table)


def _mean_words(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return written(cell.mean) + (f" ± {written(cell.sd)}" if cell.count > 1 else "")


def thresholds(results: Results, shown: Mapping[str, Style]) -> dict[str, Figure]:
    """Draw the quantity over the values of each group; arms without a value are lines, the plain one with a band.

    Each subject has a figure on a scale of its own: networks differ by more than thresholds do.
    """
    plan, words = results.plan, in_unit(results.plan.quantity)
    names, found = slugs(subject.name for subject in plan.subjects), {}
    for subject in plan.subjects[:MOST_SUBJECTS]:
        points = [
            (item_of(arm), arm.value if arm.group else None, cell)
            for arm in plan.arms_of(subject.name)
            if (cell := results.cell(subject.name, arm.name)) is not None and cell.count
        ]
        if all(value is None for _, value, _ in points):
            continue
        name, title = f"thresholds-{names[subject.name]}", f"{words} by threshold, {subject.words}"
        plain = plain_arm(plan, subject.name)
        band = shown[item_of(plain)].words if plain is not None else ""
        found[subject.name] = _over_values(name, title, points, shown, words, band=band)
    return found


def counts(results: Results, shown: Mapping[str, Style]) -> dict[str, Figure]:
    """Draw how many layers were chosen at each threshold, mean over phases and seeds: subject -> figure."""
    plan = results.plan
    names, found = slugs(subject.name for subject in plan.subjects), {}
    for subject in plan.subjects[:MOST_SUBJECTS]:
        points = [
            (arm.group, arm.value, summarise(-1, [statistics.fmean(chosen)]))
            for arm in plan.arms_of(subject.name)
            if arm.group and arm.value is not None and (chosen := chosen_counts(results, subject.name, arm.name))
        ]
        if points:
            name, title = f"chosen-{names[subject.name]}", f"layers chosen by threshold, {subject.words}"
            found[subject.name] = _over_values(name, title, points, shown, "layers chosen", height=140)
    return found


def _over_values(
    name: str,
    title: str,
    points: Sequence[tuple[str, float | None, Cell]],
    shown: Mapping[str, Style],
    words: str,
    *,
    band: str = "",
    height: int = HEIGHT,
) -> Figure:
    items = list(dict.fromkeys(item for item, _, _ in points))
    used = [shown[item] for item in items]
    rows: list[tuple[Any, ...]] = []
    for item, value, cell in points:
        sd = cell.sd if cell.count > 1 else 0.0
        rows.append((items.index(item), value, cell.mean, cell.mean - sd, cell.mean + sd, cell.count))
    values = sorted({value for _, value, _ in points if value is not None})
    axis = {"grid": False, "values": values if len(values) <= 9 else values[::3], "format": ".6~g"}
    x = quantitative("x", "threshold", axis=axis, scale={"padding": 12})
    y = quantitative("mean", words, axis={"tickCount": 5, "format": ".6~g"}, scale={"padding": 8})
    look, spread = encodings(used), {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    of, at, number = tip("arm", "arm"), tip("x", "threshold", ".6~g"), ".5~g"
    told = [tip("mean", f"mean {words}", number), tip("low", "mean − sd", number), tip("high", "mean + sd", number)]
    told.append(tip("seeds", "seeds", "d"))
    of_group, flat = "datum.x !== null", "datum.x === null"
    level = {"y": y, "strokeDash": look["strokeDash"], "tooltip": [of, *told]}
    point = {"x": x, "y": y, "shape": look["shape"], "tooltip": [of, at, *told]}
    layers = [
        layer("rect", spread, flat, {"field": "arm", "equal": band}, opacity=0.18),
        layer("rule", level, flat, strokeWidth=1.8),
        layer("rule", {"x": x, **spread}, of_group, opacity=0.6),
        layer("line", {"x": x, "y": y, "strokeDash": look["strokeDash"]}, of_group, strokeWidth=1.8),
        layer("point", point, of_group, filled=True, size=70, opacity=1),
    ]
    spec = of_arms(layers, height=height, encoding={"color": look["color"]})
    table = Table(
        ("arm", "threshold", words, "seeds"),
        [
            (shown[item].words, value_words(value) or "none", _mean_words(cell), str(cell.count))
            for item, value, cell in points
        ],
    )
    means = [cell.mean for _, _, cell in points]
    summary = (
        f"Over {len(values)} thresholds from {value_words(values[0])} to {value_words(values[-1])} the mean lies "
        f"between {written(min(means))} and {written(max(means))}."
    )
    data = columns_of(("arm", "x", "mean", "low", "high", "seeds"), rows)
    return Figure(name, title, summary, spec, {**data, "words": {"arm": [one.words for one in used]}}, table)


def chosen_counts(results: Results, subject: str, arm: str) -> list[int]:
    """Give the number of layers of each choice that an arm's runs made, over phases and seeds."""
    return [
        sum(bool(row[2]) for row in choice["layers"].values())
        for record in results.of(subject, arm).values()
        for choice in record.summary.get("selections", ())
    ]
