"""Recipes: data files, one a table or figure of the papers, every constant with its source.

A recipe is TOML: ``[constants]`` (each ``{ value = ..., source = "..." }``), ``[[subjects]]``, ``[[arms]]``,
``[[grids]]`` (an arm for each value of a list), ``[[paper]]`` (the paper's numbers) and ``[scales.smoke]``,
``[scales.reduced]``, ``[scales.full]``, which say how long and on what the runs are; or ``[picture]``, the phases that
a picture without runs shows. ``beside`` names quantities that are shown below the recipe's own.
``[tuned]`` lets every arm choose its rate on validation data first; ``tuned_recipe.py`` says how. ``extends`` names a
recipe whose tables it takes over and changes; its ``own_notes`` stand before the ``notes`` taken over. Where subjects
have a ``kind``, the values of a grid and the ``phases`` of a rule may be tables: kind -> what its subjects have.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from layerwise.lab import data
from layerwise.lab.data import library
from layerwise.lab.errors import UsageError, nearest
from layerwise.lab.experiments.plan import (
    LAYOUTS,
    Arm,
    PaperValue,
    Plan,
    PlannedRun,
    Subject,
    Table,
    check_names,
    check_seeds,
    quantity_of,
    sourced,
)
from layerwise.lab.experiments.rules import arguments_of, phases, with_arguments
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.training.trial import check

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

FOLDER = Path(__file__).parents[1] / "recipes"
SCALES = ("smoke", "reduced", "full")
CONSTANTS = {field.name for field in fields(Constants)}


class Need(NamedTuple):
    """What the runs of a scale need, in words; ``memory`` is that of one process."""

    data: str
    time: str
    memory: str


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read, laid over what it extends."""

    name: str
    content: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Title as the file has it, for every scale; the plan of a smoke test has words before it that say so."""
        return self.content["title"]

    @property
    def default_scale(self) -> str:
        """The scale that is run where none is named."""
        return "reduced" if "reduced" in self.content["scales"] else next(iter(self.content["scales"]), "")

    def need(self, scale: str) -> Need:
        """Say what a scale needs."""
        return Need(**self.content["scales"][scale]["needs"])

    def datasets(self, scale: str) -> set[str]:
        """Name the data sets that the runs of a scale read."""
        return {run.configuration.trial["data"] for run in self.plan(scale, seeds=1).runs}

    def scale(self, scale: str) -> Table:
        """Give what the recipe says of a scale, or refuse one that it does not have."""
        if not self.content["scales"]:
            raise UsageError(f"recipe {self.name} is a picture without runs: layerwise run {self.name} draws it")
        if scale not in self.content["scales"]:
            raise UsageError(f"scale={scale!r}: recipe {self.name} has {', '.join(self.content['scales'])}")
        return self.content["scales"][scale]

    def laid_out(self, scale: str, vary: Mapping[str, Sequence[Any]] | None = None) -> tuple[list[Subject], list[Arm]]:
        """Give the subjects and the arms of a scale."""
        content, chosen = self.content, self.scale(scale)
        subjects = _subjects(content, chosen, vary or {})
        arms = _arms(content, chosen, subjects)
        check_names("subject", [subject.name for subject in subjects])
        check_names("arm", [arm.name for arm in arms])
        return subjects, arms

    def runs(
        self, scale: str, pairs: Iterable[tuple[Subject, Subject, Arm]], seeds: Sequence[int], **constants: Any
    ) -> tuple[PlannedRun, ...]:
        """Give the runs of subjects with arms: a subject, what it is called in the plan, an arm; ``constants`` win."""
        own = {name: entry["value"] for name, entry in self.content["constants"].items()}
        base = own | self.scale(scale).get("constants", {}) | constants
        return tuple(
            PlannedRun(subject=called.name, arm=arm, seed=seed, configuration=replace(configuration, seed=seed))
            for subject, called, arm in pairs
            for configuration in [_configuration(base, subject, arm)]
            for seed in seeds
        )

    def plan(self, scale: str, *, seeds: int | None = None, vary: Mapping[str, Sequence[Any]] | None = None) -> Plan:
        """Lay out the runs.

        Every combination of the values in ``vary``, of constants or arguments of rules, becomes a subject of its own.
        Arms whose rule does not take the argument have the same runs in each.
        """
        content, chosen = self.content, self.scale(scale)
        subjects, arms = self.laid_out(scale, vary)
        given = check_seeds(seeds if seeds is not None else chosen["seeds"])
        pairs = [
            (each, each, arm) for each in subjects for arm in arms if not arm.subjects or each.name in arm.subjects
        ]
        runs = self.runs(scale, pairs, given)
        layout = content["layout"]
        if layout not in LAYOUTS:
            raise UsageError(f"layout={layout!r} of recipe {self.name}: use one of {', '.join(LAYOUTS)}")
        paper = _paper(content, chosen, subjects, arms, not chosen.get("paper", scale != "smoke"))
        notes = [*chosen.get("notes", ()), *_stand_ins(content, subjects, paper)]
        notes += [*content.get("own_notes", ()), *content.get("notes", ())]
        if any(run.configuration.trial["data"] == data.LIBRARY for run in runs):
            with suppress(UsageError):
                notes.append(library.load().title)
        return Plan(
            name=f"{self.name}-{scale}{_suffix(vary or {})}",
            title=f"Smoke test of: {content['title']}" if scale == "smoke" else content["title"],
            source=content["source"],
            layout=layout,
            quantity=quantity_of(content["quantity"]),
            columns=tuple(chosen.get("columns", content.get("columns", ()))),
            step_unit="iteration" if runs[0].configuration.constants.epochs is None else "epoch",
            subjects=tuple(subjects),
            arms=tuple(arms),
            seeds=given,
            runs=runs,
            paper=paper,
            beside=tuple(chosen.get("beside", content.get("beside", ()))),
            claims=tuple(content.get("claims", ())),
            constants=sourced(content, chosen, subjects, arms),
            notes=tuple(notes),
            scale=scale,
            data_title=chosen["needs"]["data"],
        )


def _suffix(vary: Mapping[str, Sequence[Any]]) -> str:
    """Tell the folder of a sweep from that of another one, in signs that any file system takes."""
    if not vary:
        return ""
    words = "-".join(f"{name}={','.join(map(str, values))}" for name, values in vary.items())
    return "-sweep-" + re.sub(r"[^A-Za-z0-9_.,=+-]", "_", words)[:80]


def _paper(
    content: Table, chosen: Table, subjects: Sequence[Subject], arms: Sequence[Arm], full_scale: bool
) -> tuple[PaperValue, ...]:
    """Give the paper's numbers for what is run at a scale.

    A scale's columns, and its other quantities, stand for the paper's in their order.
    """
    compared = {name for arm in arms for name in (arm.name, arm.group)}
    steps, besides = (
        dict(zip(content.get(name, ()), chosen.get(name, ()), strict=False)) for name in ("columns", "beside")
    )
    return tuple(
        PaperValue(**{**row, "subject": subject.name, "full_scale": full_scale, "step": step, "quantity": quantity})
        for subject in subjects
        for row in content.get("paper", ())
        if row["subject"] == (subject.stands_for or subject.name) and row["arm"] in compared and not subject.varied
        for step in [steps.get(row.get("step"), row.get("step"))]
        for quantity in [besides.get(row.get("quantity"), row.get("quantity", ""))]
    )


def _stand_ins(content: Table, subjects: Sequence[Subject], paper: Sequence[PaperValue]) -> Iterator[str]:
    """Say of which of the paper's subjects the numbers beside a smaller one are."""
    words = {row["name"]: row["words"] for row in content["subjects"]}
    shown = {row.subject for row in paper}
    for subject in subjects:
        if subject.stands_for and subject.name in shown:
            yield f"The paper's numbers beside {subject.words} are those of {words[subject.stands_for]}."


