"""Figures as Vega-Lite specifications: the page's script draws them, and ``--figures`` writes them as files."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from layerwise.lab.errors import shown
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.report.words import capital, item_words, plain_arm

COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f9", "#11141a"),
    "card": ("#ffffff", "#1a1f28"),
    "ink": ("#1b1f27", "#e8ebf1"),
    "muted": ("#5b6472", "#a2acbb"),
    "line": ("#dfe3ea", "#323a48"),
    "accent": ("#0b5fa5", "#7cc0f2"),
    "notice": ("#b34700", "#f0a030"),
    "yes": ("#00705d", "#35c9a5"),
    "above": ("#0b5fa5", "#5aaef0"),
    "below": ("#c75000", "#f0a030"),
    "empty": ("#eef0f3", "#262d39"),
    "plain": ("#6d7480", "#a9b1be"),
    "c1": ("#0072b2", "#56b4e9"),
    "c2": ("#c75000", "#f0a030"),
    "c3": ("#00806a", "#35c9a5"),
    "c4": ("#9a5b9e", "#d59ad8"),
    "c5": ("#857000", "#ddd05a"),
    "c6": ("#b3235a", "#ff85ab"),
    "c7": ("#4b4fc4", "#a6aaff"),
    "c8": ("#52751a", "#a4cf57"),
}
"""Variable of the page -> its colour on light and on dark. The last nine are those of the arms."""

Spec = dict[str, Any]
"""A part of a Vega-Lite specification."""

WIDTH, HEIGHT = 420, 220  # plotting area of a file in pixels; in the page the width is that of the card

_AXIS = {
    "labelColor": "var(--muted)",
    "titleColor": "var(--muted)",
    "gridColor": "var(--line)",
    "domainColor": "var(--line)",
    "tickColor": "var(--line)",
    "labelFontSize": 11,
    "titleFontSize": 11,
    "titleFontWeight": "normal",
    "labelOverlap": "greedy",
    "labelSeparation": 8,
}

CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": _AXIS,
    "legend": {"labelColor": "var(--ink)", "titleColor": "var(--muted)", "labelFontSize": 11, "titleFontSize": 11},
    "title": {"color": "var(--ink)", "fontSize": 12, "anchor": "start", "fontWeight": 600},
}
"""Of every figure. Colours are variables of the page's style sheet, so that one figure serves light and dark."""

HIDDEN = {"filter": "indexof(hidden, datum.arm) < 0"}  # leaves out the arms that the reader has switched off

ZOOM = {"name": "zoom", "bind": "scales", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}}


