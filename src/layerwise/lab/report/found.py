"""Finding finished runs below any folders, without changing anything there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.lab.configuration import Configuration
from layerwise.lab.errors import UsageError
from layerwise.lab.runs import Record
from layerwise.lab.store import read_bytes, read_signed

_sorted = json.JSONEncoder(sort_keys=True).encode

RUNS = "runs.json"
"""File that names the runs of an experiment, by which ``layerwise report`` finds them."""


class Form(NamedTuple):
    """Kinds that a value may be of, and those of what it holds, if that matters."""

    kinds: tuple[type, ...]
    inside: tuple[type, ...] = ()


NOTHING = type(None)
WORDS, WHOLE, NUMBER = Form((str,)), Form((int,)), Form((int, float))

NEEDED = {
    "finals": Form((dict,), (int, float, NOTHING)),
    "diverged_at": Form((int, NOTHING)),
    "iterations": WHOLE,
    "layers": Form((list,), (str,)),
    "seconds": NUMBER,
    "test_seconds": NUMBER,
    "factor": Form((dict,)),
    "parameters": WHOLE,
}
"""What the record of a finished run holds at least."""

FACTOR = {"mean": NUMBER, "spread": NUMBER, "layers": Form((dict,), (int, float))}
"""What it holds of the factors."""

MORE = {
    "threads": WHOLE,
    "sessions": WHOLE,
    "peak_memory": NUMBER,
    "selections": Form((list,), (dict,)),
    "place": Form((str, NOTHING)),
    "decay": Form((str, NOTHING)),
}
"""What it may hold besides."""

MORE_FACTOR = {"names": Form((list,), (str,)), "excluded": Form((list,), (str,))}

ABOUT = {"versions": Form((dict,), (str,)), "hardware": Form((dict,)), "python": WORDS, "started": WORDS}
"""What ``run.json`` holds of where a run was done."""

CONFIGURATION = {
    "trial": Form((dict,)),
    "rule": Form((dict, NOTHING)),
    "apply": WORDS,
    "decay": WORDS,
    "threads": WHOLE,
    "device": WORDS,
    "source": Form((str, NOTHING)),
    "seed": WHOLE,
}
"""What tells a run from others."""


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
    # A run's own folder is not listed, and none in it is looked at: of thousands that would take long.
    found, left = [], [os.fspath(given)]
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (found if os.path.isfile(f"{entry.path}/run.json") else left).append(entry.path)
    yield from map(Path, sorted(found))


def _add(found: Found, known: set[str], place: Path) -> None:
    """Add a run, unless it is there already, not finished, or damaged."""
    try:
        record = read(place)
    except (OSError, ValueError, KeyError, TypeError):
        if (place / "record.json").exists():
            found.damaged += 1
        else:
            found.unfinished += 1
        return
    same = _sorted([record.about["configuration"], record.about.get("versions")])
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
    folder = os.fspath(place)  # of thousands of runs, joining paths would take as long as reading them
    about, summary = read_signed(f"{folder}/run.json"), read_signed(f"{folder}/record.json")
    configuration = Configuration(**about["configuration"])
    digest = hashlib.sha256(read_bytes(f"{folder}/metrics.parquet")).hexdigest()
    if digest != summary["metrics_sha256"]:
        raise ValueError(f"{place}: record.json does not belong to metrics.parquet")
    _check(vars(configuration), CONFIGURATION, place)
    _check(summary, NEEDED, place)
    _check(summary["factor"], FACTOR, place)
    for values, forms in ((about, ABOUT), (summary, MORE), (summary["factor"], MORE_FACTOR)):
        _check(values, {name: form for name, form in forms.items() if name in values}, place)
    return Record(place, configuration, summary, about)


def _check(values: Mapping[str, Any], forms: Mapping[str, Form], place: Path) -> None:
    """Refuse values of another kind than those that layerwise writes, which would end the page with an error later."""
    for name, form in forms.items():
        value = values[name]
        good = isinstance(value, form.kinds)
        if good and form.inside:
            inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            good = all(isinstance(one, form.inside) for one in inside)
        if not good:
            raise ValueError(f"{place}: {name}={value!r} is not what a run has there")
