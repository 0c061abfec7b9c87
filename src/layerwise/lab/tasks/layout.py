"""The plan of a comparison on a user's task: what comparing, tuning and examining it have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging.handlers import BufferingHandler
from typing import Any, Literal

import layerwise
from layerwise import rules
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.methods import METHODS, make_arms, task_phases
from layerwise.lab.experiments.plan import (
    RATES,
    Arm,
    Plan,
    PlannedRun,
    Quantity,
    Subject,
    check_names,
    check_seeds,
)
from layerwise.lab.experiments.tuning import Setting, at_own_settings
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.tasks.task import Stream, TaskFile, TriedTask
from layerwise.rules.shapes import shape_of

Measure = Literal["metric", "validation"]
"""What a run calls; one that calls validation never sees the metric."""


class Layout:
    """Puts runs of one task together."""

    def __init__(self, task_file: TaskFile, tried: TriedTask) -> None:
        self.task_file = replace(task_file, length=tried.trial.epoch_length)
        self.tried = tried
        self._passes: dict[tuple[Any, ...], int | None] = {}

    def plan(
        self,
        measure: Measure,
        *,
        suffix: str,
        title: str,
        subjects: Sequence[Subject],
        arms: Sequence[Arm],
        seeds: Sequence[int],
        notes: Sequence[str],
        pairs: Sequence[tuple[Subject, Arm]] | None = None,
    ) -> Plan:
        """Plan a run of every arm with every seed on every subject, or of ``pairs``; attach the rule of each arm once.

        So what cannot be attached is reported before anything is trained. ``suffix`` ends the name of the experiment.
        """
        if pairs is None:
            pairs = [(subject, arm) for subject in subjects for arm in arms]
        check_names("setting", [subject.name for subject in subjects])
        check_names("arm", [arm.name for arm in arms])
        runs = tuple(self._run(subject, arm, seed, measure) for subject, arm in pairs for seed in seeds)
        remarks = self._check(runs)
        path, label = self.task_file.path, self.task_file.label
        stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in path.stem)
        name = self.tried.metric if measure == "metric" else measure
        return Plan(
            name=f"{stem}-{self.task_file.function}{suffix}",
            title=f"{label}: {title}",
            source=label,
            layout="curves",
            quantity=Quantity(
                name=name,
                words=name.replace("_", " "),
                unit="",
                difference_unit="",
                higher_is_better=self.tried.higher_is_better,
            ),
            columns=(),
            step_unit="epoch" if self.tried.trial.iterations is None else "iteration",
            subjects=tuple(subjects),
            arms=tuple(arms),
            seeds=tuple(seeds),
            runs=runs,
            constants=self._constants(),
            notes=(*notes, *remarks),
        )

    def _run(self, subject: Subject, arm: Arm, seed: int, measure: Measure) -> PlannedRun:
        chosen = self.task_file.with_values({**subject.constants, **arm.constants})
        configuration = Configuration(
            trial=chosen.configuration(layers_every=self.tried.layers_every, measure=measure),
            rule=self._rule(arm, chosen),
            apply=arm.apply,
            seed=seed,
        )
        return PlannedRun(subject=subject.name, arm=arm, seed=seed, configuration=configuration, task=chosen)

    def _rule(self, arm: Arm, chosen: TaskFile) -> dict[str, Any] | None:
        """Write an arm's rule out, the phases of an amplification for the epochs that a run of these values has."""
        if arm.rule is None or arm.rule["name"] != "GradientAmplification":
            return None if arm.rule is None else dict(arm.rule)
        key = tuple(sorted(chosen.values.items()))
        if key not in self._passes:
            with Stream(0):
                self._passes[key] = chosen.build(0).passes
        return {**arm.rule, "selection": dict(arm.rule["selection"]), "phases": task_phases(self._passes[key])}

    def _check(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Attach the rule of each arm once, and give what it remarks; refuse it where it cannot be attached."""
        remarks: list[str] = []
        shapes: dict[str, list[tuple[int, int]]] = {}  # of the layers that each arm gives factors
        trial, logger, warned = self.tried.trial, logging.getLogger("layerwise"), BufferingHandler(100)
        warned.setLevel(logging.WARNING)
        level = logger.level
        logger.setLevel(logging.WARNING)  # the task's file may have raised it, or that of the root
        logger.addHandler(warned)
        try:
            for arm, planned in {run.arm.name: run for run in runs}.items():
                rule: Any = rule_making.make_rule(planned.configuration.rule, 0)
                places: dict[str, Any] = {}
                if planned.arm.control in RATES:
                    rule, places = rules.Constant({"*": 1.0}), {"apply": "lr"}
                try:
                    if rule is not None:
                        adapter = layerwise.LayerwiseLR(trial.optimizer, rule, trial.model, **places)
                        adapter.detach()
                        shapes[arm] = [shape_of(layer) for layer in adapter.layer_table() if layer.included]
                except (TypeError, ValueError) as error:
                    raise self.task_file.refuse(f"arm {arm!r} cannot be attached: {error}") from error
                words = [record.getMessage() for record in warned.buffer]
                warned.flush()
                if isinstance(rule, rules.GradientAmplification) and words:  # a choice that can choose nothing
                    raise self.task_file.refuse(
                        f"arm {arm!r} would be plain training: {words[0]}; it takes a model of "
                        "more layers; leave the arm out, or try amplification-random or amplification-all"
                    )
                remarks += [f"{arm}: {one}" for one in words]
                method = shapes.get(planned.arm.of or "", [])
                if planned.arm.control == "shuffled within shapes" and len(set(method)) == len(method):
                    raise self.task_file.refuse(
                        f"arm {arm!r} would repeat {planned.arm.of!r} itself: no two of its {len(method)} layers have "
                        "the same shape; leave the arm out, or take shuffled"
                    )
        finally:
            logger.removeHandler(warned)
            logger.setLevel(level)
        return remarks

    def _constants(self) -> dict[str, tuple[Any, str]]:
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
            "epochs" if trial.iterations is None else "iterations": trial.iterations or trial.epochs,
            "SHA-256 of the file": file.sha256,
        }
        own = {**dict.fromkeys(file.parameters, "its default"), **file.defaults, **file.values}
        return {name: (value, file.label) for name, value in {**found, **own}.items()}


def plan(
    task_file: TaskFile,
    *,
    arms: Sequence[str] = (),
    seeds: int = 5,
    tuned: Mapping[str, Setting] | None = None,
    notes: Sequence[str] = (),
    tried: TriedTask | None = None,
) -> Plan:
    """Lay out a comparison on a task, each arm at the values that were chosen for it, if any were tuned.

    A control whose values are not its method's repeats factors of an arm that is there for that alone: the method at
    the control's values.
    """
    given = check_seeds(seeds)
    chosen = list(at_own_settings(make_arms(arms), tuned or {}))
    methods = [METHODS[arm.name] for arm in chosen if arm.name in METHODS]
    if tuned is None:
        untuned = "Nothing was tuned: every arm has the task's own values, whatever method they were chosen for."
        notes = [untuned, *(method.note for method in methods if method.note), *notes]
    return Layout(task_file, tried or task_file.tried()).plan(
        "metric",
        suffix="" if tuned is None else "-tuned",
        title=", ".join(arm.words for arm in make_arms(arms) if arm.kind == "method" or arm.name in METHODS),
        subjects=[Subject(name="task", words=task_file.label)],
        arms=chosen,
        seeds=given,
        notes=notes,
    )
