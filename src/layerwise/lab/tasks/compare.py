"""Comparing methods on a user's task, without tuning: what ``layerwise compare`` does."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.experiments.plan import check_seeds
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.layout import plan


def run(
    file_and_function: str,
    *,
    arms: Sequence[str] = (),
    seeds: int = 5,
    settings: Settings,
    display: Display | None = None,
) -> Outcome:
    """Compare methods on a task, every arm at the task's own values; see ``tuning.run``.

    Args:
        file_and_function: ``"file.py:function"``.
        arms: names, as ``methods.make_arms`` takes them.
        seeds: number of seeds.
        settings: how runs are carried out.
        display: shows what happens.

    Returns:
        The outcome.

    Raises:
        UsageError: a value that cannot be used, reported before anything is trained.
    """
    check_seeds(seeds)
    task_file = tasks.load(file_and_function)
    tried = task_file.tried(settings.device)
    return carry_out(plan(task_file, arms=arms, seeds=seeds, tried=tried), settings, display)
