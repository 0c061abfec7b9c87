"""Which cases of a matrix `make test` runs: so many that every two values that meet in it meet in one of them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the cases of tests marked `pairwise` that add no pair of arguments."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    result = []
    for cases in tests.values():
        kept = chosen([arguments(case.callspec.params.values()) for case in cases])
        result += [case for number, case in enumerate(cases) if number not in kept]
    return result


def arguments(values: Iterable[Any]) -> list[Hashable]:
    """Return what is paired of a case: its arguments, or of those that have them their aspects."""
    result: list[Hashable] = []
    for value in values:
        result += value.aspects() if hasattr(value, "aspects") else [value]
    return [value if type(value).__hash__ and not isinstance(value, tuple) else repr(value) for value in result]


def chosen(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Return the numbers of some cases whose pairs of values are those of all cases.

    Always the case that has most pairs still missing, the first of several; so the choice is the same each time.
    """
    pairs = [set(itertools.combinations(enumerate(values), 2)) or {values[0]} for values in cases]
    missing = set().union(*pairs)
    waiting = [(-len(have), number) for number, have in enumerate(pairs)]
    heapq.heapify(waiting)
    taken: set[int] = set()
    while missing:
        _, number = heapq.heappop(waiting)
        new = -len(pairs[number] & missing), number
        if waiting and new > waiting[0]:
            heapq.heappush(waiting, new)
            continue
        taken.add(number)
        missing -= pairs[number]
    return taken
