"""Where data sets are looked for and put."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.lab import data
from layerwise.lab.errors import UsageError

if TYPE_CHECKING:
    from layerwise.lab.data.folder import ImageFolder
    from layerwise.lab.experiments.plan import Plan, PlannedRun


def home() -> Path:
    """Give the folder in which ``layerwise data`` puts data sets where no other is named."""
    from platformdirs import user_data_path

    return user_data_path("layerwise") / "data"


def data_dir(given: Path | None) -> Path | None:
    """Give the folder of the data sets.

    Args:
        given: by ``--data-dir``.

    Returns:
        It, or that of the environment variable LAYERWISE_DATA, or ``home()`` if it is there, or None.

    Raises:
        UsageError: the folder that was named does not exist.
    """
    if given is None and os.environ.get("LAYERWISE_DATA"):
        given = Path(os.environ["LAYERWISE_DATA"])
    if given is None:
        return home() if home().is_dir() else None
    if not given.is_dir():
        raise UsageError(
            f"data-dir={str(given)!r} is not a folder: give an existing one; layerwise data NAME says what it must hold"
        )
    return given


def require(name: str, folder: Path | None) -> None:
    """Refuse to begin without the data.

    Args:
        name: of the data set.
        folder: of ``data_dir``.

    Raises:
        UsageError: it is not there; the text says how to get it.
    """
    if data.present(name, folder):
        return
    where = "no folder of data sets is known" if folder is None else f"{folder} does not hold it"
    raise UsageError(
        f"this needs {data.known(name).title}, and {where}: layerwise data {name} fetches it or says where to put it; "
        "give its folder with --data-dir or LAYERWISE_DATA (--scale smoke needs no data)"
    )


def ready(plan: Plan, folder: Path | None) -> Plan:
    """Refuse to begin without the data of a plan, and bind what is on an image folder to that folder.

    Args:
        plan: the experiment; runs of a person's own task bring their data.
        folder: of ``data_dir``.

    Returns:
        The plan, bound.

    Raises:
        UsageError: as ``require`` and ``bound``.
    """
    for name in sorted({run.configuration.trial["data"] for run in plan.runs if run.task is None}):
        require(name, folder)
    return bound(plan, folder)


def bound(plan: Plan, folder: Path | None) -> Plan:
    """Bind the runs on an image folder to the one that is there, so that runs on another are other runs.

    Args:
        plan: the experiment.
        folder: of ``data_dir``.

    Returns:
        The plan with the folder's digest in the configuration of each such run and with its numbers in words; the
        same plan if no run is on an image folder.

    Raises:
        UsageError: the folder is not there, or is not laid out like ImageNet.
    """
    return bound_to(plan, data.open_folder(folder)) if any(map(_on_folder, plan.runs)) else plan


def bound_to(plan: Plan, opened: ImageFolder) -> Plan:
    """Bind the runs on an image folder to this one; see ``bound``."""
    runs = tuple(_bound_run(run, opened.digest) if _on_folder(run) else run for run in plan.runs)
    mixed = not all(map(_on_folder, plan.runs))
    counts = opened.classes, opened.train_count, opened.test_count
    notes = plan.notes
    if counts != data.IMAGENET_COUNTS and (plan.paper or plan.claims):
        here, there = map(_in_words, (counts, data.IMAGENET_COUNTS))
        note = f"These runs are on {here}. The paper's numbers are of ImageNet: {there}."
        notes = (*(words for words in notes if words != note), note)
    title = f"{plan.data_title}; {opened.title}" if mixed else opened.title
    return replace(plan, runs=runs, notes=notes, data_title=title)


def _in_words(counts: tuple[int, int, int]) -> str:
    return f"{counts[0]:,} classes, {counts[1]:,} photographs to train and {counts[2]:,} to test"


def _on_folder(run: PlannedRun) -> bool:
    return run.configuration.trial.get("data") == data.FOLDER


def _bound_run(run: PlannedRun, digest: str) -> PlannedRun:
    trial = {**run.configuration.trial, "data_digest": digest}
    return replace(run, configuration=replace(run.configuration, trial=trial))
