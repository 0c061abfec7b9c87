"""What ``layerwise doctor`` prints, and its page: one HTML file that needs no network."""

from __future__ import annotations

import json
import math
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from layerwise.lab import options
from layerwise.lab.errors import columns, shown
from layerwise.lab.progress import Meter
from layerwise.lab.report.figures import HEIGHT, ZOOM, Figure, Table, columns_of, quantitative, tip, written
from layerwise.lab.report.layers import COLUMNS, GRADIENT_NORM, UPDATE_RATIO, VIRIDIS, Grid, Scale, heat_map
from layerwise.lab.report.rendering import rendered
from layerwise.lab.report.terminal import finite
from layerwise.lab.runs.files import check_page
from layerwise.lab.runs.store import write_whole
from layerwise.lab.stats.wording import counted
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.doctor import Checkup, Examination, examine
from layerwise.lab.tasks.findings import EXPLODING, FAR, HIGH_RATIO, LOW_RATIO, VANISHING, LayerNumbers
from layerwise.sinks import Record

QUANTITIES = {
    "update_ratio": UPDATE_RATIO,
    "gradient_norm": GRADIENT_NORM,
    "weight_norm": ("Weight norm", "‖w‖ over all parameters of a layer together, before the update."),
    "lr": ("Rate", "Learning rate of the layer's parameter group."),
}
"""What a monitor records -> its tab, and what it is."""


def run(asked: options.Doctor, arguments: Sequence[str], program: str) -> int:
    """Examine a task, print what was found, and write the page; give the exit code: 0, or 1 where there is a problem.

    ``arguments`` is the command line as given, ``program`` the command to type.
    """
    label = asked.task.rpartition("/")[2]
    path = place_of(label, asked.out)  # before anything is trained
    target = None if asked.json or asked.quiet else Console(stderr=True, highlight=False)
    with Meter(target, "training", "updates") as meter:
        widths = options.assignments([asked.coordinate_check], "coordinate-check") if asked.coordinate_check else None
        how = {"steps": asked.steps, "seconds": asked.seconds, "spectrum": asked.spectrum, "widths": widths}
        found = examine(tasks.load(asked.task), **how, advance=meter.show)
    page = None
    if found.checkup is not None:
        page = path
        check_page(page, asked.out)
        write_whole(page, build(label, shlex.join(["layerwise", *arguments]), found, found.checkup).encode())
    code = 1 if found.problems else 0
    if asked.json:
        sys.stdout.write(json.dumps(finite(as_data(asked.task, found, page)), indent=2, allow_nan=False) + "\n")
        return code
    lines = [*(found.conclusion if asked.quiet else found.lines)]
    if page is not None:
        lines.append(f"{'page':<12}{page}")
    how = {"subsequent_indent": " " * 12, "break_long_words": False, "break_on_hyphens": False}
    for line in lines:
        sys.stdout.write("\n".join(textwrap.wrap(shown(line), columns(), **how)) + "\n")
    if not asked.quiet:
        command = arguments if code else ["compare", asked.task]
        sys.stdout.write(f"\nNext:   {shown(shlex.join([program, *command]))}{'   (once that is fixed)' * code}\n")
    return code


def as_data(task: str, found: Examination, page: Path | None) -> dict[str, Any]:
    """Give what was found for a program."""
    checkup, trained, findings = found.checkup, None, []
    if checkup is not None:
        findings = [asdict(finding) | {"sentence": finding.sentence} for finding in checkup.findings]
        trained = {
            "updates": len(checkup.records),
            "asked": checkup.asked,
            "seconds": checkup.seconds,
            "losses": checkup.losses,
            "layers": [asdict(layer) for layer in checkup.layers],
            "roles": [asdict(role) for role in checkup.roles],
            "spectra": [asdict(spectrum) for spectrum in checkup.spectra],
        }
    return {
        "task": task,
        "problems": found.problems,
        "findings": findings,
        "notes": list(found.notes),
        "training": trained,
        "activations": None if found.activations is None else asdict(found.activations),
        "page": None if page is None else str(page),
        "lines": found.lines,
    }


