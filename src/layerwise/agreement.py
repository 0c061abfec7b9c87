"""Compares small tables between processes through the key-value store, before the first step."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

SECONDS = 10.0
"""Time to wait for processes that may not take part."""

LONGEST = 60.0
"""Time to wait for processes without which the next collective would hang."""

Table = dict[str, Any]
_counts: tuple[Any, Counter[str]] = (None, Counter())


def compared(
    kind: str, own: Table, merge: Callable[[Table, Table], Table], ranks: Sequence[int] | None, seconds: float
) -> Table | None:
    """Return the merged table of all processes; None if one of them does not arrive in time.

    The processes exchange their tables through the process group's key-value store. Unlike a collective, it can time
    out. Each process merges its table into that of the process before it, so each writes one table. Either all of them
    get the last table, or none does.

    Args:
        kind: What is compared. The n-th comparison of a kind is matched with the n-th in the other processes.
        own: This process's table, as JSON can hold it.
        merge: Merges two tables.
        ranks: The processes; None for all.
        seconds: The time to wait for them.
    """
    global _counts
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    several = distributed.get_world_size() if ranks is None else len(ranks)
    if _counts[0] is not store:  # a new process group
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
    except RuntimeError:  # a timeout; the first process to report it decides for all
        store.compare_set(f"{key}/verdict", "", "missing")
    if store.get(f"{key}/verdict") != b"all":
        return None
    return json.loads(store.get(f"{key}/{several}"))


def can_compare() -> bool:
    """Return whether there is a store. MPI has none, and a fake process group has no other processes."""
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    return store is not None and distributed.get_backend() != "fake"


def digest(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
