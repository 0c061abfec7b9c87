"""Arms that differ by one threshold only belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise.lab.experiments.plan import Arm

SIDES = {"upper": "case 1", "both": "case 2"}
MEASURES = {"G": "G", "G_prime": "G′"}


def grouped(arms: Sequence[Arm]) -> list[Arm]:
    """Put arms that choose layers by the same measure at several thresholds into a group.

    Args:
        arms: of a plan.

    Returns:
        The arms in the same order; a group is named as in Basodi et al. 2023, with a number where that is not enough.
    """
    families: dict[str, list[Arm]] = {}
    for arm in arms:
        key = _family(arm)
        if key:
            families.setdefault(key, []).append(arm)
    groups: dict[str, str] = {}
    for key, members in families.items():
        if len(members) > 1:
            words = _words(members[0])
            name, count = words, 2
            while name in groups.values() or name in {arm.name for arm in arms}:
                name, count = f"{words} ({count})", count + 1
            groups[key] = name
    return [
        replace(arm, group=groups[key], value=float(_selection(arm)["threshold"]))
        if (key := _family(arm)) in groups
        else arm
        for arm in arms
    ]


def _selection(arm: Arm) -> Mapping[str, Any]:
    """Give how an arm chooses layers; empty for other rules."""
    found = (arm.rule or {}).get("selection")
    return found if isinstance(found, Mapping) else {}


def _family(arm: Arm) -> str:
    """Give what the arms of a group have in common, or ""."""
    selection = _selection(arm)
    if arm.control is not None or not isinstance(selection.get("threshold"), (int, float)):
        return ""
    rest = {name: value for name, value in selection.items() if name != "threshold"}
    return json.dumps([{**(arm.rule or {}), "selection": rest}, arm.apply, sorted(arm.subjects)], sort_keys=True)


def _words(arm: Arm) -> str:
    selection = _selection(arm)
    measure, sides = str(selection.get("measure", "G")), str(selection.get("sides", "upper"))
    return f"{MEASURES.get(measure, measure)} {SIDES.get(sides, sides)}"
