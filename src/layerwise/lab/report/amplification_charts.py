"""Charts of the amplification report."""

from __future__ import annotations

from typing import Any

from layerwise.lab.amplification.results import Results
from layerwise.lab.amplification.training import ARMS, MEASURED, Protocol
from layerwise.lab.records import Cell
from layerwise.lab.report.drawing import svg
from layerwise.lab.report.parts import (
    HEIGHT,
    WIDTH,
    Look,
    band_rows,
    colour,
    difference_chart,
    line_layers,
    names_axis,
    reach_of,
)

LOOK = Look(
    ARMS,
    {"plain": [2, 2], "random": [9, 3], "G": [1, 0], "G_prime": [1, 0], "all": [5, 2, 1, 2]},
    {"plain": "square", "random": "triangle-down", "G": "circle", "G_prime": "diamond", "all": "triangle-up"},
)
"""How the arms are told apart."""

AMPLIFIED = [arm for arm in ARMS if arm != "plain"]

MAP_SEEDS = 6
"""Seeds drawn in the map of z; more would not be told apart."""

COLUMN, LINE, GAP = 17, 15, 0.6
"""Width and height of a cell of the map in pixels; space between two epochs in columns."""

Z_LIMIT = 3.0
"""|z| from which the colour of the map stays the same."""


def _epochs(protocol: Protocol) -> dict[str, Any]:
    """Encode the epoch."""
    return {
        "field": "iteration",
        "type": "quantitative",
        "title": "epoch",
        "scale": {"domain": [1, protocol.epochs], "nice": False},
        "axis": {"grid": False, "tickCount": 6, "tickMinStep": 1, "format": "d"},
    }


def _amplified_spans(protocol: Protocol) -> dict[str, Any]:
    """Shade the amplified epochs: from the end of the analysis epoch to the end of the phase."""
    ends = [phase.until for phase in protocol.phases if phase.amplify]
    spans = [{"begin": begin, "end": end} for begin, end in zip(protocol.analysis_epochs, ends, strict=True)]
    return {
        "mark": {"type": "rect", "color": "var(--muted)", "opacity": 0.13},
        "data": {"values": spans},
        "encoding": {"x": {**_epochs(protocol), "field": "begin"}, "x2": {"field": "end"}},
    }


def curves(results: Results, protocol: Protocol, quantity: str, title: str) -> dict[str, str]:
    """Draw, for each amplified arm, its learning curve beside those of ``plain`` and ``all``.

    Args:
        results: the finished runs.
        protocol: their length and phases.
        quantity: ``"accuracy"`` or ``"training_loss"``.
        title: of the vertical axis.

    Returns:
        Arm -> drawing, all on one scale; arms without a finished run are left out.
    """
    data = {arm: band_rows(arm, results.cells(arm, quantity=quantity), 0.0) for arm in ARMS}
    drawn = [row for rows in data.values() for row in rows]
    if not drawn:
        return {}
    ends = [row["low"] for row in drawn] + [row["high"] for row in drawn]
    y = {
        "type": "quantitative",
        "scale": {"domain": [min(ends), max(ends)], "nice": True, "zero": False},
        "axis": {"title": title, "tickCount": 6},
    }
    layers = [_amplified_spans(protocol), *line_layers(LOOK, _epochs(protocol), y, points=False)]
    return {
        arm: svg(
            {
                "width": WIDTH,
                "height": HEIGHT,
                "data": {"values": [row for one in dict.fromkeys(("plain", "all", arm)) for row in data[one]]},
                "layer": layers,
            },
            f"{title} by epoch: {ARMS[arm]}, beside plain and every layer",
            f"{quantity}-{arm}",
        )
        for arm in AMPLIFIED
        if data[arm]
    }


def shares(results: Results, protocol: Protocol) -> str:
    """Draw the share of amplified layers by epoch, mean over seeds; "" without a finished run."""
    rows = []
    for arm in AMPLIFIED:
        cells = [Cell(cell.iteration, 100.0 * cell.mean, 0.0, 1) for cell in results.cells(arm, quantity="share")]
        rows += band_rows(arm, cells, 0.0)
    if not rows:
        return ""
    y = {
        "field": "mean",
        "type": "quantitative",
        "scale": {"domain": [0, 100], "nice": False},
        "axis": {"title": "amplified layers, %", "tickCount": 5},
    }
    x = {
        "field": "iteration",
        "type": "ordinal",
        "title": "epoch",
        "scale": {"domain": list(range(1, protocol.epochs + 1))},
        "axis": {"grid": False, "labelAngle": 0},
    }
    encoding = {"x": x, "y": y, **LOOK.color}
    return svg(
        {
            "width": WIDTH,
            "height": 130,
            "data": {"values": rows},
            "layer": [
                {
                    "mark": {"type": "line", "strokeWidth": 1.5, "interpolate": "step"},
                    "encoding": {**encoding, **LOOK.dash},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                    "encoding": {**encoding, **LOOK.shape},
                },
            ],
        },
        "Share of amplified layers by epoch, mean over seeds",
        "share",
    )


