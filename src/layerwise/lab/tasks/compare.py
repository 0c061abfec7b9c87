"""What ``layerwise compare`` does: comparing methods on a user's task, after tuning them where values are given."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.methods import SEARCHES
from layerwise.lab.experiments.plan import check_seeds
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.experiments.tuning import Grid, carry_out_tuned
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.layout import plan
from layerwise.lab.tasks.tuning import tune


def run(
    file_and_function: str,
    grid: Grid | None = None,
    *,
    draws: int | None = None,
    arms: Sequence[str] = (),
    seeds: int = 5,
    settings: Settings,
    display: Display | None = None,
) -> Outcome:
    """Compare methods on the task ``"file.py:function"``, every arm at its own values if there is a grid of them.

    With ``draws`` so many settings are drawn from the grid's ranges. The outcome is that of the tuning where it was
    interrupted or a run of it failed. Values that cannot be used are refused before anything is trained.
    """
    check_seeds(seeds)
    task_file = tasks.load(file_and_function)
    asked = bool(grid) or draws is not None
    tried = task_file.tried(settings.device, validation=asked)
    same = {"arms": arms, "settings": settings, "display": display, "tried": tried}
    first = plan(task_file, arms=arms, seeds=seeds, tried=tried)
    searching = [arm.name for arm in first.arms if arm.name in SEARCHES]
    if searching and not asked:
        raise UsageError(f"arm {searching[0]!r} draws its multipliers in trials: add --tune, as --tune lr=1e-3:1e1:9")
    if not asked:
        return carry_out(first, settings, display)
    return carry_out_tuned(tune(task_file, grid or {}, draws=draws, compared=seeds, **same), settings, display)
