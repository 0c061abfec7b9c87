"""What ``layerwise compare`` does: comparing methods on a user's task, after tuning them where values are given."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.experiments.plan import check_seeds
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.layout import plan
from layerwise.lab.tasks.tuning import Grid, tune


def run(
    file_and_function: str,
    grid: Grid | None = None,
    *,
    arms: Sequence[str] = (),
    seeds: int = 5,
    settings: Settings,
    display: Display | None = None,
) -> Outcome:
    """Compare methods on the task ``"file.py:function"``, every arm at its own values if there is a grid of them.

    The outcome is that of the tuning where it was interrupted or a run of it failed. Values that cannot be used are
    refused before anything is trained.
    """
    check_seeds(seeds)
    task_file = tasks.load(file_and_function)
    tried = task_file.tried(settings.device, validation=bool(grid))
    chosen = plan(task_file, arms=arms, seeds=seeds, tried=tried)
    if grid:
        tuned = tune(task_file, grid, arms=arms, settings=settings, display=display, tried=tried)
        if not tuned.outcome.complete:
            return tuned.outcome
        chosen = plan(task_file, arms=arms, seeds=seeds, tuned=tuned.chosen, notes=tuned.notes, tried=tried)
        if display is not None:
            for words in tuned.choices:
                display.say(words)
    return carry_out(chosen, settings, display)
