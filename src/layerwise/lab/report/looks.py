"""How arms are distinguished: by colour, and by dashes and shapes for readers who do not see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise.lab.experiments.plan import Plan
from layerwise.lab.report.words import item_words, plain_arm

COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f9", "#11141a"),
    "card": ("#ffffff", "#1a1f28"),
    "ink": ("#1b1f27", "#e8ebf1"),
    "muted": ("#5b6472", "#a2acbb"),
    "line": ("#dfe3ea", "#323a48"),
    "accent": ("#0b5fa5", "#7cc0f2"),
    "notice": ("#c75000", "#f0a030"),
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

DASHES: tuple[tuple[int, ...], ...] = (
    (1, 0),
    (7, 3),
    (9, 3, 2, 3),
    (5, 2, 1, 2),
    (3, 2),
    (12, 3),
    (2, 3),
    (6, 2, 2, 2, 2, 2),
)

SHAPES: dict[str, str] = {
    "circle": "M12.5 6A4.5 4.5 0 1 0 21.5 6A4.5 4.5 0 1 0 12.5 6Z",
    "triangle-up": "M17 1L22 10L12 10Z",
    "diamond": "M17 0L22.5 6L17 12L11.5 6Z",
    "triangle-down": "M17 11L22 2L12 2Z",
    "cross": "M15.5 1H18.5V4.5H22V7.5H18.5V11H15.5V7.5H12V4.5H15.5Z",
    "triangle-right": "M22 6L13 11L13 1Z",
    "triangle-left": "M12 6L21 11L21 1Z",
    "stroke": "M12 4.5H22V7.5H12Z",
    "square": "M13 2H21V10H13Z",
}
"""Shape of Vega-Lite -> the same in a legend of 34 x 12 pixels; the last one is that of the plain arm."""

ARM_COLOURS = tuple(f"c{number}" for number in range(1, 9))


@dataclass(frozen=True)
class Look:
    """How one arm, or one group of arms, is drawn.

    Attributes:
        key: unique in the page, of letters and digits.
        words: its name.
        variable: of its colour in the page.
        dash: lengths of line and gap.
        shape: of its points, a key of ``SHAPES``.
    """

    key: str
    words: str
    variable: str
    dash: tuple[int, ...]
    shape: str

    @property
    def colour(self) -> str:
        """As the page's style sheet and its drawings name it."""
        return f"var(--{self.variable})"

    @property
    def stroke(self) -> str:
        """The dashes as SVG writes them."""
        return " ".join(map(str, self.dash)) if self.dash[1] else "none"

    @property
    def sign(self) -> str:
        """Path of the shape in a legend."""
        return SHAPES[self.shape]


def looks(plan: Plan) -> dict[str, Look]:
    """Choose how each arm or group of a plan is drawn; the first plain arm is grey everywhere.

    Args:
        plan: the experiment.

    Returns:
        Arm or group -> look. Beyond eight, colours return with another dash and shape.
    """
    plain = next((arm.name for subject in plan.subjects if (arm := plain_arm(plan, subject.name))), None)
    found, place = {}, 0
    for key, (item, words) in enumerate(item_words(plan).items()):
        if item == plain:
            found[item] = Look(f"a{key}", words, "plain", (2, 2), "square")
            continue
        turn = place // len(ARM_COLOURS)
        found[item] = Look(
            f"a{key}",
            words,
            ARM_COLOURS[place % len(ARM_COLOURS)],
            DASHES[(place + 3 * turn) % len(DASHES)],
            list(SHAPES)[(place + 5 * turn) % (len(SHAPES) - 1)],
        )
        place += 1
    return found


def encodings(shown: list[Look]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Give Vega-Lite's encodings of colour, dash and shape for rows with a field ``item``.

    Args:
        shown: the looks of a chart.

    Returns:
        Colour, dash, shape.
    """

    def scaled(name: str, values: list[Any]) -> dict[str, Any]:
        scale = {"domain": [look.key for look in shown], "range": values}
        return {name: {"field": "item", "type": "nominal", "scale": scale, "legend": None}}

    return (
        scaled("color", [look.colour for look in shown]),
        scaled("strokeDash", [list(look.dash) for look in shown]),
        scaled("shape", [look.shape for look in shown]),
    )
