"""Recipes whose arms choose their rate before they are compared: each on every subject, by validation data alone.

``[tuned]`` has ``grid = "1e-3:1e1:9"``, the rates that every arm tries; ``[tuned.grids]``, arm -> another grid of
as many, for an arm whose rates are of another size, and for its controls; ``random``, to draw so many rates from the
grids' ranges instead; ``seeds`` of the tuning; and ``extensions``, the steps beyond a grid that an arm may take. A
scale may change each of these in its own ``tuned``, and with ``count`` the number of values of every grid. The constant
``validation_count`` says how many training images are kept for validation; no run trains on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments.plan import TRIALS, Arm, Plan, Quantity, Subject
from layerwise.lab.experiments.recipe import Recipe
from layerwise.lab.experiments.runner import Display, Outcome, Settings, load_finished
from layerwise.lab.experiments.tuning import (
    EXTENSIONS,
    SEEDS,
    Setting,
    Space,
    Tuner,
    at_own_settings,
    carry_out_tuned,
    range_of,
    space_of,
    tune,
    with_ratios,
)
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training.trial import MEASURES

RATE = "rate"
KEYS = {"grid", "grids", "count", "random", "seeds", "extensions"}


class TunedRecipe:
    """A recipe at a scale on the bench of a tuning."""

    def __init__(
        self,
        recipe: Recipe,
        scale: str,
        *,
        seeds: int | None = None,
        vary: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.recipe, self.scale = recipe, scale
        self.untuned = recipe.plan(scale, seeds=seeds, vary=vary)
        self.subjects, self._arms = self.untuned.subjects, self.untuned.arms
        above, below = recipe.scale(scale).get("tuned", {}), recipe.content["tuned"]
        self.table = {**below, **above, "grids": {**below.get("grids", {}), **above.get("grids", {})}}
        unknown = sorted(set(self.table) - KEYS)
        if unknown:
            raise UsageError(f"tuned.{unknown[0]} of recipe {recipe.name}: use {', '.join(sorted(KEYS))}")
        if RATE in (vary or {}):
            raise UsageError(f"{RATE!r} is tuned by recipe {recipe.name} and cannot be varied: vary another constant")
        if any(run.configuration.constants.validation_count is None for run in self.untuned.runs):
            raise UsageError(f"recipe {recipe.name} is tuned and needs the constant validation_count")

    @property
    def seeds(self) -> int:
        """Seeds of the tuning."""
        return self.table.get("seeds", SEEDS)

    @property
    def extensions(self) -> int:
        """Steps beyond its grid that an arm may take."""
        return self.table.get("extensions", EXTENSIONS)

    def arms_of(self, subject: str) -> Sequence[Arm]:
        """List the arms of a subject, as yet without the rates that they choose."""
        return self.untuned.arms_of(subject)

    def space(self, subject: str, arm: Arm) -> Space:
        """Give the rates that an arm tries; a control has those of its method unless it has its own."""
        grids, draws = self.table["grids"], self.table.get("random")
        given = grids.get(arm.name, grids.get(arm.of, self.table["grid"]))
        found = range_of(RATE, given)
        if found is not None and (draws is not None or "count" in self.table):
            count = "" if draws is not None else f":{self.table['count']}"
            given = f"{found.low!r}:{found.high!r}{count}"
        return with_ratios(space_of({RATE: given}, draws), arm, self._arms)

    def trials(self, pairs: Sequence[tuple[Subject, Subject, Arm]], arms: Sequence[Arm], seeds: Sequence[int]) -> Plan:
        """Plan runs that are measured on the validation data alone."""
        plan = self.untuned
        return replace(
            plan,
            name=f"{plan.name}-tuning",
            title=f"Tuning of: {plan.title}",
            layout="curves",
            quantity=validated(plan.quantity),
            columns=(),
            beside=(),
            paper=(),
            claims=(),
            subjects=tuple({called.name: called for _, called, _ in pairs}.values()),
            arms=tuple(arms),
            seeds=tuple(seeds),
            runs=self.recipe.runs(self.scale, pairs, seeds, measured="validation"),
            notes=(f"{TRIALS}: they choose rates, and nothing is concluded from them.",),
        )

    def comparison(self, tuner: Tuner) -> Plan:
        """Plan the comparison, each arm at the rate that it has chosen on the subject."""
        pairs: list[tuple[Subject, Subject, Arm]] = []
        for subject in self.subjects:
            arms = self.arms_of(subject.name)
            chosen: dict[str, Setting] = {arm.name: tuner.chosen(subject.name, arm.name) for arm in arms}
            pairs += [(subject, subject, arm) for arm in at_own_settings(arms, chosen)]
        rate = ("as tuned", "chosen by validation: the section on the tuning has that of each arm")
        warnings = [
            words for one in self.subjects for arm in self.arms_of(one.name) for words in tuner.warnings(one, arm)
        ]
        return replace(
            self.untuned,
            arms=self._shown(pairs),
            runs=self.recipe.runs(self.scale, pairs, self.untuned.seeds),
            constants={**self.untuned.constants, RATE: rate},
            notes=(tuner.words, *warnings, *self.untuned.notes),
        )

    def _shown(self, pairs: Sequence[tuple[Subject, Subject, Arm]]) -> tuple[Arm, ...]:
        """Give each arm once: as it is on its subjects, or where it differs between them as the recipe has it."""
        of: dict[str, dict[str, Arm]] = {}
        for subject, _, arm in pairs:
            of.setdefault(arm.name, {})[subject.name] = arm
        untuned = {arm.name: arm for arm in self._arms}
        shown = []
        for name, by_subject in of.items():
            first = next(iter(by_subject.values()))
            one = first if all(arm == first for arm in by_subject.values()) else untuned.get(name, first)
            having = tuple(by_subject) if len(by_subject) < len(self.subjects) else ()
            shown.append(replace(one, subjects=having))
        order = {name: place for place, name in enumerate(untuned)}  # what only gives its factors stands last
        return tuple(sorted(shown, key=lambda arm: order.get(arm.name, len(order))))


def validated(quantity: Quantity) -> Quantity:
    """Give the quantity that a trial is judged by: the same on the validation data."""
    names = dict(zip(MEASURES["test"], MEASURES["validation"], strict=True))
    if quantity.name not in names:
        raise UsageError(f"quantity={quantity.name!r} of a tuned recipe: use one of {', '.join(names)}")
    return replace(quantity, name=names[quantity.name], words=f"validation {quantity.words.removeprefix('test ')}")


def run(bench: TunedRecipe, settings: Settings, display: Display | None = None) -> Outcome:
    """Do the trials of a recipe, and then its comparison; interrupted or failed trials are its outcome."""
    places.ready(bench.untuned, settings.data_dir)
    tuner = tune(bench, settings, display, seeds=bench.seeds, extensions=bench.extensions)
    return carry_out_tuned(tuner, settings, display)


def counts(bench: TunedRecipe, runs: Runs) -> tuple[int, int]:
    """Give the number of runs of trials and comparison, and of those that are finished."""

    def found(plan: Plan, settings: Settings, display: Display | None) -> Outcome:
        return Outcome(plan, settings, load_finished(plan, runs))

    tuner = tune(bench, Settings(), seeds=bench.seeds, extensions=bench.extensions, carry=found)
    assert tuner.outcome is not None
    trials, done = len(tuner.outcome.plan.runs), len(tuner.outcome.results.records)
    plan = bench.comparison(tuner) if tuner.outcome.complete else bench.untuned
    if tuner.outcome.complete:
        done += len(load_finished(plan, runs).records)
    return trials + len(plan.runs), done
