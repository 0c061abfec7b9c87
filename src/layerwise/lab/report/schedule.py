"""The picture of a set-up, without runs: rates over the epochs, and where gradients are analysed and amplified."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from layerwise.lab.experiments.recipe import Recipe
from layerwise.lab.experiments.rules import phases
from layerwise.lab.report.figures import Figure, Table, quantitative, tip
from layerwise.lab.report.rendering import rendered
from layerwise.lab.runs.files import OwnFolder

SPAN_COLOURS = ["var(--c1)", "var(--c7)", "var(--line)", "var(--c2)", "var(--c3)"]


def write(recipe: Recipe, command: str, out: Path, *, figures: bool = False) -> tuple[str, Path]:
    """Write the page of a recipe with a picture; give what it shows in words, and the page."""
    drawn, own = draw(recipe), OwnFolder(out / recipe.name, out)
    page = rendered("schedule.html.j2", {drawn.name: drawn}, it=recipe, drawn=drawn, command=command, tabs=[])
    own.write({**(drawn.files() if figures else {}), "report.html": page.encode()})
    return drawn.summary, own.path / "report.html"


def spans(recipe: Recipe) -> list[tuple[str, int, int, str]]:
    """Give rows of the picture: what it is of, first epoch, last epoch, and what happens in these."""
    given = {name: entry["value"] for name, entry in recipe.content["constants"].items()}
    found: list[tuple[str, int, int, str]] = []
    for place, (before, end) in enumerate(pairwise([0, *given["steps"], given["epochs"]])):
        found.append(("learning rate", before + 1, end, f"rate {given['rate'] * given['gamma'] ** place:g}"))
    for networks, name in recipe.content["picture"].items():
        first = 1
        for until, amplifies, factor in phases(name, given["epochs"]):
            if amplifies:
                found.append((networks, first, first, "analysed"))
            found.append((networks, first + amplifies, until, f"amplified × {factor:g}" if amplifies else "plain"))
            first = until + 1
    return found


def draw(recipe: Recipe) -> Figure:
    """Draw the spans of a recipe as bars over epochs, a row for the rate and one for each kind of network."""
    rows = spans(recipe)
    names, first, last, what = map(list, zip(*rows, strict=True))
    colours = {"domain": list(dict.fromkeys(what)), "range": SPAN_COLOURS}
    legend = {"title": None, "orient": "bottom", "columns": 2}
    encoding = {
        "x": quantitative("before", "epoch", axis={"grid": False}),
        "x2": {"field": "last"},
        "y": {"field": "row", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 190}},
        "color": {"field": "what", "type": "nominal", "scale": colours, "legend": legend},
        "tooltip": [tip("row", "of"), tip("what", "what"), tip("first", "from epoch"), tip("last", "to epoch")],
    }
    says: dict[str, list[str]] = {}
    for name, a, b, happens in rows:
        says.setdefault(name, []).append(f"{happens} in {a}" if a == b else f"{happens} in {a} to {b}")
    summary = "Epochs. " + " ".join(f"{name}: {', '.join(parts)}." for name, parts in says.items())
    data = {"row": names, "before": [epoch - 1 for epoch in first], "first": first, "last": last, "what": what}
    table = Table(("of", "from epoch", "to epoch", "what"), [tuple(map(str, row)) for row in rows])
    spec = {"data": {"name": "rows"}, "height": 130, "mark": {"type": "bar"}, "encoding": encoding}
    return Figure("set-up", "Rates and phases by epoch", summary, spec, data, table)
