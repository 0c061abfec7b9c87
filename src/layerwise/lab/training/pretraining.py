"""The weights that runs begin from: trained once below the folder of the runs, by whichever run needs them first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import BusyError, RunFolder
from layerwise.lab.training import trial
from layerwise.lab.training.engine import CHECKPOINT_SECONDS, Training
from layerwise.lab.training.trial import StoppedError

FOLDER = "pretrained"
"""Folder of weights, beside that of the runs."""

WAIT_SECONDS = 0.2
"""Seconds between two looks at weights that another process trains."""

DONE = "pretrained"
"""Mark of a checkpoint at the end of its training."""


def folder_of(before: Configuration, out: Path) -> RunFolder:
    """Give the folder of weights; it need not exist."""
    return RunFolder(out / FOLDER / before.name, before)


def weights(
    before: Configuration,
    out: Path,
    data_dir: Path | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> dict[str, Any]:
    """Give the weights at the end of a run without a rule; train them, or wait while another process does.

    They lie in the last checkpoint, under its checksum. Where that is damaged, training goes on from the checkpoint
    before, or begins anew, to the same bits. Stopped, it raises StoppedError.
    """
    folder = folder_of(before, out)
    while True:
        found = _finished(folder)
        if found is not None:
            return found
        try:
            with folder.lock():
                return _finished(folder) or _trained(folder, data_dir, stop, progress, checkpoint_seconds)
        except BusyError:
            if stop():
                raise StoppedError from None
            time.sleep(WAIT_SECONDS)


def _finished(folder: RunFolder) -> dict[str, Any] | None:
    state = folder.load_checkpoint() if folder.path.is_dir() else None
    return state["model"] if state is not None and state.get(DONE) else None


def _trained(
    folder: RunFolder,
    data_dir: Path | None,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
    checkpoint_seconds: float,
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one, and keep the weights."""
    before = folder.configuration
    folder.begin({})
    made = trial.build(before, data_dir, before.device)
    training = Training(made, None, before, folder=folder, checkpoint_seconds=checkpoint_seconds)
    summary = training.run(stop, progress)
    if summary["diverged_at"] is not None:
        raise UsageError(
            f"the training of {folder.path} diverged after {summary['diverged_at']} updates: give pretrained a lower "
            "rate"
        )
    state = {**training.state_dict(), DONE: True}
    folder.save_checkpoint(state)
    folder.say("finished", summary["iterations"], summary["iterations"], weights=summary["weights"])
    return state["model"]
