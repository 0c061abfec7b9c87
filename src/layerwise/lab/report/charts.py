"""Charts of differences, learning curves, thresholds and counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.results import Cell, Results, summarise
from layerwise.lab.report.figures import (
    HEIGHT,
    HIDDEN,
    Figure,
    Table,
    encodings,
    quantitative,
    short,
    slugs,
    tip,
    written,
)
from layerwise.lab.report.looks import Look, unique
from layerwise.lab.report.verdicts import Verdict
from layerwise.lab.report.words import item_of, plain_arm, value_words
from layerwise.lab.stats.wording import listed

POINTS = 100
"""Most points of a curve that are drawn as they are."""

SPANS = 60
"""A longer series, as the training loss of every update, is averaged over as many spans of updates."""

SEED_POINTS = 2400
"""Most points of single seeds in a chart; of more, means and bands alone are drawn."""

MOST_LINES = 24
"""Curves of one chart; beyond, nobody could tell them apart."""

MOST_SUBJECTS = 24
"""Charts of a row, a subject each."""

TABLE_STEPS = 8
"""Most steps in the table of a chart."""

FEW_STEPS = 8
"""So many steps all have a tick; between them there is none."""

LOG_SPREAD = 5.0
"""A quantity that falls begins on a logarithmic scale where its largest value is so many times its smallest."""

NAMED = 4
"""So many arms are named in the summary of a chart."""


def differences(found: Sequence[Verdict], shown: dict[str, Look], name: str) -> Figure:
    """Draw the paired differences of one subject: a tick a seed, the mean and its interval, a line at 0.

    Args:
        found: the verdicts of the subject, at least one.
        shown: how arms and groups are drawn.
        name: of the figure.

    Returns:
        The figure.
    """
    rows = [(verdict, label, each) for verdict in found for label, each in verdict.rows]
    one = len(found) == 1 and not found[0].grouped
    labels = unique(label if one else f"{each.words} {'at ' * each.grouped}{label}" for each, label, _ in rows)
    first = rows[0][2]
    better = "better →" if first.higher_is_better else "← better"
    unit = f" in {first.unit}" if first.unit else ""
    columns: dict[str, list[Any]] = {key: [] for key in ("row", "arm", "seed", "value", "low", "high")}
    for place, (verdict, _, each) in enumerate(rows):
        lines: list[tuple[Any, ...]] = [
            (seed, value, None, None) for seed, value in zip(each.seeds, each.differences, strict=True)
        ]
        if each.mean is not None:
            lines.append((None, each.mean, each.low, each.high))
        for line in lines:
            for key, value in zip(columns, (place, 0, *line), strict=True):
                columns[key].append(short(value) if key in ("value", "low", "high") else value)
            columns["arm"][-1] = list(shown).index(verdict.item)
    x = quantitative("value", f"difference{unit}, {better}", axis={"tickCount": 5, "format": ".6~g"})
    y = {"field": "row", "type": "nominal", "sort": labels, "title": None, "axis": {"labelLimit": 170, "grid": False}}
    color = encodings(list(shown.values()))["color"]
    seeds, mean = {"filter": "datum.seed !== null"}, {"filter": "datum.seed === null"}
    label = tip("row", "comparison")
    layers = [
        {"data": {"values": [{}]}, "mark": {"type": "rule", "color": "var(--muted)"}, "encoding": {"x": {"datum": 0}}},
        {
            "transform": [mean, {"filter": "datum.low !== null"}],
            "mark": {"type": "rule", "strokeWidth": 3},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": color},
        },
        {
            "transform": [seeds],
            "mark": {"type": "tick", "thickness": 2, "size": 12, "yOffset": 9, "color": "var(--muted)"},
            "encoding": {"x": x, "y": y, "tooltip": [label, tip("seed", "seed"), tip("value", "difference", ".4~g")]},
        },
        {
            "transform": [mean],
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": color,
                "tooltip": [label, tip("value", "mean", ".4~g"), tip("low", "from", ".4~g"), tip("high", "to", ".4~g")],
            },
        },
    ]
    spec = {
        "params": [{"name": "hidden", "value": []}],
        "data": {"name": "rows"},
        "transform": [HIDDEN],
        "height": 36 * len(rows),
        "layer": layers,
    }
    table = Table(
        ("comparison", "mean", "from", "to", "each seed"),
        [
            (
                label,
                written(each.mean),
                written(each.low),
                written(each.high),
                ", ".join(map(written, each.differences)),
            )
            for label, (_, _, each) in zip(labels, rows, strict=True)
        ],
    )
    subject = found[0].subject_words
    ranked = sorted(
        (each.mean, label) for label, (_, _, each) in zip(labels, rows, strict=True) if each.mean is not None
    )
    summary = "No pair of runs is finished."
    if ranked:
        (low, least), (high, most) = ranked[0], ranked[-1]
        summary = f"The mean difference{unit} is {written(low)} {_of(least)}"
        summary += f" and {written(high)} {_of(most)}." if len(ranked) > 1 else "."
    words = {"row": labels, "arm": [look.words for look in shown.values()]}
    title = f"Differences in {first.quantity}, {subject}"
    return Figure(name, title, summary, spec, {**columns, "words": words}, table)


def _of(label: str) -> str:
    """Put the label of a comparison into a sentence."""
    return label if label.startswith("against ") else f"for {label}"


def representatives(plan: Plan, subject: str) -> dict[str, str]:
    """Choose an arm for each item of a subject: of a group, that in the middle of its values: item -> arm."""
    members: dict[str, list[tuple[float, str]]] = {}
    for arm in plan.arms_of(subject):
        members.setdefault(item_of(arm), []).append((arm.value or 0.0, arm.name))
    return {item: sorted(arms)[(len(arms) - 1) // 2][1] for item, arms in members.items()}


def seed_curves(results: Results, subject: str, arm: str, quantity: str) -> dict[int, list[tuple[int, float]]]:
    """Give the finite values of a quantity by seed; series of more than ``POINTS`` steps are averaged in ``SPANS``.

    What was measured before the first update is left out: it is that of guessing, and would take half the scale.
    """
    series = {seed: results.series((subject, arm, seed), quantity) for seed in results.of(subject, arm)}
    last = max((pairs[-1][0] for pairs in series.values() if pairs), default=0)
    longest = max(map(len, series.values()), default=0)
    span = 1 if longest <= POINTS else last / SPANS
    found = {}
    for seed, pairs in series.items():
        spans: dict[int, list[float]] = {}
        for step, value in pairs:
            if step > 0 and math.isfinite(value):
                spans.setdefault(round(math.ceil(step / span) * span), []).append(value)
        found[seed] = [(step, math.fsum(values) / len(values)) for step, values in sorted(spans.items())]
    return found


def curve(seeds: dict[int, list[tuple[int, float]]]) -> list[Cell]:
    """Summarise curves over seeds."""
    gathered: dict[int, list[float]] = {}
    for pairs in seeds.values():
        for step, value in pairs:
            gathered.setdefault(step, []).append(value)
    return [summarise(step, values) for step, values in sorted(gathered.items())]


def curves(results: Results, shown: dict[str, Look], quantity: str, words: str, *, falling: bool) -> dict[str, Figure]:
    """Draw learning curves: each seed, their mean, and a band of ± one standard deviation.

    Args:
        results: the finished runs.
        shown: how arms and groups are drawn.
        quantity: of the metrics.
        words: of the vertical axis.
        falling: less is better, so that a logarithmic scale may be right.

    Returns:
        Subject -> figure; subjects without a value are left out.
    """
    plan = results.plan
    recorded = dict.fromkeys(name for record in results.records.values() for name in record.summary["finals"])
    names, of = slugs(subject.name for subject in plan.subjects), f"curve-{slugs([*recorded, quantity])[quantity]}"
    found = {}
    for subject in plan.subjects[:MOST_SUBJECTS]:
        lines = {
            item: seeds
            for item, arm in list(representatives(plan, subject.name).items())[:MOST_LINES]
            if any((seeds := seed_curves(results, subject.name, arm, quantity)).values())
        }
        if lines:
            title = f"{words}, {subject.words}"
            found[subject.name] = _curves(
                plan, title, lines, shown, words, f"{of}-{names[subject.name]}", falling=falling
            )
    return found


def _curves(
    plan: Plan,
    title: str,
    lines: dict[str, dict[int, list[tuple[int, float]]]],
    shown: dict[str, Look],
    words: str,
    name: str,
    *,
    falling: bool,
) -> Figure:
    """Draw the curves of one subject."""
    used = [shown[item] for item in lines]
    means = {item: curve(seeds) for item, seeds in lines.items()}
    columns: dict[str, list[Any]] = {key: [] for key in ("arm", "seed", "step", "value", "low", "high")}
    each_seed = sum(len(pairs) for seeds in lines.values() for pairs in seeds.values()) <= SEED_POINTS
    values = [cell.mean for cells in means.values() for cell in cells]
    log = falling and min(values) > 0 and max(values) > LOG_SPREAD * min(values)
    for place, (item, seeds) in enumerate(lines.items()):
        drawn: list[tuple[Any, ...]] = []
        if each_seed and len(seeds) > 1:
            drawn += [(seed, *pair, None, None) for seed, pairs in seeds.items() for pair in pairs]
        for cell in means[item]:
            sd = cell.sd if cell.count > 1 else 0.0
            low = cell.mean / 2 if log and cell.mean <= sd else cell.mean - sd  # a logarithmic axis has no 0
            drawn.append((None, cell.step, cell.mean, low, cell.mean + sd))
        for line in drawn:
            for key, value in zip(columns, (place, *line), strict=True):
                columns[key].append(short(value) if key in ("value", "low", "high") else value)
    last = max(cell.step for cells in means.values() for cell in cells)
    axis: dict[str, Any] = {"grid": False, "tickCount": 5, "format": "~s" if last >= 10_000 else ",d"}
    if last <= FEW_STEPS:
        axis["values"] = list(range(1, last + 1))
    x = quantitative("step", plan.step_unit, axis=axis)
    scale = {"type": "log"} if log else {}
    y = quantitative("value", words, scale=scale, axis={"tickCount": 6, "format": ".4~g"})
    look = encodings(used)
    seeds_only, mean_only = {"filter": "datum.seed !== null"}, {"filter": "datum.seed === null"}
    zoom = {"name": "zoom", "bind": "scales", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}}
    told = [
        tip("arm", "arm"),
        {"field": "who", "type": "nominal", "title": "seed"},
        tip("step", plan.step_unit, ",d"),
        tip("value", words, ".5~g"),
    ]
    layers = [
        {
            "params": [zoom],
            "transform": [mean_only],
            "mark": {"type": "area", "opacity": 0.14, "clip": True},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "transform": [seeds_only],
            "mark": {"type": "line", "strokeWidth": 0.8, "opacity": 0.4, "clip": True},
            "encoding": {"y": y, "detail": {"field": "seed"}},
        },
        {
            "transform": [mean_only],
            "mark": {"type": "line", "strokeWidth": 2, "clip": True},
            "encoding": {"y": y, "strokeDash": look["strokeDash"]},
        },
        {
            # The style sheet shows the one under the pointer.
            "mark": {"type": "point", "filled": True, "size": 110, "opacity": 0, "clip": True},
            "encoding": {"y": y, "tooltip": told},
        },
    ]
    who = {"calculate": "datum.seed === null ? 'mean' : '' + datum.seed", "as": "who"}
    spec = {
        "params": [{"name": "hidden", "value": []}],
        "data": {"name": "rows"},
        "transform": [HIDDEN, who],
        "height": HEIGHT,
        "encoding": {"x": x, "color": look["color"]},
        "layer": layers,
    }
    steps = sorted({cell.step for cells in means.values() for cell in cells})
    steps = steps[:: -(-len(steps) // TABLE_STEPS)][: TABLE_STEPS - 1] + steps[-1:]
    steps = sorted(set(steps))
    at = {item: {cell.step: cell for cell in cells} for item, cells in means.items()}
    table = Table(
        ("arm", *(f"{plan.step_unit} {step:,}" for step in steps)),
        [(shown[item].words, *(_mean_words(at[item].get(step)) for step in steps)) for item in lines],
    )
    ends = [f"{shown[item].words} at {written(cells[-1].mean)}" for item, cells in means.items()]
    if len(ends) > NAMED:
        finals = [cells[-1].mean for cells in means.values()]
        ends = [f"{len(ends)} arms between {written(min(finals))} and {written(max(finals))}"]
    summary = f"At {plan.step_unit} {last:,} the mean {words.partition(',')[0]} ends with {listed(ends)}."
    return Figure(name, title, summary, spec, {**columns, "words": {"arm": [one.words for one in used]}}, table)


def _mean_words(cell: Cell | None) -> str:
    """Write mean and standard deviation."""
    if cell is None:
        return "–"
    return written(cell.mean) + (f" ± {written(cell.sd)}" if cell.count > 1 else "")


def thresholds(results: Results, shown: dict[str, Look]) -> dict[str, Figure]:
    """Draw the quantity over the values of each group; arms without a value are lines, the plain one with a band.

    Args:
        results: the finished runs.
        shown: how arms and groups are drawn.

    Returns:
        Subject -> figure, each on a scale of its own: networks differ by more than thresholds do.
    """
    plan, quantity = results.plan, results.plan.quantity
    words = f"{quantity.words}, {quantity.unit}".rstrip(", ")
    names, found = slugs(subject.name for subject in plan.subjects), {}
    for subject in plan.subjects[:MOST_SUBJECTS]:
        cells = {
            arm.name: (arm, cell)
            for arm in plan.arms_of(subject.name)
            if (cell := results.cell(subject.name, arm.name)) is not None and cell.count
        }
        if not any(arm.group and arm.value is not None for arm, _ in cells.values()):
            continue
        points = [(item_of(arm), arm.value if arm.group else None, cell) for arm, cell in cells.values()]
        plain = plain_arm(plan, subject.name)
        found[subject.name] = _over_values(
            f"thresholds-{names[subject.name]}",
            f"{words} by threshold, {subject.words}",
            points,
            shown,
            words,
            band=shown[item_of(plain)].words if plain is not None else "",
        )
    return found


def counts(results: Results, shown: dict[str, Look]) -> dict[str, Figure]:
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
            title = f"layers chosen by threshold, {subject.words}"
            found[subject.name] = _over_values(
                f"chosen-{names[subject.name]}", title, points, shown, "layers chosen", height=140
            )
    return found


def _over_values(
    name: str,
    title: str,
    points: Sequence[tuple[str, float | None, Cell]],
    shown: dict[str, Look],
    words: str,
    *,
    band: str = "",
    height: int = HEIGHT,
) -> Figure:
    """Draw means over the values of groups."""
    items = list(dict.fromkeys(item for item, _, _ in points))
    used = [shown[item] for item in items]
    columns: dict[str, list[Any]] = {key: [] for key in ("arm", "x", "mean", "low", "high", "seeds")}
    for item, value, cell in points:
        sd = cell.sd if cell.count > 1 else 0.0
        line = (items.index(item), value, short(cell.mean), short(cell.mean - sd), short(cell.mean + sd), cell.count)
        for key, entry in zip(columns, line, strict=True):
            columns[key].append(entry)
    values = sorted({value for _, value, _ in points if value is not None})
    axis = {"grid": False, "values": values if len(values) <= 9 else values[::3], "format": ".6~g"}
    x = quantitative("x", "threshold", axis=axis, scale={"padding": 12})
    y = quantitative("mean", words, axis={"tickCount": 5, "format": ".6~g"}, scale={"padding": 8})
    look, ends = encodings(used), {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    told = [tip("arm", "arm"), tip("x", "threshold", ".6~g"), tip("mean", f"mean {words}", ".5~g")]
    told += [tip("low", "mean − sd", ".5~g"), tip("high", "mean + sd", ".5~g"), tip("seeds", "seeds", "d")]
    of_group, flat = {"filter": "datum.x !== null"}, {"filter": "datum.x === null"}
    layers = [
        {
            "transform": [flat, {"filter": {"field": "arm", "equal": band}}],
            "mark": {"type": "rect", "opacity": 0.18},
            "encoding": ends,
        },
        {
            "transform": [flat],
            "mark": {"type": "rule", "strokeWidth": 1.8},
            "encoding": {"y": y, "strokeDash": look["strokeDash"], "tooltip": [told[0], *told[2:]]},
        },
        {"transform": [of_group], "mark": {"type": "rule", "opacity": 0.6}, "encoding": {"x": x, **ends}},
        {
            "transform": [of_group],
            "mark": {"type": "line", "strokeWidth": 1.8},
            "encoding": {"x": x, "y": y, "strokeDash": look["strokeDash"]},
        },
        {
            "transform": [of_group],
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {"x": x, "y": y, "shape": look["shape"], "tooltip": told},
        },
    ]
    spec = {
        "params": [{"name": "hidden", "value": []}],
        "data": {"name": "rows"},
        "transform": [HIDDEN],
        "height": height,
        "encoding": {"color": look["color"]},
        "layer": layers,
    }
    table = Table(
        ("arm", "threshold", words, "seeds"),
        [
            (shown[item].words, value_words(value) or "none", _mean_words(cell), str(cell.count))
            for item, value, cell in points
        ],
    )
    means = [cell.mean for _, _, cell in points]
    ends = f"from {value_words(values[0])} to {value_words(values[-1])}"
    low, high = written(min(means)), written(max(means))
    summary = f"Over {len(values)} thresholds {ends} the mean lies between {low} and {high}."
    return Figure(name, title, summary, spec, {**columns, "words": {"arm": [one.words for one in used]}}, table)


def chosen_counts(results: Results, subject: str, arm: str) -> list[int]:
    """Give the number of layers of each choice that an arm's runs made, over phases and seeds."""
    return [
        sum(bool(row[2]) for row in choice["layers"].values())
        for record in results.of(subject, arm).values()
        for choice in record.summary.get("selections", ())
    ]
