"""Lists, counts and numbers as sentences have them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """Join names to "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(number: int, noun: str) -> str:
    """Write a number and its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def decimals_of(numbers: Sequence[float]) -> int:
    """Choose decimals, 2 to 6, that show two digits of the largest number and one of the smallest that is not 0."""
    sizes = [abs(number) for number in numbers if number]
    if not sizes:
        return 2
    return min(6, max(2, 1 - math.floor(math.log10(max(sizes))), -math.floor(math.log10(min(sizes)))))


def probability(p: float, alpha: float) -> str:
    """Write a p-value after its sign of comparison, on the right side of ``alpha``."""
    if p < 0.001:
        return "< 0.001"
    decimals = next((count for count in range(3, 16) if (round(p, count) < alpha) == (p < alpha)), 17)
    return f"= {p:.{decimals}f}"


def signed(value: float, decimals: int = 2) -> str:
    """Write a number with its sign, which is "+" or a true minus, not a hyphen."""
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
