"""Finding finished runs below any folders, without changing anything there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.record import read_tables
from layerwise.lab.runs.records import Record, read_run
from layerwise.lab.runs.schema import RUN_LIST, check
from layerwise.lab.runs.store import read_json

if TYPE_CHECKING:
    import polars

_sorted = json.JSONEncoder(sort_keys=True).encode

RUNS = "runs.json"
"""File that names the runs of an experiment, by which ``layerwise report`` finds them."""


MOST_NAMED = 50
"""Runs that are left out and named; further ones are counted."""


@dataclass
class Found:
    """Finished runs.

    Attributes:
        records: each configuration and version once, in the order found.
        twice: copies of runs, which are counted once.
        unfinished: run folders without a record.
        damaged: run folders whose files do not fit together.
        left_out: what could not be read, and why.
        tables: the runs' numbers, by file.
    """

    records: list[Record] = field(default_factory=list)
    twice: int = 0
    unfinished: int = 0
    damaged: int = 0
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    tables: dict[Path, polars.DataFrame] = field(default_factory=dict, repr=False)

    @property
    def skipped(self) -> list[str]:
        """Say what was left out, by name, in at most ``MOST_NAMED`` lines."""
        return skipped(self.left_out)


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
        for place in _run_folders(given, found):
            try:
                about = os.stat(place)  # tells folders apart by whatever path they were reached
            except OSError:
                real = os.path.realpath(place)
            else:
                real = (about.st_dev, about.st_ino)
            if real in seen:
                continue
            seen.add(real)
            _add(found, known, place)
    found.tables, broken = read_tables(record.metrics_file for record in found.records)
    found.left_out += [(file, reason) for file, reason in broken.items()]
    found.damaged += len(broken)
    found.records = [record for record in found.records if record.metrics_file not in broken]
    if not found.records:
        more = f" ({found.unfinished} are not finished, {found.damaged} are damaged)" if seen else ""
        more += "".join(f"; left out: {words}" for words in found.skipped[:1])
        raise UsageError(
            f"runs={', '.join(map(str, folders))}: no finished run is below: looked for folders with run.json, "
            f"record.json and metrics.parquet, and for {RUNS} of an experiment{more}; give the folder that --out named"
        )
    return found


def _run_folders(given: Path, found: Found) -> Iterator[Path]:
    """Give the folders of the runs below a folder, and those that an experiment's list names."""
    if os.path.lexists(given / "run.json"):
        yield given
        return
    if os.path.lexists(given / RUNS):
        try:
            listed = [each["folder"] for each in run_list(given)]
        except (OSError, UsageError) as error:
            listed = []
            found.left_out.append((given / RUNS, str(error)))
        for folder in listed:
            try:
                yield listed_place(given, folder)
            except UsageError as error:
                found.left_out.append((Path(folder), str(error)))
    # A run's own folder is not listed, and none in it is looked at: of thousands that would take long.
    places, left = [], [os.fspath(given)]
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (places if os.path.lexists(f"{entry.path}/run.json") else left).append(entry.path)
                elif entry.is_symlink() and os.path.lexists(f"{entry.path}/run.json"):
                    places.append(entry.path)  # is left out by name
    yield from map(Path, sorted(places))


def listed_place(page: Path, folder: str) -> Path:
    """Give the folder of a run that an experiment's list names.

    Args:
        page: folder of the experiment.
        folder: of the run, as the list names it: relative, and below ``--out``, where the experiment's folder lies.

    Returns:
        The folder.

    Raises:
        UsageError: it lies elsewhere. A list from somebody else must not gather files of this machine.
    """
    if os.path.isabs(folder) or "\0" in folder:
        raise UsageError(f"{page / RUNS} names it by a path that is not relative")
    above = os.path.realpath(page.absolute().parent)
    place = os.path.realpath(page / folder)
    if os.path.commonpath([above, place]) != above:
        raise UsageError(f"{page / RUNS} names a run outside of {above}: give the folder of that run to report instead")
    return page / folder


def _add(found: Found, known: set[str], place: Path) -> None:
    """Add a run, unless it is there already, not finished, or damaged."""
    try:
        record = read_run(place)
    except (OSError, UsageError) as error:
        if os.path.lexists(place / "run.json") and not os.path.lexists(place / "record.json"):
            found.unfinished += 1
            return
        found.damaged += 1
        found.left_out.append((place, str(error)))
        return
    same = _sorted([record.about["configuration"], record.about.get("versions")])
    if same in known:
        found.twice += 1
        return
    known.add(same)
    found.records.append(record)


def run_list(folder: Path) -> list[dict[str, Any]]:
    """Read which runs an experiment has.

    Args:
        folder: of the experiment.

    Returns:
        For each run its folder, and subject, arm and seed where they are known.

    Raises:
        OSError: the list is not there or cannot be read.
        UsageError: it is damaged.
    """
    content = read_json(folder / RUNS)
    check(content, RUN_LIST, folder / RUNS)
    return content["runs"]


def skipped(left_out: Sequence[tuple[Path, str]]) -> list[str]:
    """Say what was left out and why; the reason names the file where it is another place."""
    told = [
        reason if reason.startswith(str(place)) else f"{place}: {reason}" for place, reason in left_out[:MOST_NAMED]
    ]
    more = len(left_out) - len(told)
    return [*told, *([f"{more} more that could not be read"] if more > 0 else [])]
