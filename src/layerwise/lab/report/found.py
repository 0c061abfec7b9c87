"""Finding finished runs below any folders, without changing anything there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.lab.configuration import Configuration
from layerwise.lab.errors import UsageError
from layerwise.lab.runs import Record

RUNS = "runs.json"
"""File that names the runs of an experiment, by which ``layerwise report`` finds them."""

NEEDED = ("finals", "diverged_at", "iterations", "layers", "seconds", "test_seconds", "factor", "parameters")
"""What the record of a finished run holds at least."""


@dataclass
class Found:
    """Finished runs.

    Attributes:
        records: each configuration and version once, in the order found.
        twice: copies of runs, which are counted once.
        unfinished: run folders without a record.
        damaged: run folders whose files do not fit together.
    """

    records: list[Record] = field(default_factory=list)
    twice: int = 0
    unfinished: int = 0
    damaged: int = 0


def find(folders: Sequence[Path]) -> Found:
    """Read the finished runs below folders.

    Args:
        folders: what ``--out`` named, folders of experiments, or folders of single runs, in any mix.

    Returns:
        The runs.

    Raises:
        UsageError: a folder is not there, or none holds a finished run.
    """
    found, seen, known = Found(), set(), set()
    for given in folders:
        if not given.is_dir():
            raise UsageError(f"runs={str(given)!r} is not a folder: give folders that layerwise has written to")
        for place in _run_folders(given):
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            _add(found, known, place)
    if not found.records:
        more = f" ({found.unfinished} are not finished, {found.damaged} are damaged)" if seen else ""
        raise UsageError(
            f"runs={', '.join(map(str, folders))}: no finished run is below: looked for folders with run.json, "
            f"record.json and metrics.parquet, and for {RUNS} of an experiment{more}; give the folder that --out named"
        )
    return found


def _run_folders(given: Path) -> Iterator[Path]:
    """Give the folders of the runs below a folder, and those that an experiment's list names."""
    if (given / "run.json").exists():
        yield given
        return
    try:
        listed = json.loads((given / RUNS).read_bytes())["runs"]
        yield from (given / each["folder"] for each in listed)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not the folder of an experiment, or of one whose list is damaged: what is below it is taken
    for path in sorted(given.rglob("run.json")):
        yield path.parent


def _add(found: Found, known: set[str], place: Path) -> None:
    """Add a run, unless it is there already, not finished, or damaged."""
    if not (place / "record.json").exists():
        found.unfinished += 1
        return
    try:
        record = read(place)
    except (OSError, ValueError, KeyError, TypeError):
        found.damaged += 1
        return
    same = json.dumps([record.configuration.as_json(), record.about.get("versions")], sort_keys=True)
    if same in known:
        found.twice += 1
        return
    known.add(same)
    found.records.append(record)


def read(place: Path) -> Record:
    """Read one finished run.

    Args:
        place: its folder.

    Returns:
        The run.

    Raises:
        OSError: a file cannot be read.
        ValueError: the files do not fit together.
        KeyError: something is missing in them.
        TypeError: they hold something else.
    """
    about: dict[str, Any] = json.loads((place / "run.json").read_bytes())
    summary: dict[str, Any] = json.loads((place / "record.json").read_bytes())
    configuration = Configuration(**about["configuration"])
    digest = hashlib.sha256((place / "metrics.parquet").read_bytes()).hexdigest()
    if digest != summary["metrics_sha256"] or not all(name in summary for name in NEEDED):
        raise ValueError(f"{place}: record.json does not belong to metrics.parquet")
    return Record(place, configuration, summary, about)