def differences(results: Results) -> dict[str, str]:
    """Draw the paired differences of each amplified arm, all on one scale: arm -> drawing."""
    findings = results.findings()
    reach = reach_of(comparison for finding in findings for comparison in finding.comparisons)
    title = "percentage points (right of 0: higher accuracy)"
    return {
        finding.arm: difference_chart(
            list(zip(("vs plain", "vs every layer"), finding.comparisons, strict=False)),
            reach,
            title,
            colour(finding.arm),
            f"d-{finding.arm}",
            room=96,
        )
        for finding in findings
    }


def selection_maps(results: Results) -> dict[str, str]:
    """Draw layer by epoch maps of z, a column a seed, with the chosen layers marked; of ``random`` the marks alone.

    Args:
        results: the finished runs.

    Returns:
        Arm -> drawing; arms without a finished choice are left out.
    """
    maps = {}
    for arm in ("G", "G_prime", "random"):
        cells = _map_cells(results, arm)
        if cells:
            maps[arm] = _selection_map(cells, arm)
    return maps


def _map_cells(results: Results, arm: str) -> list[dict[str, Any]]:
    """Give a cell a layer, analysis epoch and seed, with its place from left to right."""
    runs = list(results.of(arm).items())[:MAP_SEEDS]
    epochs = sorted({selection["epoch"] for _, record in runs for selection in record["selections"]})
    return [
        {
            "layer": layer,
            "epoch": selection["epoch"],
            "seed": str(seed),
            "left": epochs.index(selection["epoch"]) * (len(runs) + GAP) + place,
            "right": epochs.index(selection["epoch"]) * (len(runs) + GAP) + place + 1,
            "middle": epochs.index(selection["epoch"]) * (len(runs) + GAP) + place + 0.5,
            "z": z,
            "size": min(abs(z or 0.0), Z_LIMIT),
            "side": "above" if (z or 0.0) > 0 else "below",
            "chosen": chosen,
        }
        for place, (seed, record) in enumerate(runs)
        for selection in record["selections"]
        for layer, (_, z, chosen) in selection["layers"].items()
    ]


def _selection_map(cells: list[dict[str, Any]], arm: str) -> str:
    """Draw one map."""
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    seeds = {cell["left"]: cell for cell in cells if cell["layer"] == layers[0]}
    width = max(cell["right"] for cell in cells)
    titles = []
    for epoch in sorted({cell["epoch"] for cell in cells}):
        here = [cell for cell in seeds.values() if cell["epoch"] == epoch]
        middle = (min(cell["left"] for cell in here) + max(cell["right"] for cell in here)) / 2
        titles.append({"middle": middle, "words": f"epoch {epoch}"})
    x = {"type": "quantitative", "scale": {"domain": [0, width], "nice": False}, "axis": None}
    y = {"field": "layer", "type": "nominal", "sort": layers, "scale": {"domain": layers}, "axis": names_axis(layers)}
    place = {"x": {"field": "left", **x}, "x2": {"field": "right"}, "y": y}
    strength = {
        "field": "size",
        "type": "quantitative",
        "scale": {"domain": [0, Z_LIMIT], "range": [0, 1]},
        "legend": None,
    }
    sides = {
        "field": "side",
        "type": "nominal",
        "scale": {"domain": ["below", "above"], "range": ["var(--below)", "var(--above)"]},
        "legend": None,
    }
    height = LINE * len(layers)
    words = {"type": "text", "fontSize": 11, "color": "var(--muted)"}
    drawn = [
        {"mark": {"type": "rect", "color": "var(--empty)"}, "encoding": place},
        {"mark": {"type": "rect"}, "encoding": {**place, "color": sides, "opacity": strength}},
        {
            "mark": {"type": "point", "filled": True, "size": 42, "opacity": 1, "color": "var(--ink)"}
            | {"stroke": "var(--card)", "strokeWidth": 1.5},
            "data": {"values": [cell for cell in cells if cell["chosen"]]},
            "encoding": {"x": {"field": "middle", **x}, "y": y},
        },
        {
            "mark": {**words, "baseline": "top"},
            "data": {"values": list(seeds.values())},
            "encoding": {"x": {"field": "middle", **x}, "y": {"value": height + 5}, "text": {"field": "seed"}},
        },
        {
            "mark": {**words, "baseline": "bottom"},
            "data": {"values": titles},
            "encoding": {"x": {"field": "middle", **x}, "y": {"value": -5}, "text": {"field": "words"}},
        },
        {
            "mark": {**words, "baseline": "top"},
            "data": {"values": [{"middle": width / 2, "words": "seed"}]},
            "encoding": {"x": {"field": "middle", **x}, "y": {"value": height + 20}, "text": {"field": "words"}},
        },
    ]
    label = f"Layer by epoch and seed, {ARMS[arm]}: " + ("z, and " if arm in MEASURED else "") + "the chosen layers"
    return svg(
        {"width": COLUMN * width, "height": height, "data": {"values": cells}, "layer": drawn}, label, f"map-{arm}"
    )
