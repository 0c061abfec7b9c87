"""Maps of layers: heat-maps by step, and which layers an amplification chose; written as SVG with few bytes a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from layerwise.lab.experiments.results import Results, layer_means
from layerwise.lab.report.drawing import LETTER, Drawing, shortened

VIRIDIS = (
    "#440154",
    "#481467",
    "#482576",
    "#463480",
    "#414487",
    "#3b528b",
    "#35608d",
    "#2f6c8e",
    "#2a788e",
    "#25848e",
    "#21918c",
    "#1e9c89",
    "#22a884",
    "#2fb47c",
    "#44bf70",
    "#5ec962",
    "#7ad151",
    "#9bd93c",
    "#bddf26",
    "#dfe318",
    "#fde725",
)
"""Colour scale, from low to high."""

COLUMNS = 48
"""Most columns of a heat-map; more records are averaged."""

WIDTH = 200
"""Of the cells of a heat-map, in pixels."""

LONGEST_NAME = 22
"""Letters of a layer's name; longer ones lose their middle."""

LOG_SPREAD = 20.0
"""A quantity whose largest value is so many times its smallest has a logarithmic scale."""

MAP_SEEDS = 6
"""Seeds drawn in a map of choices; more would not be told apart."""

MOST_COLUMNS = 40
"""Most columns of a map of choices, an epoch and seed each."""

Z_LIMIT = 3.0
"""|z| from which the colour of a map of choices stays the same."""

TEXT = '<text x="{:g}" y="{:g}" font-size="{:g}" text-anchor="{}" fill="var(--muted)">{}</text>'


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
    """The colours of a quantity.

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
        if positive and min(values) >= 0 and high > LOG_SPREAD * min(positive):
            # What is far below the rest, as an update of 0, would take all colours: at most six decades are drawn.
            return cls(max(min(positive), high * 1e-6), high, True)
        return cls(low, high, False)

    def colour(self, value: float) -> str:
        """Give the colour of a value."""
        if self.high <= self.low:
            return VIRIDIS[len(VIRIDIS) // 2]
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return VIRIDIS[min(len(VIRIDIS) - 1, max(0, int(part * len(VIRIDIS))))]

    @property
    def words(self) -> tuple[str, str]:
        """Both ends in words."""
        if self.high <= self.low:
            return f"{self.low:.3g}", f"{self.low:.3g} everywhere"
        return f"{self.low:.3g}", f"{self.high:.3g}{' (log)' if self.log else ''}"


def grid(results: Results, subject: str, arm: str, quantity: str, columns: int = COLUMNS) -> Grid | None:
    """Gather a quantity of each layer; None if it was not recorded.

    Args:
        results: the finished runs.
        subject: name.
        arm: name.
        quantity: ``"factor"``, ``"rate"``, ``"gradient_norm"`` or ``"update_ratio"``.
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


def heat_map(data: Grid, scale: Scale, name: str, label: str, unit: str = "iteration") -> Drawing:
    """Draw layers by updates.

    Args:
        data: the values.
        scale: colours, shared by the maps of a row.
        name: of the drawing.
        label: what it shows.
        unit: of the horizontal axis.

    Returns:
        The drawing: a run of neighbouring cells of one colour is one stroke of that colour's path.
    """
    names, height, left = _names(data.layers)
    whole = max(1, data.ends[-1])
    edges = [0.0, *(round(end / whole * WIDTH, 1) for end in data.ends)]
    strokes: dict[str, list[str]] = {}
    for row, layer in enumerate(data.layers):
        cells = enumerate(scale.colour(v) if v is not None else "" for v in data.values[layer])
        for colour, run in groupby(cells, key=lambda cell: cell[1]):
            if colour:
                places = [place for place, _ in run]
                begin, end = edges[places[0]], edges[places[-1] + 1]
                strokes.setdefault(colour, []).append(f"M{begin:g} {height * (row + 0.5):g}H{end:g}")
    paths = "".join(f'<path stroke="{colour}" d="{"".join(d)}"/>' for colour, d in strokes.items())
    bottom = height * len(data.layers)
    ticks = [TEXT.format(left + tick / whole * WIDTH, bottom + 15, 11, "middle", f"{tick:,}") for tick in _ticks(whole)]
    ticks.append(TEXT.format(left + WIDTH / 2, bottom + 31, 11, "middle", unit))
    body = (
        f'{names}<g class="cells" transform="translate({left:g} 0)" stroke-width="{height + 0.2:g}" fill="none" '
        f'shape-rendering="crispEdges">{paths}</g>{"".join(ticks)}'
    )
    return Drawing(name, label, left + WIDTH + 18, bottom + 36, body, scale=(", ".join(VIRIDIS), *scale.words))


