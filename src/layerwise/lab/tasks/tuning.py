"""Tuning a user's own task: its parameters are what is tried, judged by its own validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.methods import make_arms
from layerwise.lab.experiments.plan import TRIALS, Arm, Plan, Subject
from layerwise.lab.experiments.runner import Display, Settings
from layerwise.lab.experiments.tuning import SEEDS, Grid, Space, Tuner, space_of, with_ratios
from layerwise.lab.experiments.tuning import tune as carry_out_trials
from layerwise.lab.tasks.layout import Layout, plan
from layerwise.lab.tasks.task import TaskFile, TriedTask
from layerwise.layers import make_layers, named_parameters_of
from layerwise.rules.roles import roles_of


@dataclass(frozen=True)
class TaskBench:
    """A task on the bench of a tuning; ``compared`` are the seeds of the comparison."""

    task_file: TaskFile
    tried: TriedTask
    arms: tuple[Arm, ...]
    tries: Space
    names: tuple[str, ...] = ()  # of the arms, as they were asked for
    compared: int = 5

    @property
    def subjects(self) -> Sequence[Subject]:
        """The task alone."""
        return (Subject(name="task", words=self.task_file.label),)

    def arms_of(self, subject: str) -> Sequence[Arm]:
        """All arms."""
        return self.arms

    def space(self, subject: str, arm: Arm) -> Space:
        """Give the same settings to every arm."""
        return with_ratios(self.tries, arm, self.arms)

    def trials(self, pairs: Sequence[tuple[Subject, Subject, Arm]], arms: Sequence[Arm], seeds: Sequence[int]) -> Plan:
        """Plan runs that never call the metric, but validation."""
        return Layout(self.task_file, self.tried).plan(
            "validation",
            suffix="-tuning",
            title="tuning",
            subjects=list({at.name: at for _, at, _ in pairs}.values()),
            arms=arms,
            seeds=seeds,
            notes=(f"{TRIALS}: they choose values, and nothing is concluded from them.",),
            pairs=[(at, arm) for _, at, arm in pairs],
        )

    def comparison(self, tuner: Tuner) -> Plan:
        """Plan the comparison, each arm at its own values."""
        chosen = {arm.name: tuner.chosen("task", arm.name) for arm in self.arms}
        given = {"tuned": chosen, "notes": tuner.notes, "tried": self.tried}
        return plan(self.task_file, arms=self.names, seeds=self.compared, **given)


def space(task_file: TaskFile, grid: Grid, draws: int | None = None) -> Space:
    """Give the settings that a grid of a task's parameters has, or refuse what cannot be one."""
    whole = [
        name for name, value in task_file.defaults.items() if isinstance(value, int) and not isinstance(value, bool)
    ]
    if draws is not None and not grid:
        raise UsageError(f"tune random:{draws} without a range: add one, as --tune lr=1e-3:1e1")
    return space_of(grid, draws, task_file.with_values, whole)


def tune(
    task_file: TaskFile,
    grid: Grid,
    *,
    draws: int | None = None,
    arms: Sequence[str] = (),
    seeds: int = SEEDS,
    compared: int = 5,
    settings: Settings,
    display: Display | None = None,
    tried: TriedTask | None = None,
) -> Tuner:
    """Try every setting of a grid with every arm, or ``draws`` of its ranges; ``compared`` seeds are compared later."""
    tries = space(task_file, grid, draws)
    tried = tried or task_file.tried(settings.device, validation=True)
    made = tuple(_searching(arm, task_file, tried) for arm in make_arms(arms))
    bench = TaskBench(task_file, tried, made, tries, tuple(arms), compared)
    return carry_out_trials(bench, settings, display, seeds=seeds)


def _searching(arm: Arm, task_file: TaskFile, tried: TriedTask) -> Arm:
    """Tell an arm that searches which roles the network has."""
    if arm.search is None:
        return arm
    trial = tried.trial
    layers = make_layers(named_parameters_of(trial.optimizer, trial.model), "parameter", trial.model)
    roles = sorted(set(roles_of(layers)))
    if len(roles) < 2:
        raise task_file.refuse(f"has layers of one role ({roles[0]}): leave the arm {arm.name!r} out")
    return replace(arm, search={"roles": roles})
