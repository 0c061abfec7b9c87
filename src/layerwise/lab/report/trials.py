"""What the arms of an experiment tried before they were compared, and what that took."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.lab.experiments.plan import Plan, Tuned, Tuning
from layerwise.lab.experiments.tuning import setting_words
from layerwise.lab.progress import duration
from layerwise.lab.stats.wording import counted


@dataclass(frozen=True)
class TrialRow:
    """What an arm tried on a subject."""

    subject: str
    words: str
    chosen: str
    score: str  # of the chosen setting
    count: str  # of its settings
    tried: str  # each setting with its score
    warnings: tuple[str, ...]


def cost(tuning: Tuning) -> str:
    """Say how many runs the tuning had, and how long they took."""
    words = f"The tuning took {counted(tuning.runs, 'run')}, {duration(tuning.seconds)} of one process"
    extended = [arm for arm in tuning.arms if arm.extensions]
    if extended:
        more = sum(arm.extensions for arm in extended)
        words += (
            f"; {counted(more, 'setting')} of them beyond the edge of a grid, for {counted(len(extended), 'choice')}"
        )
    diverged = sum(arm.diverged for arm in tuning.arms)
    if diverged:
        words += f"; {counted(diverged, 'setting')} with a diverged run counted as the worst"
    return f"{words}."


def trial_rows(plan: Plan) -> list[TrialRow]:
    """Give a row for each arm on each subject; none where nothing was tuned by the lab."""
    if plan.tuning is None:
        return []
    words = {arm.name: arm.words for arm in plan.arms}
    subjects = {subject.name: subject.words for subject in plan.subjects}
    return [
        TrialRow(
            subjects.get(one.subject, one.subject),
            words.get(one.arm, one.arm),
            setting_words(one.chosen),
            _score(one.best.score),
            f"{len(one.trials) - one.extensions}" + (f" + {one.extensions}" if one.extensions else ""),
            _tried(one),
            one.warnings,
        )
        for one in plan.tuning.arms
    ]


def _tried(one: Tuned) -> str:
    return "; ".join(f"{setting_words(trial.setting)}: {_score(trial.score)}" for trial in one.trials)


def _score(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"