def _names(layers: Sequence[str], least: float = 5.0) -> tuple[str, float, float]:
    """Draw the names of the layers at the left: as many as have room. Give them, a line's height and the left edge."""
    from markupsafe import escape

    height = max(least, min(22.0, 420.0 / len(layers)))
    every = math.ceil(12.0 / height)
    shown = [shortened(name, LONGEST_NAME) for name in layers]
    left = 8 + LETTER * max(map(len, shown))
    drawn = "".join(
        TEXT.format(left - 6, height * (row + 0.5) + 4, 11, "end", escape(name))
        for row, name in enumerate(shown)
        if row % every == 0
    )
    return drawn, height, round(left)


def _ticks(last: int) -> list[int]:
    """Choose three to six round numbers from 0 to the last."""
    for step in (digit * 10**power for power in range(12) for digit in (1, 2, 5)):
        if last / step <= 4:
            return list(range(0, last + 1, step))
    return [0]


def choices(results: Results, subject: str, arm: str, name: str, label: str) -> tuple[Drawing | None, str]:
    """Draw which layers the runs of an arm chose: a column an epoch and seed, z in colour, a dot on the chosen ones.

    Args:
        results: the finished runs.
        subject: name.
        arm: name.
        name: of the drawing.
        label: what it shows.

    Returns:
        The drawing, or None without a choice; and what is left out, in words.
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
    seeds = list(runs)[: max(1, min(MAP_SEEDS, MOST_COLUMNS // len(epochs)))]
    shown = epochs[:: math.ceil(len(epochs) / MOST_COLUMNS)]
    left_out = f"the first {len(seeds)} of {len(runs)} seeds" if len(seeds) < len(runs) else ""
    if len(shown) < len(epochs):
        left_out += f"{', ' if left_out else ''}{len(shown)} of {len(epochs)} choices"
    names, height, left = _names(layers, 8.0)
    columns = len(seeds) * len(shown)
    column = max(8.0, min(18.0, (WIDTH - 8.0 * (len(shown) - 1)) / columns))
    gap = 8.0 if len(seeds) > 1 else 0.0
    body, top = [names], height * len(layers)
    for place, epoch in enumerate(shown):
        x = left + place * (len(seeds) * column + gap)
        if place % math.ceil(len(shown) / 6) == 0:
            body.append(TEXT.format(x + len(seeds) * column / 2, -6, 11, "middle", epoch))
        for turn, seed in enumerate(seeds):
            chosen = next((choice for choice in runs[seed] if choice["epoch"] == epoch), None)
            if len(seeds) > 1:
                body.append(TEXT.format(x + (turn + 0.5) * column, top + 13, 10, "middle", seed))
            if chosen is not None:
                body.append(_column(layers, chosen["layers"], x + turn * column, column, height))
    body.append(TEXT.format(left - 6, -6, 11, "end", "epoch"))
    if len(seeds) > 1:
        body.append(TEXT.format(left - 6, top + 13, 10, "end", "seed"))
    width = left + len(shown) * (len(seeds) * column + gap) + 6
    drawn = f'<g class="cells" transform="translate(0 20)">{"".join(body)}</g>'
    colours = ("#c75000, #e3a880, #eef0f3, #85afd2, #0b5fa5", f"z = −{Z_LIMIT:g}", f"+{Z_LIMIT:g}; dot: chosen")
    return Drawing(name, label, width, top + 40, drawn, scale=colours), left_out


def _column(
    layers: Sequence[str], rows: dict[str, Sequence[float | bool | None]], x: float, width: float, height: float
) -> str:
    """Draw one choice: a cell a layer."""
    cells = [f'<rect x="{x:g}" y="0" width="{width - 1:g}" height="{height * len(layers):g}" fill="var(--empty)"/>']
    for row, layer in enumerate(layers):
        _, z, chosen = rows.get(layer, (None, None, False))
        if z:
            side, strength = ("above" if z > 0 else "below"), min(abs(z), Z_LIMIT) / Z_LIMIT
            cells.append(
                f'<rect x="{x:g}" y="{row * height:g}" width="{width - 1:g}" height="{height - 0.6:g}" '
                f'fill="var(--{side})" fill-opacity="{strength:.2f}"/>'
            )
        if chosen:
            cells.append(
                f'<circle cx="{x + (width - 1) / 2:g}" cy="{(row + 0.5) * height:g}" '
                f'r="{min(width, height) / 3.6:.1f}" fill="var(--ink)" stroke="var(--card)" stroke-width="1"/>'
            )
    return "".join(cells)