def place_of(label: str, out: Path) -> Path:
    """Give where the page of a task goes; refuse it where a file lies that layerwise has not written."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in label.replace(".py:", "-"))
    path = out / "doctor" / f"{name}.html"
    check_page(path, out)
    return path


def build(label: str, command: str, found: Examination, checkup: Checkup) -> str:
    """Make the page, with every string escaped."""
    maps = [(words, drawn) for key, words in QUANTITIES.items() if (drawn := drawing(checkup.records, key))]
    losses = curve(checkup.losses)
    drawings = [*(drawn[0] for _, drawn in maps), *([losses] if losses else [])]
    return rendered(
        "doctor.html.j2",
        {figure.name: figure for figure in drawings},
        label=label,
        command=command,
        headline=headline(found),
        found=found,
        layers=[row(layer, checkup.layers) for layer in checkup.layers],
        measured="\n".join(found.measured).strip("\n"),
        maps=maps,
        tabs=[(f"tab-{drawn[0].name}", f"pane-{drawn[0].name}") for _, drawn in maps],
        viridis=VIRIDIS,
        curve=losses,
        described="\n".join(found.described),
        limits={"low": LOW_RATIO, "high": HIGH_RATIO, "far": FAR, "exploding": EXPLODING, "vanishing": VANISHING},
    )


def headline(found: Examination) -> str:
    """Return the result in one sentence."""
    problems = len(found.problems)
    findings = found.checkup.findings if found.checkup else ()
    notes = sum(not finding.serious for finding in findings) + len(found.notes)
    more = f", and {counted(notes, 'thing')} to note" if notes else ""
    if not problems:
        return f"No problem was found{more}."
    return f"{counted(problems, 'problem')} {'was' if problems == 1 else 'were'} found{more}."


def row(layer: LayerNumbers, layers: Sequence[LayerNumbers]) -> dict[str, Any]:
    """Write a layer's numbers, and tell which of them are outside of their limits."""
    largest = max((each.relative_gradient for each in layers if not each.from_zero), default=0.0)
    relative, ratio = layer.relative_gradient, layer.ratio
    outside = relative > EXPLODING or relative < VANISHING * largest or relative == 0
    numbers = {"gradient": layer.gradient, "weight": layer.weight, "lr": layer.lr, "relative": relative, "ratio": ratio}
    return {
        **{name: f"{value:.3g}" for name, value in numbers.items()},
        "name": layer.name or "(root)",
        "relative_far": outside and not layer.from_zero,
        "ratio_far": not LOW_RATIO <= ratio <= HIGH_RATIO and not layer.from_zero,
    }


def drawing(records: Sequence[Record], quantity: str) -> tuple[Figure, str, str] | None:
    """Draw a quantity of every layer by update, and give both ends of its colours in words; None without a number."""
    if not records:
        return None
    count, last = min(COLUMNS, len(records)), records[-1].step
    ends = tuple(sorted({max(1, round(last * (place + 1) / count)) for place in range(count)}))
    spans = [
        [record for record in records if begin < record.step <= end]
        for begin, end in zip((0, *ends[:-1]), ends, strict=True)
    ]
    values: dict[str, list[float | None]] = {}
    for place, name in enumerate(records[0].layers):
        lines = ([getattr(record, quantity)[place] for record in span] for span in spans)
        known = ([value for value in line if math.isfinite(value)] for line in lines)
        values[name or "(root)"] = [fmean(line) if line else None for line in known]
    grid = Grid(ends, values)
    if not grid.finite:
        return None
    scale, title = Scale.of(grid.finite), QUANTITIES[quantity][0]
    drawn = heat_map(grid, scale, quantity.replace("_", "-"), f"{title} of each layer by update", title, "update")
    return drawn, *scale.words


def curve(losses: Sequence[float]) -> Figure | None:
    """Draw the training loss by update; None without two finite ones."""
    pairs = [(step, loss) for step, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    if len(pairs) < 2:
        return None
    look = {"strokeWidth": 1.8, "color": "var(--accent)", "clip": True, "point": {"opacity": 0}}
    spec = {
        "params": [ZOOM],
        "data": {"name": "rows"},
        "height": HEIGHT,
        "mark": {"type": "line", **look},
        "encoding": {
            "x": quantitative("step", "update", axis={"grid": False, "format": ",d", "tickMinStep": 1}),
            "y": quantitative("value", "training loss", axis={"tickCount": 5, "format": ".4~g"}),
            "tooltip": [tip("step", "update", ",d"), tip("value", "training loss", ".5~g")],
        },
    }
    spread = pairs[:: -(-len(pairs) // 20)]
    table = Table(("update", "training loss"), [(f"{step:,}", written(loss)) for step, loss in spread])
    summary = f"From {written(pairs[0][1])} to {written(pairs[-1][1])} in {len(losses):,} updates."
    data = columns_of(("step", "value"), pairs)
    return Figure("training-loss", "Training loss by update", summary, spec, data, table)
