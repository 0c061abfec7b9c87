"""What the page shows of each layer: heat-maps, choices and factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from layerwise.lab.experiments.plan import Arm
from layerwise.lab.experiments.results import Results, layer_means, layer_ranges
from layerwise.lab.report.charts import representatives
from layerwise.lab.report.figures import Figure, Table, short, slugs, tip, written
from layerwise.lab.report.looks import unique
from layerwise.lab.report.words import item_of

QUANTITIES = {
    "factor": ("Factor", "What the rule multiplies a layer's step by."),
    "rate": (
        "Rate",
        "Learning rate of a layer: base rate under its policy, times the factor where it acts on the rate.",
    ),
    "gradient_norm": ("Gradient norm", "‖g‖ over all parameters of a layer together, as the optimizer found it."),
    "update_ratio": ("Update to weight", "‖Δw‖ / ‖w‖ of one update, over all parameters of a layer together."),
}
"""Quantity -> its tab, and what it is."""

MOST_MAPS = 24
"""Most heat-maps of a quantity: beyond, the controls are left out, and then the last subjects."""

MOST_CELLS = 80_000
"""Most cells of all heat-maps: of many maps of many layers, each has fewer columns."""

FEWEST_COLUMNS, COLUMNS = 12, 48
"""Least and most columns of a heat-map; more records are averaged."""

LOG_SPREAD = 20.0
"""A quantity whose largest value is so many times its smallest has a logarithmic scale."""

MAP_SEEDS, MOST_CHOICES = 6, 40
"""Most seeds, and most columns, of a map of choices."""

Z_LIMIT = 3.0
"""|z| from which the colour of a map of choices stays the same."""

VIRIDIS = "#440154, #482576, #414487, #35608d, #2a788e, #21918c, #22a884, #44bf70, #7ad151, #bddf26, #fde725"
"""Colours of a heat-map, from low to high, as a style sheet writes them."""


@dataclass(frozen=True)
class Grid:
    """A quantity of every layer over the updates of a run, mean over seeds.

    Attributes:
        layers: names, in the network's order.
        ends: number of updates at which each column ends; it begins where the one before ends.
        values: layer -> a value a column, or None.
    """

    layers: tuple[str, ...]
    ends: tuple[int, ...]
    values: dict[str, list[float | None]]

    @property
    def finite(self) -> list[float]:
        """All values that there are."""
        return [value for line in self.values.values() for value in line if value is not None]


@dataclass(frozen=True)
class Scale:
    """The range of a quantity's colours.

    Attributes:
        low: value of the first colour.
        high: value of the last one.
        log: they are spaced by their logarithm.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Choose a scale that holds the values."""
        values = list(values) or [0.0]
        low, high = min(values), max(values)
        positive = [value for value in values if value > 0]
        if positive and low >= 0 and high > LOG_SPREAD * min(positive):
            # What is far below the rest, as an update of 0, would take all colours: at most six decades are drawn.
            return cls(max(min(positive), high * 1e-6), high, True)
        return cls(low, high, False)

    @property
    def words(self) -> tuple[str, str]:
        """Both ends in words."""
        if self.high <= self.low:
            return f"{self.low:.3g}", f"{self.low:.3g} everywhere"
        return f"{self.low:.3g}", f"{self.high:.3g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Maps:
    """The maps of one quantity and subject.

    Attributes:
        subject: in words.
        low: end of the colour scale in words.
        high: the other end.
        figures: a map an arm.
    """

    subject: str
    low: str
    high: str
    figures: list[Figure]


@dataclass(frozen=True)
class Pane:
    """The maps of one quantity.

    Attributes:
        key: of the quantity.
        title: of its tab.
        lead: what it is.
        rows: a subject each.
    """

    key: str
    title: str
    lead: str
    rows: list[Maps]


def ruled(results: Results) -> dict[str, list[Arm]]:
    """Give the arms that have maps: those with a rule, of each group the middle one.

    Args:
        results: the finished runs.

    Returns:
        Subject -> arms, at most ``MOST_MAPS`` of them, for the first subjects that are that few together.
    """
    plan = results.plan
    found: dict[str, list[Arm]] = {}
    for subject in plan.subjects:
        chosen = set(representatives(plan, subject.name).values())
        arms = [arm for arm in plan.arms_of(subject.name) if arm.name in chosen and (arm.rule or arm.control)]
        found[subject.name] = [arm for arm in arms if results.of(subject.name, arm.name)]
    if sum(map(len, found.values())) > MOST_MAPS:
        found = {subject: [arm for arm in arms if arm.control is None] for subject, arms in found.items()}
    kept: dict[str, list[Arm]] = {}
    for subject, arms in found.items():
        if sum(map(len, kept.values())) + len(arms) <= MOST_MAPS or not kept:
            kept[subject] = arms[:MOST_MAPS]
    return kept


def columns_for(results: Results, shown: dict[str, list[Arm]]) -> int:
    """Choose how many columns a heat-map has, so that all of them keep within ``MOST_CELLS``."""
    lines = sum(len(results.layer_names(subject, arm.name)) for subject, arms in shown.items() for arm in arms)
    return max(FEWEST_COLUMNS, min(COLUMNS, MOST_CELLS // max(1, len(QUANTITIES) * lines)))


def words_of(arm: Arm) -> str:
    """Name an arm above a map: one of a group by the group and its value."""
    return f"{arm.group}, {arm.value:g}" if arm.group and arm.value is not None else arm.words


def panes(results: Results) -> list[Pane]:
    """Draw the heat-maps of every quantity that was recorded: one pane a quantity, in the order of ``QUANTITIES``."""
    plan, made = results.plan, []
    subjects, arms = slugs(subject.name for subject in plan.subjects), slugs(arm.name for arm in plan.arms)
    shown = ruled(results)
    columns = columns_for(results, shown)
    for key, (title, lead) in QUANTITIES.items():
        rows = []
        for subject in plan.subjects:
            grids = {
                arm.name: found
                for arm in shown.get(subject.name, ())
                if (found := grid(results, subject.name, arm.name, key, columns)) is not None
            }
            scale = Scale.of(value for found in grids.values() for value in found.finite)
            figures = [
                heat_map(
                    found,
                    scale,
                    f"{slugs([key])[key]}-{subjects[subject.name]}-{arms[name]}",
                    f"{words_of(plan.arm(name))}, {subject.words}",
                    title,
                    "iteration",
                )
                for name, found in grids.items()
            ]
            if figures:
                rows.append(Maps(subject.words, *scale.words, figures))
        if rows:
            made.append(Pane(slugs([key])[key], title, lead, rows))
    return made


def grid(results: Results, subject: str, arm: str, quantity: str, columns: int = COLUMNS) -> Grid | None:
    """Gather a quantity of each layer; None if it was not recorded.

    Args:
        results: the finished runs.
        subject: name.
        arm: name.
        quantity: one of ``QUANTITIES``.
        columns: most columns.

    Returns:
        Values averaged over seeds, and over neighbouring steps where there are more than ``columns``.
    """
    import polars

    frame = layer_means(results, subject, arm, quantity).filter(polars.col("value").is_finite())
    if frame.is_empty():
        return None
    steps = frame["step"].unique().sort().to_list()
    if len(steps) > columns:
        last = steps[-1]
        column = ((polars.col("step") * columns / last).ceil().cast(polars.Int64).clip(1) * last / columns).round()
        frame = frame.with_columns(column.cast(polars.Int64).alias("step"))
    frame = frame.group_by("layer", "step").agg(polars.col("value").mean())
    ends = frame["step"].unique().sort().to_list()
    known = set(frame["layer"].unique().to_list())
    names = [name for name in results.layer_names(subject, arm) if name in known]
    if not names:
        return None
    lines: dict[str, list[float | None]] = {name: [None] * len(ends) for name in names}
    places = {end: place for place, end in enumerate(ends)}
    for layer, step, value in frame.iter_rows():
        if layer in lines:
            lines[layer][places[step]] = value
    return Grid(tuple(names), tuple(ends), lines)


def heat_map(data: Grid, scale: Scale, name: str, title: str, quantity: str, unit: str) -> Figure:
    """Draw layers by updates.

    Args:
        data: the values.
        scale: colours, shared by the maps of a row.
        name: of the figure.
        title: above it.
        quantity: what the colours are.
        unit: of the horizontal axis.

    Returns:
        The figure.
    """
    layers = unique(data.layers)
    colours: dict[str, Any] = {"scheme": "viridis", "domain": [scale.low, scale.high], "clamp": True}
    if scale.log:
        colours["type"] = "log"
    if scale.high <= scale.low:
        colours["domain"] = [scale.low - 1.0, scale.low + 1.0]
    spec = {
        **_grid_of(layers, unit, list(data.ends)),
        "mark": {"type": "rect"},
        "transform": [{"filter": "datum.value !== null"}],
    }
    spec["encoding"] |= {
        "color": {"field": "value", "type": "quantitative", "title": quantity, "scale": colours, "legend": None},
        "tooltip": [tip("layer", "layer"), tip("step", f"up to {unit}", ",d"), tip("value", quantity, ".4~g")],
    }
    values = [short(value) for layer in data.layers for value in data.values[layer]]
    ends = [0, len(data.ends) // 2, len(data.ends) - 1]
    rows = [
        (words, *(written(data.values[layer][place]) for place in ends), written(_mean(data.values[layer])))
        for words, layer in zip(layers, data.layers, strict=True)
    ]
    table = Table(("layer", *(f"{unit} {data.ends[place]:,}" for place in ends), "mean"), rows)
    first, last = layers[0], layers[-1]
    summary = f"{quantity} by layer and {unit}: from {scale.low:.3g} to {scale.high:.3g}"
    if len(layers) > 1:
        summary += f"; on average {rows[0][-1]} in {first} and {rows[-1][-1]} in {last}"
    return Figure(
        name, title, f"{summary}.", spec, {"cross": {"layer": layers, "step": data.ends}, "value": values}, table
    )


def _mean(values: Iterable[float | None]) -> float:
    """Average the values that there are."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else math.nan