def _configuration(base: Table, subject: Subject, arm: Arm) -> Configuration:
    """Put together what the runs of an arm are, but for their seeds."""
    varied = {name: value for name, value in subject.varied.items() if name in CONSTANTS}
    given = {**base, **subject.constants, **arm.constants, **varied}
    if given.get("data") == data.LIBRARY:  # another version of Python has another text, whose runs are other runs
        with suppress(UsageError):  # a Python without its library can list the recipe; a run says what it lacks
            given["data_digest"] = library.load().digest
    constants = Constants.of(given)
    check(constants)
    rule = arm.rule
    if rule is not None and "phases" in rule:
        rule = {**rule, "phases": phases(_of_kind(rule["phases"], subject.kind), constants.epochs)}
    rule = with_arguments(rule, subject.varied)
    return Configuration.make(constants, rule=rule, apply=arm.apply)


def _subjects(content: Table, chosen: Table, vary: Mapping[str, Sequence[Any]]) -> list[Subject]:
    """Give the subjects of a scale, times every combination of the varied constants."""
    wanted = chosen.get("subjects")
    rows = [row for row in content["subjects"] if wanted is None or row["name"] in wanted]
    changes = chosen.get("subject_constants", {})
    subjects = [
        Subject(**{**row, "constants": {**row.get("constants", {}), **changes.get(row["name"], {})}}) for row in rows
    ]
    rules_of = (*content.get("arms", ()), *content.get("grids", ()))
    arguments = {name for row in rules_of for name in arguments_of(row.get("rule"))}
    for name, values in vary.items():
        if name not in CONSTANTS and name not in arguments:
            rules = f", or of the arguments of its rules: {', '.join(sorted(arguments))}" if arguments else ""
            words = f"use one of {', '.join(sorted(CONSTANTS))}{rules}.{nearest(name, [*CONSTANTS, *arguments])}"
            raise UsageError(f"unknown constant {name!r}: {words}")
        given = {str(_argument(row["rule"], name)) for row in rules_of if name in arguments_of(row.get("rule"))}
        if len(given) > 1 or "{value}" in given:
            raise UsageError(f"{name!r} tells the arms of this recipe apart and cannot be varied")
        subjects = [
            replace(
                subject,
                name=f"{subject.name} {name}={value}",
                words=f"{subject.words}, {name} {value}",
                varied={**subject.varied, name: value},
                origin=subject.row,
            )
            for subject in subjects
            for value in values
        ]
    return subjects


