"""What the page shows of each layer: heat-maps, choices and factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars

from layerwise.lab.experiments.plan import Arm, Subject
from layerwise.lab.experiments.results import Results, layer_means, layer_ranges
from layerwise.lab.report.charts import representatives
from layerwise.lab.report.figures import Figure, Spec, Table, columns_of, layer, short, slugs, tip, unique, written

GRADIENT_NORM = ("Gradient norm", "‖g‖ over all parameters of a layer together, as the optimizer found it.")
UPDATE_RATIO = ("Update to weight", "‖Δw‖ / ‖w‖ of one update, over all parameters of a layer together.")

QUANTITIES = {
    "factor": ("Factor", "What the rule multiplies a layer's step by."),
    "rate": (
        "Rate",
        "Learning rate of a layer: base rate under its policy, times the factor where it acts on the rate.",
    ),
    "gradient_norm": GRADIENT_NORM,
    "update_ratio": UPDATE_RATIO,
}
"""Quantity -> its tab, and what it is."""

MOST_MAPS = 24  # most heat-maps of a quantity: beyond, the controls are left out, and then the last subjects
MOST_CELLS = 80_000  # most cells of all heat-maps: of many maps of many layers, each has fewer columns
FEWEST_COLUMNS, COLUMNS = 12, 48  # least and most columns of a heat-map; more records are averaged
LOG_SPREAD = 20.0  # a quantity whose largest value is so many times its smallest has a logarithmic scale
MAP_SEEDS, MOST_CHOICES = 6, 40  # most seeds, and most columns, of a map of choices
Z_LIMIT = 3.0  # |z| from which the colour of a map of choices stays the same

VIRIDIS = "#440154, #482576, #414487, #35608d, #2a788e, #21918c, #22a884, #44bf70, #7ad151, #bddf26, #fde725"
"""Colours of a heat-map, from low to high, as a style sheet writes them."""


@dataclass(frozen=True)
class Grid:
    """A quantity of every layer over the updates of a run, mean over seeds."""

    ends: tuple[int, ...]  # number of updates at which each column ends; it begins where the one before ends
    values: dict[str, list[float | None]]  # layer, in the network's order -> a value a column

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self.values)

    @property
    def finite(self) -> list[float]:
        """All values that there are."""
        return [value for line in self.values.values() for value in line if value is not None]


@dataclass(frozen=True)
class Scale:
    """The range of a quantity's colours, which may be spaced by their logarithm."""

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
class Pane:
    """The maps of one quantity."""

    key: str
    title: str  # of its tab
    lead: str
    rows: list[tuple[str, str, str, list[Figure]]]  # subject, both ends of the colours in words, maps


def ruled(results: Results) -> dict[str, list[Arm]]:
    """Give the arms that have maps: those with a rule, of each group the middle one: subject -> arms.

    There are at most ``MOST_MAPS`` of them, of the first subjects that have that few together.
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


def _mapped(results: Results) -> list[tuple[Subject, list[tuple[Arm, str, str]]]]:
    """Give each subject that has maps, with its arms and the end of the name and the title of each one's map."""
    plan, shown = results.plan, ruled(results)
    subjects, arms = slugs(subject.name for subject in plan.subjects), slugs(arm.name for arm in plan.arms)
    found = []
    for subject in plan.subjects:
        rows = []
        for arm in shown.get(subject.name, ()):
            words = f"{arm.group}, {arm.value:g}" if arm.group and arm.value is not None else arm.words
            rows.append((arm, f"{subjects[subject.name]}-{arms[arm.name]}", f"{words}, {subject.words}"))
        if rows:
            found.append((subject, rows))
    return found


def panes(results: Results) -> list[Pane]:
    """Draw the heat-maps of every quantity that was recorded: one pane a quantity, in the order of ``QUANTITIES``."""
    made, mapped, columns = [], _mapped(results), columns_for(results, ruled(results))
    for quantity, (title, lead) in QUANTITIES.items():
        key, rows = quantity.replace("_", "-"), []
        for subject, arms in mapped:
            grids = [
                (found, name, words)
                for arm, name, words in arms
                if (found := grid(results, subject.name, arm.name, quantity, columns)) is not None
            ]
            scale = Scale.of(value for found, *_ in grids for value in found.finite)
            figures = [
                heat_map(found, scale, f"{key}-{name}", words, title, "iteration") for found, name, words in grids
            ]
            if figures:
                rows.append((subject.words, *scale.words, figures))
        if rows:
            made.append(Pane(key, title, lead, rows))
    return made


