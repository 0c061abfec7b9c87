"""Tuning: every arm tries the same values on the same seeds, judged by validation alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.methods import make_arms
from layerwise.lab.experiments.plan import Plan, Subject
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.runs.values import Value
from layerwise.lab.tasks.layout import Layout, setting_words, value_words
from layerwise.lab.tasks.task import TaskFile, TriedTask

FIRST_SEED = 10_000
"""Above every seed of a comparison, which are below ``plan.LARGEST_SEEDS``: what was tuned on is never judged on."""

SEEDS = 2
LARGEST_GRID = 1000

Grid = Mapping[str, Sequence[Value]]
"""Parameter -> values."""

Setting = dict[str, Value]


@dataclass(frozen=True)
class Tuning:
    """The result of a tuning, whose plan has a subject for each setting, in the order of the settings."""

    outcome: Outcome
    grid: Grid

    @property
    def plan(self) -> Plan:
        """Of the tuning's runs."""
        return self.outcome.plan

    def scores(self, arm: str) -> list[float]:
        """Give the mean validation of an arm at each setting; the worst of all where a seed diverged."""
        return [self._score(subject.name, arm) for subject in self.plan.subjects]

    def _score(self, subject: str, arm: str) -> float:
        records = self.outcome.results.of(subject, arm)
        values = [record.summary["finals"].get("validation") for record in records.values()]
        known = [value for value in values if value is not None]
        if len(known) < len(self.plan.seeds) or any(record.diverged for record in records.values()):
            return -math.inf if self.plan.quantity.higher_is_better else math.inf
        return math.fsum(known) / len(known)

    @property
    def chosen(self) -> dict[str, Setting]:
        """Give the best setting of each arm; of equal ones the first."""
        best = max if self.plan.quantity.higher_is_better else min
        chosen = {}
        for arm in self.plan.arms:
            scores = self.scores(arm.name)
            chosen[arm.name] = dict(self.plan.subjects[scores.index(best(scores))].constants)
        return chosen

    @property
    def notes(self) -> list[str]:
        """Say what was tried, on what, and what was chosen."""
        grid = "; ".join(f"{name} of {', '.join(map(value_words, values))}" for name, values in self.grid.items())
        seeds, count = self.plan.seeds, len(self.plan.subjects)
        return [
            f"Tuned: {grid}. Every arm, the plain one and the controls too, had the same {count} settings on the same "
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {count * len(seeds)} runs an arm, judged by the mean "
            "of validation alone; no seed of the tuning is among those of the comparison.",
            *self.choices,
        ]

    @property
    def choices(self) -> list[str]:
        """Say what was chosen, and which choices are at the edge of the grid."""
        chosen, words = self.chosen, {arm.name: arm.words for arm in self.plan.arms}
        notes = [
            f"Chosen: {'; '.join(f'{words[name]}: {setting_words(setting)}' for name, setting in chosen.items())}."
        ]
        for name, setting in chosen.items():
            if not any(map(math.isfinite, self.scores(name))):
                notes.append(f"Warning: {words[name]} diverged at every setting; the first one stands.")
            for parameter in self._at_edge(setting):
                value = value_words(setting[parameter])
                notes.append(
                    f"Warning: {words[name]} has {parameter}={value}, at the edge of its values: better ones may lie "
                    "beyond, so give more of them."
                )
        return notes

    def _at_edge(self, setting: Setting) -> list[str]:
        """Name the parameters whose value is the lowest or highest of several numbers; 0 has nothing below it."""
        found = []
        for name, values in self.grid.items():
            numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
            value = setting[name]
            if len(numbers) < 2 or len(numbers) < len(values) or not isinstance(value, (int, float)):
                continue
            if value == max(numbers) or (value == min(numbers) and value != 0):
                found.append(name)
        return found


def settings_of(task_file: TaskFile, grid: Grid) -> tuple[Setting, ...]:
    """Give every combination of a grid's values, or refuse what cannot be one; the last parameter changes first."""
    for name, given in grid.items():
        if isinstance(given, str) or not given:
            raise UsageError(f"tune {name}={given!r}: give a list of values, as {name}=0.01,0.03,0.1")
        for value in given:
            task_file.with_values({name: value})
    values = {name: list(dict.fromkeys(given)) for name, given in grid.items()}
    settings = tuple(dict(zip(values, row, strict=True)) for row in product(*values.values()))
    if len(settings) > LARGEST_GRID:
        raise UsageError(f"tune has {len(settings)} settings: must be at most {LARGEST_GRID}; give fewer values")
    return settings


def tune(
    task_file: TaskFile,
    grid: Grid,
    *,
    arms: Sequence[str] = (),
    seeds: int = SEEDS,
    settings: Settings,
    display: Display | None = None,
    tried: TriedTask | None = None,
) -> Tuning:
    """Try every setting of a grid with every arm. The runs never call the metric, but validation."""
    combinations = settings_of(task_file, grid)
    tried = tried or task_file.tried(settings.device, validation=True)
    plan = Layout(task_file, tried).plan(
        "validation",
        suffix="-tuning",
        title="tuning",
        subjects=[Subject(name=(words := setting_words(each)), words=words, constants=each) for each in combinations],
        # A control follows its method's run of the same setting and seed; settings are not compared with one another.
        arms=[replace(arm, against=()) for arm in make_arms(arms)],
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
        notes=("Runs of a tuning: they choose values, and nothing is concluded from them.",),
    )
    grid = {name: tuple(dict.fromkeys(values)) for name, values in grid.items()}
    return Tuning(carry_out(plan, settings, display), grid)
