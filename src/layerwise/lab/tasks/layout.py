"""The plan of a comparison on a user's task: what comparing, tuning and examining it have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import layerwise
from layerwise import rules
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.methods import METHODS, make_arms, phases
from layerwise.lab.experiments.plan import (
    FACTORS_ALONE,
    Arm,
    Plan,
    PlannedRun,
    Quantity,
    Subject,
    check_names,
    check_seeds,
)
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.values import Value
from layerwise.lab.tasks.task import Stream, TaskFile, TriedTask


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Take what the library warns of meanwhile."""
    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())
    logger = logging.getLogger("layerwise")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield words
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Layout:
    """Puts runs of one task together.

    Args:
        task_file: the task.
        tried: what a try of it found.
    """

    def __init__(self, task_file: TaskFile, tried: TriedTask) -> None:
        self.task_file = replace(task_file, length=tried.trial.epoch_length)
        self.tried = tried
        self._passes: dict[tuple[Any, ...], int | None] = {}

    def run(self, subject: str, arm: Arm, seed: int, values: Mapping[str, Value], measure: str) -> PlannedRun:
        """Give one run.

        Args:
            subject: its name.
            arm: the arm.
            seed: of the run.
            values: of the task's parameters.
            measure: ``"metric"`` or ``"validation"``.
        """
        chosen = self.task_file.with_values(values)
        configuration = Configuration(
            trial=chosen.configuration(layers_every=self.tried.layers_every, measure=measure),
            rule=self._rule(arm, chosen),
            apply=arm.apply,
            seed=seed,
        )
        return PlannedRun(subject=subject, arm=arm, seed=seed, configuration=configuration, task=chosen)

    def _rule(self, arm: Arm, chosen: TaskFile) -> dict[str, Any] | None:
        """Write an arm's rule out, the phases of an amplification for the epochs that a run of these values has."""
        if arm.rule is None or arm.rule["name"] != "GradientAmplification":
            return None if arm.rule is None else dict(arm.rule)
        key = tuple(sorted(chosen.values.items()))
        if key not in self._passes:
            with Stream(0):
                self._passes[key] = chosen.build(0).passes
        return {**arm.rule, "selection": dict(arm.rule["selection"]), "phases": phases(self._passes[key])}

    def check(self, runs: Sequence[PlannedRun]) -> None:
        """Attach the rule of each arm once, so that what cannot be attached is reported before anything is trained.

        Raises:
            UsageError: a rule cannot be attached to the task's optimizer.
        """
        trial = self.tried.trial
        for planned in {run.arm.name: run for run in runs}.values():
            rule: Any = rule_making.make_rule(planned.configuration.rule, 0)
            places: dict[str, Any] = {}
            if planned.arm.control == "mean factor":
                rule, places = rules.Constant({"*": 1.0}), {"apply": "lr"}
            if rule is not None:
                try:
                    with _heard() as warned:
                        layerwise.LayerwiseLR(trial.optimizer, rule, trial.model, **places).detach()
                except (TypeError, ValueError) as error:
                    problem = f"arm {planned.arm.name!r} cannot be attached: {error}"
                    raise self.task_file.refuse(problem) from error
                if warned:  # a choice that can choose nothing: the arm would be the plain one
                    raise self.task_file.refuse(
                        f"arm {planned.arm.name!r} would be plain training: {warned[0]}; it takes a model of more "
                        "layers; leave the arm out, or try amplification-random or amplification-all"
                    )

    @property
    def quantity(self) -> Quantity:
        """What arms are judged by."""
        words = self.tried.metric.replace("_", " ")
        better = self.tried.higher_is_better
        return Quantity(name=self.tried.metric, words=words, unit="", difference_unit="", higher_is_better=better)

    @property
    def name(self) -> str:
        """Of the experiment's folder."""
        stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in self.task_file.path.stem)
        return f"{stem}-{self.task_file.function}"

    @property
    def step_unit(self) -> str:
        """What curves count."""
        return "iteration" if self.tried.trial.iterations is not None else "epoch"

    def constants(self) -> dict[str, tuple[Any, str]]:
        """Give what the page says of the task: name -> value and source."""
        trial, file = self.tried.trial, self.task_file
        group = trial.optimizer.param_groups[0]
        shown = {name: group[name] for name in ("lr", "momentum", "weight_decay", "betas") if name in group}
        found: dict[str, Any] = {
            "model": type(trial.model).__name__,
            "parameters": sum(p.numel() for p in trial.model.parameters()),
            "optimizer": f"{type(trial.optimizer).__name__} ({', '.join(f'{k} {v}' for k, v in shown.items())})",
            "scheduler": "none" if trial.scheduler is None else type(trial.scheduler).__name__,
            "updates an epoch": "not told" if trial.epoch_length is None else trial.epoch_length,
            self.step_unit + "s": trial.iterations or trial.epochs,
            "SHA-256 of the file": file.sha256,
        }
        own = {**dict.fromkeys(file.parameters, "its default"), **file.defaults, **file.values}
        return {name: (value, file.label) for name, value in {**found, **own}.items()}


