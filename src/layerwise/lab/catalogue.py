"""What there is: recipes and data sets, with what they need and whether it is here."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from layerwise.lab.experiments.tuned_recipe import TunedRecipe, counts
from layerwise.lab.progress import Meter
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.runs.record import Record

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder
    from layerwise.lab.experiments.plan import Plan


LEAST_TITLE = 20  # letters; where there is no room for so many, the list has no titles


class _Looked(Runs):
    """Runs each of which is looked for once, though several recipes and scales share it."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self._found: dict[str, Record | None] = {}

    def find(self, configuration: Configuration) -> Record | None:
        name = configuration.name
        if name not in self._found:
            self._found[name] = super().find(configuration)
        return self._found[name]


def entries(names: Sequence[str], out: Path, folder: Path | None) -> list[dict[str, Any]]:
    """Gather what is known of recipes and their scales, of the runs in ``out`` and of the data sets in ``folder``."""
    found = []
    runs = _Looked(out)

    @cache
    def opened() -> ImageFolder | None:
        """Give the image folder, if it is there and laid out as it must be."""
        with suppress(UsageError):
            found = data.open_folder(folder)
            return found if found.digest else None

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
            plan = read.plan(scale)
            datasets = sorted({run.configuration.trial["data"] for run in plan.runs})
            planned, done = len(plan.runs), 0
            if "tuned" in read.content:
                planned, done = counts(TunedRecipe(read, scale), runs)
            elif runs.path.is_dir():
                done = finished(plan, datasets)
            scales[scale] = {
                "runs": planned,
                "finished": done,
                "datasets": datasets,
                "present": all(data.present(dataset, folder) for dataset in datasets),
                **read.need(scale)._asdict(),
            }
        found.append({"name": name, "title": read.title, "source": read.content["source"], "scales": scales})
    return found


def show(names: Sequence[str], out: Path, folder: Path | None, *, as_json: bool, program: str) -> str:
    """Write ``entries`` as text, one alone in detail, or as JSON; ``program`` begins the commands that it names."""
    listed = entries(names, out, folder)
    if as_json:
        return json.dumps(listed, indent=2) + "\n"
    buffer = io.StringIO()
    target = Console(file=buffer, width=columns(), highlight=False)
    if len(listed) > 1:
        target.print(_brief(listed, columns()))
        target.print(f"\nMore on one of them:  {program} list NAME", markup=False, soft_wrap=True)
        target.print("Times are of the scale that is run where none is named.")
    else:
        target.print(Text(f"{listed[0]['name']}  {listed[0]['title']}"))
        target.print(_details(listed[0], folder))
        target.print()
    target.print("Times are of cores that do nothing else; beside other work they are several times as long.")
    needed = [name for entry in listed for about in entry["scales"].values() for name in about["datasets"]]
    for name in dict.fromkeys(needed):
        if not data.present(name, folder):
            target.print(f"Not here: {name}. Get it with  {program} data {name}", markup=False, soft_wrap=True)
    first = next((entry for entry in listed if entry["name"] == "singh2015-table1"), listed[0])
    smoke = " --scale smoke" if first["scales"] else ""
    target.print(f"Next:   {program} run {first['name']}{smoke}", markup=False, soft_wrap=True)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _brief(listed: Sequence[dict[str, Any]], width: int) -> Table:
    """Lay recipes out, a line each: name, title, how long its usual scale takes, and how many runs are finished."""
    rows: list[tuple[str, str, str, str]] = []
    for entry in listed:
        scales = entry["scales"]
        usual = scales.get("reduced") or next(iter(scales.values()), {"time": "no runs"})
        finished = sum(about["finished"] for about in scales.values())
        rows.append((entry["name"], entry["title"], shortly(usual["time"]), f"{finished:,} done" if finished else ""))
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, pad_edge=False)
    for justify in ("left", "left", "left", "right"):
        table.add_column(no_wrap=True, justify=justify)
    room = width - sum(max(len(row[place]) for row in rows) + 1 for place in (0, 2, 3))
    for name, title, time, finished in rows:
        table.add_row(name, Text(_shortened(title, room) if room >= LEAST_TITLE else ""), time, finished)
    return table


def _shortened(text: str, most: int) -> str:
    """Leave words in the middle of a text out: its end tells it from others."""
    if len(text) <= most:
        return text
    words = text.split()
    places = [(first, last) for first in range(1, len(words)) for last in range(first + 1, len(words))]
    parts = [(" ".join(words[:first]), " ".join(words[last:])) for first, last in places]
    fitting = [part for part in parts if len(" … ".join(part)) <= most]
    return " … ".join(
        max(fitting, key=lambda part: (min(map(len, part)), sum(map(len, part))), default=("", words[-1]))
    )


def _details(entry: dict[str, Any], folder: Path | None) -> Table:
    """Lay the scales of a recipe out with everything that is known of them."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for scale, about in entry["scales"].items():
        needed = (name if data.present(name, folder) else f"{name} (not here)" for name in about["datasets"])
        runs = f"{about['finished']}/{about['runs']}" if about["finished"] else str(about["runs"])
        table.add_row(f"  {scale}", "runs", runs)
        table.add_row("", "time", about["time"])
        table.add_row("", "memory", about["memory"])
        table.add_row("", "data", f"{about['data']}; {', '.join(needed)}")
    return table


def shortly(time: str) -> str:
    """Leave out of a time where it holds, and what it was estimated from: "25 to 45 min" of "25 to 45 minutes on …"."""
    short = re.split(r"[;,(]| on ", time)[0].strip().removeprefix("about ")
    return re.sub(r"minutes?", "min", re.sub(r"hours?", "h", short))


def show_data(name: str, folder: Path | None, *, quiet: bool, as_json: bool, program: str) -> int:
    """Fetch a data set, or list them all; exit code 1 if it is not there and could not be fetched."""
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
    with Meter(None if quiet or as_json else Console(stderr=True, highlight=False), "", "MB", scale=1e6) as meter:
        code, words = _got(data.known(name).name, target, lambda file, done, total: meter.show(done, total, file))
    _say({"name": name, "folder": str(target), "present": data.present(name, target), "words": words}, words, as_json)
    return code


def _got(name: str, target: Path, progress: Callable[[str, int, int], None]) -> tuple[int, str]:
    """Fetch a data set; give the exit code, and where it is or what to do."""
    from layerwise.lab.data import fetch, library
    from layerwise.lab.data.download import MirrorsError

    if name == "digits5k":
        return 0, "digits5k comes with layerwise: nothing to fetch"
    if name == data.LIBRARY:
        library.load()  # it says what is missing
        return 0, f"{name} comes with Python: nothing to fetch"
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