@dataclass(frozen=True)
class Table:
    """The numbers of a figure, as text."""

    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Figure:
    """A figure."""

    name: str  # of its file, without the ending
    title: str
    summary: str  # what it shows in one sentence, for those who do not see it
    spec: Spec  # without data and width; the data is called ``rows``
    data: Mapping[str, Any]
    """Columns by name, of equal length. ``cross`` holds columns of which every combination is a row, the last one
    fastest. ``words`` holds the texts of columns that are given as numbers."""
    table: Table

    def whole(self) -> Spec:
        """Give a specification that stands alone: in the colours of light, with title, legend and data."""
        spec = _alone(self.spec)
        title = {"text": textwrap.wrap(capital(self.title), 70) or [""]}
        sized = {"width": WIDTH, "padding": 12, "background": COLOURS["card"][0]}
        whole = {**spec, **sized, "title": title, "datasets": {"rows": rows_of(self.data)}, "config": _alone(CONFIG)}
        return cleaned({"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **whole})

    def files(self) -> dict[str, bytes]:
        """Draw it: ``figures/NAME.svg`` and ``figures/NAME.png``."""
        import vl_convert

        whole, place = self.whole(), f"figures/{self.name}"
        svg = vl_convert.vegalite_to_svg(whole).encode()
        return {f"{place}.svg": svg, f"{place}.png": vl_convert.vegalite_to_png(whole, scale=2)}


def cleaned(value: Any) -> Any:
    """Escape what cannot be seen in every text: a control character in a figure ends the process that draws it."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {shown(name): cleaned(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [each if isinstance(each, (int, float)) or each is None else cleaned(each) for each in value]
    return value


def _alone(value: Any) -> Any:
    """Put the colours of light in the place of variables, and a legend where the page has one of its own."""
    if isinstance(value, str):
        found = re.fullmatch(r"var\(--(\w+)\)", value)
        return COLOURS[found[1]][0] if found else value
    if isinstance(value, list):
        return [_alone(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    made = {name: _alone(each) for name, each in value.items()}
    if "scale" in made and made.get("legend", "") is None:
        made["legend"] = {"title": None, "orient": "bottom", "columns": 2, "labelLimit": 360}
    return made


def rows_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of a figure from its columns, as the page's script does."""
    columns = {name: list(each) for name, each in data.items() if name not in ("cross", "words")}
    if "cross" in data:
        names = list(data["cross"])
        columns |= dict(zip(names, map(list, zip(*product(*data["cross"].values()), strict=True)), strict=True))
    for name, words in data.get("words", {}).items():
        columns[name] = [words[place] for place in columns[name]]
    return [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]


def columns_of(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Make the columns of a figure from its rows; numbers with a point are shortened."""
    return {
        name: [short(row[place]) if isinstance(row[place], float) else row[place] for row in rows]
        for place, name in enumerate(names)
    }


def short(value: float | None) -> float | None:
    """Keep five digits of a number, as many as a figure shows; None for what is no number."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def written(value: float | None) -> str:
    """Write a number of a figure's table."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def quantitative(name: str, title: str, **more: Any) -> Spec:
    """Give the encoding of a number on an axis; the scale need not begin at 0."""
    given = more.pop("scale", {})
    scale = {"nice": False, **({} if given.get("type") == "log" else {"zero": False}), **given}
    return {"field": name, "type": "quantitative", "title": title, "scale": scale, **more}


def scaled(name: str, texts: Sequence[str], values: Sequence[Any]) -> Spec:
    """Give the encoding of a text by one value each."""
    return {"field": name, "type": "nominal", "scale": {"domain": list(texts), "range": list(values)}, "legend": None}


def encodings(used: Sequence[Style]) -> dict[str, Spec]:
    """Give the encodings of colour, dash and shape for rows with a field ``arm``."""
    names = [style.words for style in used]
    return {
        "color": scaled("arm", names, [style.colour for style in used]),
        "strokeDash": scaled("arm", names, [list(style.dash) for style in used]),
        "shape": scaled("arm", names, [style.shape for style in used]),
    }


def of_arms(layers: Sequence[Spec], transform: Sequence[Spec] = (), **more: Any) -> Spec:
    """Give the specification of a figure of arms, which its reader can switch off."""
    hidden = {"params": [{"name": "hidden", "value": []}], "data": {"name": "rows"}}
    return {**hidden, "transform": [HIDDEN, *transform], "layer": list(layers), **more}


def layer(mark: str, encoding: Spec, *filters: str | Spec, **look: Any) -> Spec:
    """Give one layer of a figure: a mark for each row that passes the filters."""
    made: Spec = {"transform": [{"filter": each} for each in filters]} if filters else {}
    return {**made, "mark": {"type": mark, **look}, "encoding": encoding}


def tip(name: str, title: str, number: str = "") -> Spec:
    """Give a line of a tooltip: a text, or a number in a format."""
    if number:
        return {"field": name, "type": "quantitative", "title": title, "format": number}
    return {"field": name, "type": "nominal", "title": title}


def unique(names: Iterable[str], form: str = "{} ({})") -> list[str]:
    """Write names as they are shown, with a number after one that is there already."""
    made: dict[str, None] = {}
    for name in map(shown, names):
        words, count = name, 2
        while words in made:
            words, count = form.format(name, count), count + 1
        made[words] = None
    return list(made)


def slugs(names: Iterable[str]) -> dict[str, str]:
    """Make names of files and of elements: unique, at most 44 letters, digits and dashes."""
    names = list(dict.fromkeys(names))
    bases = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "x" for name in names]
    return dict(zip(names, unique(bases, "{}-{}"), strict=True))


# --- How arms are told apart ------------------------------------------------------------------------------------------

ARM_COLOURS = tuple(f"c{number}" for number in range(1, 9))

DASHES = ((1, 0), (7, 3), (9, 3, 2, 3), (5, 2, 1, 2), (3, 2), (12, 3), (2, 3), (6, 2, 2, 2, 2, 2))
"""Lengths of line and gap."""

SHAPES = ("circle", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left", "stroke")
"""Shapes of points; that of the plain arm is a square."""


@dataclass(frozen=True)
class Style:
    """How one arm, or one group of arms, is drawn."""

    words: str  # its name, which no other one has
    variable: str  # of its colour in the page
    dash: tuple[int, ...]
    shape: str

    @property
    def colour(self) -> str:
        """As the page's style sheet and its figures name it."""
        return f"var(--{self.variable})"

    @property
    def stroke(self) -> str:
        """The dashes as SVG writes them."""
        return " ".join(map(str, self.dash)) if self.dash[1] else "none"


def styles(plan: Plan) -> dict[str, Style]:
    """Choose how each arm or group of a plan is drawn; the first plain arm is grey everywhere.

    Beyond eight, colours return with another dash and shape.
    """
    plain = next((arm.name for subject in plan.subjects if (arm := plain_arm(plan, subject.name))), None)
    items = item_words(plan)
    found, place = {}, 0
    for item, words in zip(items, unique(items.values()), strict=True):
        if item == plain:
            found[item] = Style(words, "plain", (2, 2), "square")
            continue
        turn = place // len(ARM_COLOURS)
        dash, shape = DASHES[(place + 3 * turn) % len(DASHES)], SHAPES[(place + 5 * turn) % len(SHAPES)]
        found[item] = Style(words, ARM_COLOURS[place % len(ARM_COLOURS)], dash, shape)
        place += 1
    return found
