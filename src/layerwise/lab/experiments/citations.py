"""The constants of a plan with their values and where these come from, for the page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from layerwise.lab.experiments.arms import Arm
from layerwise.lab.experiments.plan import Subject
from layerwise.lab.runs.configuration import Constants

DEFAULTS = {field.name: field.default for field in fields(Constants)}


def sourced(
    content: Mapping[str, Any], chosen: Mapping[str, Any], subjects: Sequence[Subject], arms: Sequence[Arm]
) -> dict[str, tuple[Any, str]]:
    """Give each constant's values at a scale and where they come from.

    Args:
        content: of the recipe.
        chosen: its scale.
        subjects: of the plan.
        arms: of the plan.

    Returns:
        Name -> (value, source). A constant that runs have several values of has them all, and the source says which
        of them is whose: as swept, by subject, by arm; what it would be without stands after "else", with its source.
    """
    given, changed = content["constants"], chosen.get("constants", {})
    base = {name: entry["value"] for name, entry in given.items()} | changed
    of_subjects = [name for subject in subjects for name in (*subject.constants, *subject.varied)]
    of_arms = [name for arm in arms for name in arm.constants]
    # A sweep makes many subjects of one, which have its constants: they are named together.
    known = {row["name"]: row["words"] for row in content["subjects"]}
    found = {}
    each = [
        {**base, **subject.constants, **arm.constants, **subject.varied}
        for subject in subjects
        for arm in arms
        if not arm.subjects or subject.name in arm.subjects
    ]
    for name in dict.fromkeys((*base, *of_subjects, *of_arms)):
        values = distinct(constants.get(name, DEFAULTS.get(name)) for constants in each)
        value = values[0] if len(values) == 1 else ", ".join(map(written, values))
        found[name] = (value, _source(name, given, changed, subjects, arms, known))
    return found


def _source(
    name: str,
    given: Mapping[str, Any],
    changed: Mapping[str, Any],
    subjects: Sequence[Subject],
    arms: Sequence[Arm],
    known: Mapping[str, str],
) -> str:
    """Say where the values of a constant come from: what sets it last comes first."""
    cited = f"{written(given[name]['value'])}: {given[name]['source']}" if name in given else "not set"
    scale = f"this scale; else {cited}"
    rest = f"{written(changed[name])}: {scale}" if name in changed else cited
    if any(name in subject.varied for subject in subjects):
        return f"as swept; else {rest}"
    of_arms = [(arm.words, arm.constants[name]) for arm in arms if name in arm.constants]
    of_subjects = [
        (known.get(subject.origin or subject.name, subject.words), subject.constants[name])
        for subject in subjects
        if name in subject.constants
    ]
    parts = [
        f"differs by {kind}: {_whose(changes)}"
        for kind, changes in (("arm", of_arms), ("subject", of_subjects))
        if changes
    ]
    if parts:
        return "; ".join([*parts, f"else {rest}"])
    return scale if name in changed else given[name]["source"]


def _whose(changes: Iterable[tuple[str, Any]]) -> str:
    """List values and who has them."""
    owners: dict[str, list[str]] = {}
    for words, value in changes:
        owners.setdefault(written(value), []).append(f"“{words}”")
    return ", ".join(f"{value} for {' and '.join(dict.fromkeys(words))}" for value, words in owners.items())


def distinct(values: Iterable[Any]) -> list[Any]:
    """Give each value once, in order; lists count as equal where they are written alike."""
    return list({written(value): value for value in values}.values())


def written(value: Any) -> str:
    """Write a value: a name as it is, anything else as JSON has it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
