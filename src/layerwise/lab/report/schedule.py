"""The picture of a set-up, without runs: rates over the epochs, and where gradients are analysed and amplified."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from layerwise.lab.experiments.recipe import Recipe
from layerwise.lab.experiments.rules import phases
from layerwise.lab.report.figures import Figure, Table, quantitative, tip
from layerwise.lab.report.templates import rendered
from layerwise.lab.runs.files import OwnFolder

COLOURS = ["var(--c1)", "var(--c7)", "var(--line)", "var(--c2)", "var(--c3)"]


def write(recipe: Recipe, command: str, out: Path, *, figures: bool = False) -> tuple[str, Path]:
    """Write the page of a recipe with a picture; give what it shows in words, and the page."""
    drawn = draw(recipe)
    page = rendered("schedule.html.j2", {drawn.name: drawn}, it=recipe, drawn=drawn, command=command, tabs=[])
    own = OwnFolder(out / recipe.name, out)
    own.write({**(drawn.files() if figures else {}), "report.html": page.encode()})
    return drawn.summary, own.path / "report.html"


def spans(recipe: Recipe) -> list[tuple[str, int, int, str]]:
    """Give rows of the picture: what it is of, first epoch, last epoch, and what happens in these."""
    constants = {name: entry["value"] for name, entry in recipe.content["constants"].items()}
    rates = (constants["rate"] * constants["gamma"] ** place for place in range(len(constants["steps"]) + 1))
    ends = pairwise([0, *constants["steps"], constants["epochs"]])
    found = [
        ("learning rate", before + 1, end, f"rate {rate:g}") for (before, end), rate in zip(ends, rates, strict=True)
    ]
    for networks, name in recipe.content["picture"].items():
        first = 1
        for until, amplifies, factor in phases(name, constants["epochs"]):
            if amplifies:
                found.append((networks, first, first, "analysed"))
            found.append((networks, first + amplifies, until, f"amplified × {factor:g}" if amplifies else "plain"))
            first = until + 1
    return found


def draw(recipe: Recipe) -> Figure:
    rows = spans(recipe)
    columns = dict(zip(("row", "first", "last", "what"), map(list, zip(*rows, strict=True)), strict=True))
    scale = {"domain": list(dict.fromkeys(columns["what"])), "range": COLOURS}
    legend = {"title": None, "orient": "bottom", "columns": 3}
    spec = {
        "data": {"name": "rows"},
        "height": 130,
        "mark": {"type": "bar"},
        "encoding": {
            "x": quantitative("before", "epoch", axis={"grid": False}),
            "x2": {"field": "last"},
            "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 190}},
            "color": {"field": "what", "type": "nominal", "scale": scale, "legend": legend},
            "tooltip": [tip("row", "of"), tip("what", "what"), tip("first", "from epoch"), tip("last", "to epoch")],
        },
    }
    says: dict[str, list[str]] = {}
    for row, first, last, what in rows:
        says.setdefault(row, []).append(f"{what} in {first}" + ("" if first == last else f" to {last}"))
    summary = "Epochs. " + " ".join(f"{row}: {', '.join(parts)}." for row, parts in says.items())
    table = Table(("of", "from epoch", "to epoch", "what"), [tuple(map(str, row)) for row in rows])
    data = {**columns, "before": [first - 1 for first in columns["first"]]}
    return Figure("set-up", "Rates and phases by epoch", summary, spec, data, table)
