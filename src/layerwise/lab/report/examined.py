"""What ``layerwise doctor`` prints."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from layerwise.lab.errors import columns, shown
from layerwise.lab.progress import Meter
from layerwise.lab.report import checked
from layerwise.lab.report.terminal import finite
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.doctor import Examination, examine

if TYPE_CHECKING:
    from layerwise.lab import options


def run(asked: options.Doctor, arguments: Sequence[str], program: str) -> int:
    """Examine a task, print what was found, and write the page.

    Args:
        asked: the command line, read.
        arguments: the same, as given.
        program: the command as a person can type it.

    Returns:
        Exit code: 0, or 1 where there is a problem.
    """
    label = asked.task.rpartition("/")[2]
    checked.place_of(label, asked.out)  # before anything is trained
    target = None if asked.json or asked.quiet else Console(stderr=True, highlight=False)
    with Meter(target, "training", "updates") as meter:
        found = examine(tasks.load(asked.task), steps=asked.steps, seconds=asked.seconds, advance=meter.show)
    page = checked.write(label, shlex.join(["layerwise", *arguments]), found, asked.out)
    code = 1 if found.problems else 0
    if asked.json:
        told = json.dumps(finite(as_data(asked.task, found, page)), indent=2, allow_nan=False)
        sys.stdout.write(told + "\n")
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
    checkup = found.checkup
    trained = None
    if checkup is not None:
        trained = {
            "updates": len(checkup.records),
            "asked": checkup.asked,
            "seconds": checkup.seconds,
            "losses": checkup.losses,
            "layers": [asdict(layer) for layer in checkup.layers],
        }
    return {
        "task": task,
        "problems": found.problems,
        "findings": [asdict(finding) | {"sentence": finding.sentence} for finding in checkup.findings]
        if checkup is not None
        else [],
        "notes": list(found.notes),
        "training": trained,
        "page": None if page is None else str(page),
        "lines": found.lines,
    }