def plan(
    task_file: TaskFile,
    *,
    arms: Sequence[str] = (),
    seeds: int = 5,
    tuned: Mapping[str, Mapping[str, Value]] | None = None,
    notes: Sequence[str] = (),
    device: str = "cpu",
    tried: TriedTask | None = None,
) -> Plan:
    """Lay out a comparison on a task.

    Args:
        task_file: the task.
        arms: names, as ``methods.make_arms`` takes them.
        seeds: number of seeds.
        tuned: name of each arm -> values that were chosen for it; None where nothing was tuned.
        notes: what the page says in addition.
        device: where networks are trained.
        tried: what a try of the task has found already.

    Returns:
        The plan. A control whose values are not its method's repeats factors of an arm that is there for that alone:
        the method at the control's values.

    Raises:
        UsageError: an unknown arm, a number of seeds out of its range, or a task that cannot be used.
    """
    given = check_seeds(seeds)
    chosen = list(_at_own_values(make_arms(arms), tuned or {}))
    check_names("arm", [arm.name for arm in chosen])
    layout = Layout(task_file, tried or task_file.tried(device))
    runs = tuple(layout.run("task", arm, seed, arm.constants, "metric") for arm in chosen for seed in given)
    layout.check(runs)
    methods = [METHODS[arm.name] for arm in chosen if arm.name in METHODS]
    if tuned is None:
        untuned = "Nothing was tuned: every arm has the task's own values, whatever method they were chosen for."
        notes = [untuned, *(method.note for method in methods if method.note), *notes]
    return Plan(
        name=layout.name + ("" if tuned is None else "-tuned"),
        title=f"{layout.task_file.label}: {', '.join(method.words for method in methods)}",
        source=layout.task_file.label,
        layout="curves",
        quantity=layout.quantity,
        columns=(),
        step_unit=layout.step_unit,
        subjects=(Subject(name="task", words=layout.task_file.label),),
        arms=tuple(chosen),
        seeds=given,
        runs=runs,
        constants=layout.constants(),
        notes=tuple(notes),
    )


def _at_own_values(arms: Sequence[Arm], tuned: Mapping[str, Mapping[str, Value]]) -> Iterator[Arm]:
    """Give each arm its chosen values, and a control at other values than its method's a method's arm of its own."""
    methods: dict[tuple[str, str], str] = {}
    for arm in arms:
        values = dict(tuned.get(arm.name, {}))
        if arm.of is not None and values != dict(tuned.get(arm.of, {})):
            key = (arm.of, setting_words(values))
            if key not in methods:
                method = next(one for one in arms if one.name == arm.of)
                words = f"{method.words} at {key[1]}, {FACTORS_ALONE}"
                methods[key] = f"{arm.of} {key[1]}"
                yield replace(method, name=methods[key], words=words, constants=values, against=())
            arm = replace(arm, of=methods[key])
        yield replace(arm, constants=values)


def setting_words(values: Mapping[str, Value]) -> str:
    """Write values of parameters: "lr=0.01, weight_decay=0"."""
    return ", ".join(f"{name}={value_words(value)}" for name, value in values.items())


def value_words(value: Value) -> str:
    """Write a value, a number in its shortest form."""
    return f"{value:g}" if isinstance(value, float) else str(value)
