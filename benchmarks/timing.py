"""Times two things side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def ratio(bare: Callable[[], Any], attached: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Time two things in turn; milliseconds and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for action in (bare, attached) * 3:
        action()
    for round_ in range(rounds):
        for which in (0, 1) if round_ % 2 else (1, 0):  # neither always runs in the other's warm cache
            start = time.perf_counter()
            (bare, attached)[which]()
            times[which].append(1000 * (time.perf_counter() - start))
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "bare_ms": statistics.median(times[0]),
        "attached_ms": statistics.median(times[1]),
        "ratio": statistics.median(times[1]) / statistics.median(times[0]),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-len(ratios) // 4],
    }