def _grid_of(layers: list[str], unit: str, columns: list[Any]) -> dict[str, Any]:
    """Give what maps of layers have in common: layers from top to bottom, columns from left to right."""
    ticks = columns[:: -(-len(columns) // 5)]
    axis = {"values": ticks, "labelAngle": 0, "format": ",d", "ticks": False, "domain": False}
    y_axis = {"labelLimit": 150, "ticks": False, "domain": False, "labelOverlap": True}
    return {
        "data": {"name": "rows"},
        "height": round(max(5.0, min(22.0, 420.0 / len(layers))) * len(layers)),
        "encoding": {
            "x": {"field": "step", "type": "ordinal", "title": unit, "axis": axis, "scale": {"padding": 0}},
            "y": {"field": "layer", "type": "nominal", "sort": layers, "title": None, "axis": y_axis}
            | {"scale": {"padding": 0}},
        },
    }


def chosen_maps(results: Results) -> tuple[list[Figure], list[str]]:
    """Draw which layers were chosen.

    Args:
        results: the finished runs.

    Returns:
        The maps, and what is left out of them.
    """
    figures: list[Figure] = []
    left_out: list[str] = []
    plan = results.plan
    subjects, arms = slugs(subject.name for subject in plan.subjects), slugs(arm.name for arm in plan.arms)
    shown = ruled(results)
    for subject in plan.subjects:
        for arm in shown.get(subject.name, ()):
            name = f"chosen-layers-{subjects[subject.name]}-{arms[arm.name]}"
            drawn, missing = choices(results, subject.name, arm.name, name, f"{words_of(arm)}, {subject.words}")
            figures += [drawn] if drawn is not None else []
            left_out += [missing] if missing and missing not in left_out else []
    return figures, left_out


def choices(results: Results, subject: str, arm: str, name: str, title: str) -> tuple[Figure | None, str]:
    """Draw which layers the runs of an arm chose: a column an epoch and seed, z in colour, a dot on the chosen ones.

    Args:
        results: the finished runs.
        subject: name.
        arm: name.
        name: of the figure.
        title: above it.

    Returns:
        The figure, or None without a choice; and what is left out, in words.
    """
    runs = {
        seed: record.summary["selections"]
        for seed, record in results.of(subject, arm).items()
        if record.summary.get("selections")
    }
    layers = results.layer_names(subject, arm)
    if not runs or not layers:
        return None, ""
    epochs = sorted({choice["epoch"] for made in runs.values() for choice in made})
    seeds = list(runs)[: max(1, min(MAP_SEEDS, MOST_CHOICES // len(epochs)))]
    shown = epochs[:: math.ceil(len(epochs) / MOST_CHOICES)]
    left_out = f"the first {len(seeds)} of {len(runs)} seeds" if len(seeds) < len(runs) else ""
    if len(shown) < len(epochs):
        left_out += f"{', ' if left_out else ''}{len(shown)} of {len(epochs)} choices"
    words = unique(layers)
    columns: dict[str, list[Any]] = {key: [] for key in ("layer", "step", "seed", "z", "size", "chosen")}
    counts = [[0, 0] for _ in layers]
    for seed in seeds:
        for choice in runs[seed]:
            if choice["epoch"] not in shown:
                continue
            for place, layer in enumerate(layers):
                _, z, chosen = choice["layers"].get(layer, (None, None, False))
                size = min(abs(z), Z_LIMIT) if z is not None and math.isfinite(z) else 0.0
                line = (place, choice["epoch"], seed, short(z), short(size), int(bool(chosen)))
                for key, value in zip(columns, line, strict=True):
                    columns[key].append(value)
                counts[place][0] += bool(chosen)
                counts[place][1] += 1
    base = _grid_of(words, "epoch", shown)
    encoding = {**base["encoding"], "xOffset": {"field": "seed", "type": "nominal", "sort": seeds}}
    encoding["x"] = {**encoding["x"], "scale": {"paddingInner": 0.15}}
    told = [tip("layer", "layer"), tip("step", "epoch"), tip("seed", "seed"), tip("z", "z", ".3~g")]
    told.append({"field": "was", "type": "nominal", "title": "chosen"})
    side = {"condition": {"test": "datum.z < 0", "value": "var(--below)"}, "value": "var(--above)"}
    strength = {"field": "size", "type": "quantitative", "legend": None}
    strength |= {"scale": {"domain": [0, Z_LIMIT], "range": [0.0, 1.0]}}
    layer_specs = [
        {"mark": {"type": "rect", "color": "var(--empty)"}, "encoding": {"tooltip": told}},
        {"mark": {"type": "rect"}, "encoding": {"color": side, "fillOpacity": strength, "tooltip": told}},
        {
            "transform": [{"filter": "datum.chosen === 1"}],
            "mark": {"type": "circle", "color": "var(--ink)", "stroke": "var(--card)", "size": 28, "opacity": 1},
            "encoding": {"tooltip": told},
        },
    ]
    was = {"calculate": "datum.chosen === 1 ? 'yes' : 'no'", "as": "was"}
    spec = {**base, "transform": [was], "encoding": encoding, "layer": layer_specs}
    rows = [(word, str(chosen), str(all_)) for word, (chosen, all_) in zip(words, counts, strict=True)]
    table = Table(("layer", "times chosen", "choices"), rows)
    most = max(range(len(words)), key=lambda place: counts[place][0])
    summary = "No layer was chosen."
    if counts[most][0]:
        summary = f"Most often chosen is {words[most]}, {counts[most][0]} of {counts[most][1]} times."
    return Figure(name, title, summary, spec, {**columns, "words": {"layer": words}}, table), left_out


def factor_tables(results: Results) -> list[dict[str, Any]]:
    """Gather the factors of rules that do not only switch layers on and off, a table for each list of layers.

    Args:
        results: the finished runs.

    Returns:
        Tables: ``layers`` and ``columns``, each with words, layers, mean and spread.
    """
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    several = len(results.plan.subjects) > 1
    factors = layer_ranges(results, "factor") if results.records else {}
    for subject in results.plan.subjects:
        for arm in results.plan.arms_of(subject.name):
            if arm.rule is None or arm.group or arm.rule.get("name") in ("GradientAmplification", "Constant"):
                continue
            recorded = factors.get((subject.name, arm.name))
            if recorded is None:
                continue
            layers = {
                name: dict(zip(("mean", "low", "high"), recorded[name], strict=True))
                for name in results.layer_names(subject.name, arm.name)
                if name in recorded
            }
            words = f"{subject.words}, {arm.words}" if several else arm.words
            column = {
                "words": words,
                "item": item_of(arm),
                "layers": layers,
                "mean": results.mean_factor(subject.name, arm.name),
                "spread": results.spread(subject.name, arm.name),
            }
            tables.setdefault(tuple(layers), []).append(column)
    return [{"layers": list(layers), "columns": columns} for layers, columns in tables.items()]


def factor_words(value: float) -> str:
    """Write a factor with two decimals, and one so small that they would hide it with three digits."""
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"
