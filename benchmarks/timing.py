"""Times things side by side."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Row = dict[str, Any]


def compared(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Row]:
    """Time several things in turn, in a new random order each round; ratios are to the first.

    Args:
        arms: What to time; the first is what the others are compared with. One that returns a float has timed itself,
            in milliseconds.
        rounds: How many times each is timed, after three that are not.

    Returns:
        For each the median in milliseconds, the median of its ratios to the first within a round, and their quartiles.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(-3, rounds):
        for name in order.sample(list(arms), len(arms)):
            start = time.perf_counter()
            told = arms[name]()
            if round_ >= 0:
                times[name].append(told if type(told) is float else 1000 * (time.perf_counter() - start))
    base = next(iter(times.values()))
    rows: dict[str, Row] = {}
    for name, values in times.items():
        ratios = sorted(value / bare for value, bare in zip(values, base, strict=True))
        rows[name] = {
            "ms": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[-1 - len(ratios) // 4],
        }
    return rows


def ratio(bare: Callable[[], Any], attached: Callable[[], Any], rounds: int) -> Row:
    """Time two things in turn; milliseconds and their ratio."""
    rows = compared({"bare": bare, "attached": attached}, rounds)
    return {
        "bare_ms": rows["bare"]["ms"],
        "attached_ms": rows["attached"]["ms"],
        **{name: rows["attached"][name] for name in ("ratio", "ratio_low", "ratio_high")},
    }


def show(name: str, row: Row, target: float | None = None) -> Row:
    """Print a row of `ratio`, and return it with its target."""
    spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
    goal = "" if target is None else f"{target:.3f}".rstrip("0").ljust(3, "0")
    figures = f"{row['bare_ms']:>9.2f}{row['attached_ms']:>9.2f}{row['ratio']:>7.3f}"
    print(f"{name:<39}{figures}  {spread:<12}{goal:>6}", flush=True)
    return {**row, "target": target}


def heading(title: str, bare: str = "bare ms", other: str = "with") -> None:
    """Print the heading of rows of `ratio`."""
    print(f"\n{title:<39}{bare:>9}{other:>9}{'ratio':>7}  {'quartiles':<12}{'target':>6}")
