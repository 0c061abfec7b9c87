"""How arms are told apart: by colour, and by dashes and shapes for readers who do not see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layerwise.lab.errors import shown
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.report.words import item_words, plain_arm

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


def unique(names: Iterable[str]) -> list[str]:
    """Write names as they are shown, with a number after one that is there already."""
    made: dict[str, None] = {}
    for name in map(shown, names):
        words, count = name, 2
        while words in made:
            words, count = f"{name} ({count})", count + 1
        made[words] = None
    return list(made)
