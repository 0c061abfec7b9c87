"""The page of what ``layerwise doctor`` found: one HTML file that needs no network and no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import layerwise
from layerwise.lab.errors import shown
from layerwise.lab.report.charts import HEIGHT, WIDTH
from layerwise.lab.report.drawing import Drawing, vega
from layerwise.lab.report.looks import COLOURS
from layerwise.lab.report.maps import COLUMNS, VIRIDIS, Grid, Scale, heat_map
from layerwise.lab.report.templates import template
from layerwise.lab.runs.files import check_page
from layerwise.lab.runs.store import write_whole
from layerwise.lab.tasks.doctor import Checkup, Examination
from layerwise.lab.tasks.findings import EXPLODING, FAR, HIGH_RATIO, LOW_RATIO, VANISHING, LayerNumbers
from layerwise.sinks import Record

QUANTITIES = {
    "update_ratio": ("Update to weight", "‖Δw‖ / ‖w‖ of one update, over all parameters of a layer together."),
    "gradient_norm": ("Gradient norm", "‖g‖ over all parameters of a layer together, as the optimizer found it."),
    "weight_norm": ("Weight norm", "‖w‖ over all parameters of a layer together, before the update."),
    "lr": ("Rate", "Learning rate of the layer's parameter group."),
}
"""What a monitor records -> its tab, and what it is."""


def write(label: str, command: str, found: Examination, out: Path) -> Path | None:
    """Write the page of an examination.

    Args:
        label: of the task, as ``"my_task.py:task"``.
        command: the command line that made it.
        found: what was found.
        out: folder of ``--out``.

    Returns:
        The page, in the folder ``doctor``; None where nothing could be trained.

    Raises:
        UsageError: a file that layerwise has not written lies there.
    """
    if found.checkup is None:
        return None
    path = place_of(label, out)
    write_whole(path, shown(build(label, command, found, found.checkup), lines=True).encode())
    return path


def place_of(label: str, out: Path) -> Path:
    """Give where the page of a task goes; refuse it where a file lies that layerwise has not written."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in label.replace(".py:", "-"))
    path = out / "doctor" / f"{name}.html"
    check_page(path, out)
    return path


def build(label: str, command: str, found: Examination, checkup: Checkup) -> str:
    """Make the page, with every string escaped."""
    maps = [(key, *words, drawn) for key, words in QUANTITIES.items() if (drawn := drawing(checkup.records, key))]
    return template("checked.html.j2").render(
        label=label,
        command=command,
        headline=headline(found),
        trained=checkup.words,
        faults=found.faults,
        findings=checkup.findings,
        notes=found.notes,
        layers=[row(layer, checkup.layers) for layer in checkup.layers],
        maps=maps,
        quantities=[key.replace("_", "-") for key, *_ in maps],
        viridis=", ".join(VIRIDIS),
        curve=curve(checkup.losses),
        described="\n".join(found.described),
        limits={"low": LOW_RATIO, "high": HIGH_RATIO, "far": FAR, "exploding": EXPLODING, "vanishing": VANISHING},
        colours=COLOURS,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=layerwise.__version__,
    )


def headline(found: Examination) -> str:
    """Say in a sentence what came of it."""
    problems = len(found.problems)
    findings = found.checkup.findings if found.checkup else ()
    notes = sum(not finding.serious for finding in findings) + len(found.notes)
    more = f", and {notes} thing{'' if notes == 1 else 's'} to note" if notes else ""
    if not problems:
        return f"No problem was found{more}."
    return f"{problems} problem{'' if problems == 1 else 's'} {'was' if problems == 1 else 'were'} found{more}."


def row(layer: LayerNumbers, layers: Sequence[LayerNumbers]) -> dict[str, Any]:
    """Write a layer's numbers, and tell which of them are outside of their limits."""
    largest = max((each.relative_gradient for each in layers if not each.from_zero), default=0.0)
    relative, ratio = layer.relative_gradient, layer.ratio
    outside = relative > EXPLODING or relative < VANISHING * largest or relative == 0
    return {
        "name": layer.name or "(root)",
        "gradient": f"{layer.gradient:.3g}",
        "weight": f"{layer.weight:.3g}",
        "lr": f"{layer.lr:.3g}",
        "relative": f"{relative:.3g}",
        "relative_far": outside and not layer.from_zero,
        "ratio": f"{ratio:.3g}",
        "ratio_far": not LOW_RATIO <= ratio <= HIGH_RATIO and not layer.from_zero,
    }


def drawing(records: Sequence[Record], quantity: str) -> tuple[Drawing, str, str] | None:
    """Draw a quantity of every layer by update, and give both ends of its colours in words; None without a number."""
    if not records:
        return None
    names = [name or "(root)" for name in records[0].layers]
    count, last = min(COLUMNS, len(records)), records[-1].step
    ends = tuple(sorted({max(1, round(last * (place + 1) / count)) for place in range(count)}))
    begins = (0, *ends[:-1])
    spans = [
        [record for record in records if begin < record.step <= end] for begin, end in zip(begins, ends, strict=True)
    ]
    values = {
        name: [mean_of([getattr(record, quantity)[place] for record in span]) for span in spans]
        for place, name in enumerate(names)
    }
    grid = Grid(tuple(names), ends, values)
    if not grid.finite:
        return None
    scale = Scale.of(grid.finite)
    title = QUANTITIES[quantity][0]
    drawn = heat_map(grid, scale, quantity.replace("_", "-"), f"{title} of each layer by update", "update")
    return drawn, *scale.words


def mean_of(values: Sequence[float]) -> float | None:
    """Average the finite ones of some values; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def curve(losses: Sequence[float]) -> Drawing | None:
    """Draw the training loss by update; None without two finite ones."""
    rows = [{"x": step, "y": loss} for step, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    if len(rows) < 2:
        return None
    body = {
        "width": 2 * WIDTH,
        "height": HEIGHT,
        "data": {"values": rows},
        "mark": {"type": "line", "strokeWidth": 1.8, "color": "var(--accent)"},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": "update",
                "scale": {"domain": [0, max(len(losses), 2)], "nice": False},
                "axis": {"grid": False, "tickCount": 5, "format": ",d", "tickMinStep": 1},
            },
            "y": {
                "field": "y",
                "type": "quantitative",
                "title": "training loss",
                "scale": {"zero": False},
                "axis": {"tickCount": 5, "format": ".4~g"},
            },
        },
    }
    return vega("training-loss", "Training loss by update", body)
