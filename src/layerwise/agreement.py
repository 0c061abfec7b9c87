"""Compares what several processes train, once, before the first step."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

SECONDS = 10.0
"""How long a process waits for others that may not take part at all."""

LONGEST = 60.0
"""How long it waits for processes without which its next collective would hang."""

Table = dict[str, Any]
_counts: tuple[Any, Counter[str]] = (None, Counter())


def compared(
    kind: str, own: Table, merge: Callable[[Table, Table], Table], ranks: Sequence[int] | None, seconds: float
) -> Table | None:
    """Return what the processes have merged of their tables; None if one of them has not come in time.

    They talk through the key-value store by which they met. A collective would leave those waiting forever that train
    with one that never comes. Each merges its table into that of the process before it, so that all together write as
    many tables as there are processes. Either all of them get the last table or none does.

    Args:
        kind: What is compared. The n-th comparison of a kind meets the n-th of the others.
        own: This process's table, of what JSON holds.
        merge: Merges two tables.
        ranks: The processes; None for all.
        seconds: How long to wait for them.
    """
    global _counts
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    several = distributed.get_world_size() if ranks is None else len(ranks)
    if _counts[0] is not store:  # the processes have met anew
        _counts = (store, Counter())
    among = hashlib.sha256(json.dumps([kind, ranks]).encode()).hexdigest()[:16]
    _counts[1][among] += 1
    key = f"layerwise/{among}/{_counts[1][among]}"
    ticket = store.add(f"{key}/came", 1)
    try:
        if 1 < ticket <= several:
            store.wait([f"{key}/{ticket - 1}"], timedelta(seconds=seconds))
            own = merge(json.loads(store.get(f"{key}/{ticket - 1}")), own)
        store.set(f"{key}/{ticket}", json.dumps(own))
        if ticket == several:
            store.compare_set(f"{key}/verdict", "", "all")
        store.wait([f"{key}/verdict"], timedelta(seconds=seconds))
    except RuntimeError:  # the time is over; the first to say so decides for all
        store.compare_set(f"{key}/verdict", "", "missing")
    if store.get(f"{key}/verdict") != b"all":
        return None
    return json.loads(store.get(f"{key}/{several}"))


def can_compare() -> bool:
    """Return whether there is a store: MPI has none, and of a fake process group there are no other processes."""
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    return store is not None and distributed.get_backend() != "fake"


def digest(value: Any) -> str:
    """Return a short text that is the same for equal values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