def grid(results: Results, subject: str, arm: str, quantity: str, columns: int = COLUMNS) -> Grid | None:
    """Gather a quantity of each layer, mean over seeds, and over neighbouring steps beyond ``columns`` of them.

    None where it was not recorded.
    """
    frame = layer_means(results, subject, arm, quantity).filter(polars.col("value").is_finite())
    if frame.is_empty():
        return None
    steps = frame["step"].unique().sort().to_list()
    if len(steps) > columns:
        last = steps[-1]
        column = ((polars.col("step") * columns / last).ceil().cast(polars.Int64).clip(1) * last / columns).round()
        frame = frame.with_columns(column.cast(polars.Int64).alias("step"))
    frame = frame.group_by("layer", "step").agg(polars.col("value").mean())
    found = {(layer, step): value for layer, step, value in frame.iter_rows()}
    ends, known = sorted({step for _, step in found}), {layer for layer, _ in found}
    names = [name for name in results.layer_names(subject, arm) if name in known]
    return Grid(tuple(ends), {name: [found.get((name, end)) for end in ends] for name in names}) if names else None


def heat_map(data: Grid, scale: Scale, name: str, title: str, quantity: str, unit: str) -> Figure:
    """Draw a quantity by layers and updates, which ``unit`` names; the scale is shared by the maps of a row."""
    layers = unique(data.layers)
    colours: Spec = {"scheme": "viridis", "domain": [scale.low, scale.high], "clamp": True}
    if scale.log:
        colours["type"] = "log"
    if scale.high <= scale.low:
        colours["domain"] = [scale.low - 1.0, scale.low + 1.0]
    spec = _of_layers(layers, unit, data.ends)
    spec |= {"mark": {"type": "rect"}, "transform": [{"filter": "datum.value !== null"}]}
    spec["encoding"] |= {
        "color": {"field": "value", "type": "quantitative", "title": quantity, "scale": colours, "legend": None},
        "tooltip": [tip("layer", "layer"), tip("step", f"up to {unit}", ",d"), tip("value", quantity, ".4~g")],
    }
    values = [short(value) for line in data.values.values() for value in line]
    ends = [0, len(data.ends) // 2, len(data.ends) - 1]
    rows = []
    for words, line in zip(layers, data.values.values(), strict=True):
        known = [value for value in line if value is not None]
        mean = math.fsum(known) / len(known) if known else None
        rows.append((words, *(written(line[place]) for place in ends), written(mean)))
    table = Table(("layer", *(f"{unit} {data.ends[place]:,}" for place in ends), "mean"), rows)
    summary = f"{quantity} by layer and {unit}: from {scale.low:.3g} to {scale.high:.3g}"
    if len(layers) > 1:
        summary += f"; on average {rows[0][-1]} in {layers[0]} and {rows[-1][-1]} in {layers[-1]}"
    cells = {"cross": {"layer": layers, "step": data.ends}, "value": values}
    return Figure(name, title, f"{summary}.", spec, cells, table)


def _of_layers(layers: Sequence[str], unit: str, columns: Sequence[int]) -> Spec:
    """Give what maps of layers have in common: layers from top to bottom, columns from left to right."""
    ticks = list(columns[:: -(-len(columns) // 5)])
    axis = {"values": ticks, "labelAngle": 0, "format": ",d", "ticks": False, "domain": False}
    y_axis = {"labelLimit": 150, "ticks": False, "domain": False, "labelOverlap": True}
    x = {"field": "step", "type": "ordinal", "title": unit, "axis": axis, "scale": {"padding": 0}}
    y = {"field": "layer", "type": "nominal", "sort": list(layers), "title": None, "axis": y_axis}
    height = round(max(5.0, min(22.0, 420.0 / len(layers))) * len(layers))
    return {"data": {"name": "rows"}, "height": height, "encoding": {"x": x, "y": y | {"scale": {"padding": 0}}}}


def chosen_maps(results: Results) -> tuple[list[Figure], list[str]]:
    """Draw which layers were chosen; give the maps, and what is left out of them."""
    drawn = [
        choices(results, subject.name, arm.name, f"chosen-layers-{name}", title)
        for subject, arms in _mapped(results)
        for arm, name, title in arms
    ]
    left_out = dict.fromkeys(words for _, words in drawn if words)
    return [figure for figure, _ in drawn if figure is not None], list(left_out)


def choices(results: Results, subject: str, arm: str, name: str, title: str) -> tuple[Figure | None, str]:
    """Draw which layers the runs of an arm chose: a column an epoch and seed, z in colour, a dot on the chosen ones.

    Give the figure, or None without a choice; and what is left out, in words.
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
    left_out = [f"the first {len(seeds)} of {len(runs)} seeds"] if len(seeds) < len(runs) else []
    if len(shown) < len(epochs):
        left_out.append(f"{len(shown)} of {len(epochs)} choices")
    words = unique(layers)
    lines: list[tuple[Any, ...]] = []
    counts = [0 for _ in layers]
    drawn = [(seed, choice) for seed in seeds for choice in runs[seed] if choice["epoch"] in shown]
    for seed, choice in drawn:
        for place, each in enumerate(layers):
            _, z, chosen = choice["layers"].get(each, (None, None, False))
            size = min(abs(z), Z_LIMIT) if z is not None and math.isfinite(z) else 0.0
            lines.append((place, choice["epoch"], seed, short(z), short(size), int(bool(chosen))))
            counts[place] += bool(chosen)
    spec = _of_layers(words, "epoch", shown)
    spec["encoding"]["x"]["scale"] = {"paddingInner": 0.15}
    spec["encoding"]["xOffset"] = {"field": "seed", "type": "nominal", "sort": seeds}
    told = [tip("layer", "layer"), tip("step", "epoch"), tip("seed", "seed"), tip("z", "z", ".3~g")]
    told.append(tip("was", "chosen"))
    side = {"condition": {"test": "datum.z < 0", "value": "var(--below)"}, "value": "var(--above)"}
    strength = {"field": "size", "type": "quantitative", "legend": None}
    strength["scale"] = {"domain": [0, Z_LIMIT], "range": [0.0, 1.0]}
    dot = {"color": "var(--ink)", "stroke": "var(--card)", "size": 28, "opacity": 1}
    spec["transform"] = [{"calculate": "datum.chosen === 1 ? 'yes' : 'no'", "as": "was"}]
    spec["layer"] = [
        layer("rect", {"tooltip": told}, color="var(--empty)"),
        layer("rect", {"color": side, "fillOpacity": strength, "tooltip": told}),
        layer("circle", {"tooltip": told}, "datum.chosen === 1", **dot),
    ]
    table = Table(
        ("layer", "times chosen", "choices"),
        [(word, str(count), str(len(drawn))) for word, count in zip(words, counts, strict=True)],
    )
    most = counts.index(max(counts))
    summary = "No layer was chosen."
    if counts[most]:
        summary = f"Most often chosen is {words[most]}, {counts[most]} of {len(drawn)} times."
    data = columns_of(("layer", "step", "seed", "z", "size", "chosen"), lines)
    return Figure(name, title, summary, spec, {**data, "words": {"layer": words}}, table), ", ".join(left_out)


def factor_tables(results: Results) -> list[dict[str, Any]]:
    """Gather the factors of rules that do not only switch layers on and off, a table for each list of layers.

    A table has ``layers`` and ``columns``, each with words, layers, mean and spread.
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
            column = {
                "words": f"{subject.words}, {arm.words}" if several else arm.words,
                "layers": layers,
                "mean": results.mean_factor(subject.name, arm.name),
                "spread": results.spread(subject.name, arm.name),
            }
            tables.setdefault(tuple(layers), []).append(column)
    return [{"layers": list(layers), "columns": columns} for layers, columns in tables.items()]


def factor_words(value: float) -> str:
    """Write a factor with two decimals, and one so small that they would hide it with three digits."""
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"