def _argument(rule: Table, name: str) -> Any:
    """Give an argument of a rule, or of its choice of layers; None where it has the default."""
    choice = rule.get("selection", {})
    return choice.get("of", choice).get(name, rule.get(name))


def _arms(content: Table, chosen: Table, subjects: Sequence[Subject]) -> list[Arm]:
    """Give the arms of a scale: the listed ones, then one for each value of each grid; none that no subject has."""
    arms = [_arm(row, chosen, subjects) for row in content.get("arms", ())]
    for grid in content.get("grids", ()):
        given = chosen.get("values", {}).get(grid["group"], chosen.get("grid_values", grid["values"]))
        allowed = [subject for subject in subjects if "subjects" not in grid or subject.row in grid["subjects"]]
        values = {subject.row: _of_kind(given, subject.kind) for subject in allowed}
        judged = grid.get("judged")
        row = {name: entry for name, entry in grid.items() if name not in ("values", "judged")}
        for value in sorted({value for listed in values.values() for value in listed}):
            having = [name for name, listed in values.items() if value in listed]
            filled = _filled(row, value)
            if judged is not None and value not in judged:
                filled = {**filled, "against": []}
            arms.append(_arm({**filled, "value": float(value), "subjects": having}, chosen, subjects))
    wanted = chosen.get("arms")
    return [arm for arm in arms if arm is not None and (wanted is None or arm.name in wanted or arm.group in wanted)]


def _of_kind(entry: Any, kind: str) -> Any:
    """Give what a kind of subject has; what is no table is the same for all."""
    if not isinstance(entry, Mapping):
        return entry
    if kind not in entry:
        raise UsageError(f"kind={kind!r} of a subject: use one of {', '.join(entry)}")
    return entry[kind]


def _arm(row: Table, chosen: Table, subjects: Sequence[Subject]) -> Arm | None:
    """Make an arm of its row, None if no subject has it; a scale may change its constants and take subjects away."""
    name = row.get("name")
    row = {**row, "constants": {**row.get("constants", {}), **chosen.get("arm_constants", {}).get(name, {})}}
    wanted = chosen.get("arm_subjects", {}).get(name, row.get("subjects", ()))
    having = tuple(subject.name for subject in subjects if not wanted or subject.row in wanted)
    row |= {"subjects": having if len(having) < len(subjects) else (), "against": tuple(row.get("against", ()))}
    try:
        return Arm(**row) if having else None
    except TypeError as error:
        raise UsageError(f"arm {name!r}: {error}") from error


def _filled(entry: Any, value: Any) -> Any:
    """Put a grid's value in the place of ``{value}``: as a number where it stands alone, else as text."""
    if isinstance(entry, Mapping):
        return {name: _filled(inner, value) for name, inner in entry.items()}
    if isinstance(entry, list):
        return [_filled(inner, value) for inner in entry]
    if entry == "{value}":
        return value
    return entry.replace("{value}", f"{value:g}") if isinstance(entry, str) else entry


def names() -> list[str]:
    """Name the recipes, in order; those that only others extend begin with an underscore and are left out."""
    found = [path.stem for path in FOLDER.glob("*.toml") if not path.name.startswith("_")]
    return sorted(found, key=lambda name: [part.zfill(4) for part in re.split(r"(\d+)$", name)])


def load(name: str) -> Recipe:
    """Read a recipe and lay it over what it extends; a name that ``names`` does not have is refused."""
    if name not in names():
        raise UsageError(f"recipe {name!r} is not known: layerwise list names them.{nearest(name, names())}")
    return Recipe(name, _content(name))


def _content(name: str) -> dict[str, Any]:
    """Read a recipe's file and lay it over the one that it extends."""
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    if "extends" not in content:
        return content
    below = _content(cast(str, content.pop("extends")))
    merged = {**below, **content}
    for table in ("constants", "scales"):
        merged[table] = _laid_over(below.get(table, {}), content.get(table, {}))
    return merged


def _laid_over(below: Table, above: Table) -> dict[str, Any]:
    """Merge tables; where both have a table it is merged, but for a constant, which is replaced."""
    merged = dict(below)
    for name, entry in above.items():
        both = isinstance(entry, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _laid_over(merged[name], entry) if both and "value" not in entry else entry
    return merged
