"""One drawing: SVG for use inside the page, and the same as a file of its own, without script and without address.

Inside the page colours are variables of its style sheet, ``var(--plain)`` and so on, so that one drawing serves light
and dark. A file has the colours of light, a title and a legend of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise.lab.errors import shown
from layerwise.lab.report.looks import COLOURS, Look
from layerwise.lab.report.renderer import renderer
from layerwise.lab.report.words import capital

VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"
"""Names the grammar; it is not fetched, and not written to the page."""

LETTER = 6.3
"""Pixels of a letter of 11 pixels, at most on average: the page's own font may be wider than that of the renderer."""

MARGIN, LINE = 16, 20
"""Of a file, in pixels: around the drawing, and of one line of its title or legend."""


@dataclass(frozen=True)
class Drawing:
    """A drawing.

    Attributes:
        name: of its file, without the ending.
        label: what it shows, for those who do not see it, and the title of its file.
        width: in pixels.
        height: in pixels.
        body: elements of SVG, with the page's variables for colours.
        legend: what is in it, for its file; the page has legends of its own.
        scale: colours and words of the two ends of a colour scale, for its file, or None.
    """

    name: str
    label: str
    width: float
    height: float
    body: str
    legend: Sequence[Look] = field(default=())
    scale: tuple[str, str, str] | None = None

    @property
    def inline(self) -> str:
        """The drawing for the page, scaled by it."""
        from markupsafe import escape

        return (
            f'<svg role="img" aria-label="{escape(shown(self.label))}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'style="max-width:{self.width:g}px">{self.body}</svg>'
        )

    @property
    def file(self) -> str:
        """The drawing as a file."""
        from markupsafe import escape

        width = max(self.width, 360.0)
        lines, y = [], MARGIN + 4.0
        for words in wrapped(capital(shown(self.label)), int(width / LETTER)):
            lines.append(f'<text x="{MARGIN}" y="{y + 9:g}" font-size="12" fill="var(--ink)">{escape(words)}</text>')
            y += LINE - 4
        drawn, y = _legend(self.legend, width, y + 4) if self.legend else ("", y)
        if self.scale is not None:
            drawn += _scale(self.scale, y)
            y += LINE
        whole_width, whole_height = width + 2 * MARGIN, y + self.height + 2 * MARGIN
        whole = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole_width:g}" height="{whole_height:g}" '
            f'viewBox="0 0 {whole_width:g} {whole_height:g}" font-family="sans-serif">'
            f'<rect width="100%" height="100%" fill="var(--card)"/>{"".join(lines)}{drawn}'
            f'<g transform="translate({MARGIN} {y + MARGIN:g})">{self.body}</g></svg>'
        )
        return re.sub(r"var\(--([a-z0-9]+)\)", lambda match: COLOURS[match[1]][0], whole)

    @property
    def png(self) -> bytes:
        """The file as pixels, two for one."""
        return renderer().pixels(self.file)


def slugs(words: Iterable[str]) -> dict[str, str]:
    """Give each text a name of small letters, digits and hyphens that no other of them has.

    Args:
        words: anything, as names of subjects.

    Returns:
        Text -> name for files and ids.
    """
    made: dict[str, str] = {}
    for text in words:
        base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "x"
        name, count = base, 2
        while name in made.values():
            name, count = f"{base}-{count}", count + 1
        made[text] = name
    return made


def wrapped(text: str, letters: int) -> list[str]:
    """Break a text into lines."""
    import textwrap

    return textwrap.wrap(text, max(letters, 20)) or [""]


def shortened(text: str, letters: int) -> str:
    """Cut the middle out of a name that is too long for its place."""
    text = shown(text)
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (letters - 1 - head) :]}"


def _legend(shown: Sequence[Look], width: float, y: float) -> tuple[str, float]:
    """Draw a legend in lines no longer than the drawing; give it and where the next line begins."""
    from markupsafe import escape

    drawn, x = [], float(MARGIN)
    for look in shown:
        words = shortened(look.words, 40)
        wide = 42 + LETTER * len(words) + 14
        if x > MARGIN and x + wide > width + MARGIN:
            x, y = float(MARGIN), y + LINE
        drawn.append(
            f'<g transform="translate({x:g} {y:g})"><line x1="0" y1="6" x2="34" y2="6" stroke="{look.colour}" '
            f'stroke-width="2.5" stroke-dasharray="{look.stroke}"/><path d="{look.sign}" fill="{look.colour}"/>'
            f'<text x="42" y="10" font-size="11" fill="var(--ink)">{escape(words)}</text></g>'
        )
        x += wide
    return "".join(drawn), y + LINE


def _scale(scale: tuple[str, str, str], y: float) -> str:
    """Draw a colour scale."""
    from markupsafe import escape

    colours, low, high = scale
    stops = colours.split(", ")
    left = MARGIN + LETTER * len(low) + 8
    step = 160 / len(stops)
    bars = "".join(
        f'<rect x="{left + place * step:g}" y="{y + 3:g}" width="{step + 0.5:g}" height="11" fill="{colour}"/>'
        for place, colour in enumerate(stops)
    )
    words = '<text x="{:g}" y="{:g}" font-size="11" fill="var(--muted)">{}</text>'
    return words.format(MARGIN, y + 12, escape(low)) + bars + words.format(left + 170, y + 12, escape(high))


def vega(name: str, label: str, specification: dict[str, Any], legend: Sequence[Look] = ()) -> Drawing:
    """Render a chart.

    A mark that is seen through has ``opacity`` 1 and ``fillOpacity`` or ``strokeOpacity``: with ``opacity`` below 1 the
    renderer draws each element on a picture of its own first, which takes three times as long.

    Args:
        name: of its file; also put before every id, as ids of several drawings in one page would clash.
        label: what it shows; plain text.
        specification: Vega-Lite without schema and configuration.
        legend: what is in it.

    Returns:
        The drawing.
    """
    # The renderer ends its process where a text holds what XML cannot, so that goes out before.
    whole = _cleaned({"$schema": VEGA_LITE, "config": _config(), **specification})
    drawn = renderer().chart(whole)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    if found is None:
        raise RuntimeError(f"drawing {name}: the renderer gave no size; is vl-convert-python 1.7 or later installed?")
    drawn = re.sub(r' (?:xmlns(?::xlink)?|role|aria-[a-z]+|version|class)="[^"]*"', "", drawn)
    drawn = re.sub(r' (id="|clip-path="url\(#|fill="url\(#)', rf" \g<1>{name}-", drawn)
    # A tenth of a pixel is enough, and halves the size of long curves.
    drawn = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\d\.\d)\d+", r"\1", path[0]), drawn)
    body = re.sub(r"^<svg[^>]*>|</svg>\s*$", "", drawn)
    return Drawing(name, label, float(found[1]), float(found[2]), body, tuple(legend))


def _cleaned(value: Any) -> Any:
    """Clean every text of a specification."""
    if isinstance(value, dict):
        return {name: _cleaned(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return shown(value) if isinstance(value, str) else value


def _config() -> dict[str, Any]:
    """Give the look that all charts share."""
    return {
        "background": None,
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "titleColor": "var(--muted)",
            "gridColor": "var(--line)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titlePadding": 8,
            "titleFontWeight": "normal",
        },
    }
