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
    """Give the folder of the data sets: of ``--data-dir``, of LAYERWISE_DATA, ``home()`` if it is there, or None."""
    if given is None and os.environ.get("LAYERWISE_DATA"):
        given = Path(os.environ["LAYERWISE_DATA"])
    if given is None:
        return home() if home().is_dir() else None
    if not given.is_dir():
        raise UsageError(
            f"data-dir={str(given)!r} is not a folder: give an existing one; layerwise data NAME says what it must hold"
        )
    return given


def ready(plan: Plan, folder: Path | None) -> Plan:
    """Refuse to begin without the data of a plan, and bind what is on an image folder to that folder."""
    for name in sorted({run.configuration.trial["data"] for run in plan.runs if run.task is None}):
        if not data.present(name, folder):
            where = "no folder of data sets is known" if folder is None else f"{folder} does not hold it"
            raise UsageError(
                f"this needs {data.known(name).title}, and {where}: layerwise data {name} fetches it or says where to "
                "put it; give its folder with --data-dir or LAYERWISE_DATA (--scale smoke needs no data)"
            )
    return bound(plan, folder)


def bound(plan: Plan, folder: Path | None) -> Plan:
    """Bind the runs on an image folder to the one that is there, so that runs on another are other runs."""
    return bound_to(plan, data.open_folder(folder)) if any(map(_on_folder, plan.runs)) else plan


def bound_to(plan: Plan, opened: ImageFolder) -> Plan:
    """Put the digest of an image folder into the configuration of each run on it, and its numbers into words."""

    def of(run: PlannedRun) -> PlannedRun:
        trial = {**run.configuration.trial, "data_digest": opened.digest}
        return replace(run, configuration=replace(run.configuration, trial=trial)) if _on_folder(run) else run

    def in_words(classes: int, train: int, test: int) -> str:
        return f"{classes:,} classes, {train:,} photographs to train and {test:,} to test"

    counts, notes = (opened.classes, opened.train_count, opened.test_count), plan.notes
    if counts != data.IMAGENET_COUNTS and (plan.paper or plan.claims):
        note = (
            f"These runs are on {in_words(*counts)}. The paper's numbers are of ImageNet: "
            f"{in_words(*data.IMAGENET_COUNTS)}."
        )
        notes = (*(words for words in notes if words != note), note)
    mixed = not all(map(_on_folder, plan.runs))
    title = f"{plan.data_title}; {opened.title}" if mixed else opened.title
    return replace(plan, runs=tuple(map(of, plan.runs)), notes=notes, data_title=title)


def _on_folder(run: PlannedRun) -> bool:
    return run.configuration.trial.get("data") == data.FOLDER
