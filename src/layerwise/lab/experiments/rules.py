"""Rules from names and numbers, as recipes and configurations hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import isabstract, isclass, signature
from pathlib import Path
from typing import Any

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.rules.selection import LayerChoice

PHASES = {
    "params_1": rules.PARAMS_1,
    "params_2": rules.PARAMS_2,
    "params_1_to_the_end": (*rules.PARAMS_1[:2], rules.Phase(150, amplify=True)),
    "params_2_to_the_end": (*rules.PARAMS_2[:2], rules.Phase(150, amplify=True)),
}
"""Phases of Basodi et al. 2023, section 4, by name, and the same without the plain epochs at the end."""


@cache
def public(base: type) -> Mapping[str, Any]:
    """Give the public classes of ``layerwise.rules`` that derive from a class and can be made."""
    found = {name: getattr(rules, name) for name in sorted(rules.__all__, key=str.casefold)}
    return {name: one for name, one in found.items() if isclass(one) and issubclass(one, base) and not isabstract(one)}


def phases(name_or_rows: str | Sequence[Sequence[Any]], epochs: int | None) -> list[list[Any]]:
    """Give the phases of an amplification as rows of last epoch, whether it amplifies, and factor.

    Named phases (keys of ``PHASES``) are compressed to the run: an end e of 150 becomes e * epochs / 150, rounded.
    """
    if not isinstance(name_or_rows, str):
        return [list(row) for row in name_or_rows]
    if name_or_rows not in PHASES:
        raise UsageError(f"phases={name_or_rows!r}: use one of {', '.join(PHASES)}, or rows [until, amplify, factor]")
    if epochs is None:
        raise UsageError(f"phases={name_or_rows!r} count epochs: give the run epochs, not iterations")
    whole = PHASES[name_or_rows]
    ends = [round(phase.until * epochs / whole[-1].until) for phase in whole]
    if len(set(ends)) < len(ends) or ends[0] < 1:
        raise UsageError(f"epochs={epochs!r} are too few for the phases {name_or_rows!r}: use at least 15")
    return [[end, phase.amplify, phase.factor] for end, phase in zip(ends, whole, strict=True)]


def arguments_of(rule: Mapping[str, Any] | None) -> set[str]:
    """Name the arguments of a rule that a sweep can vary: its own, those of its choice of layers, and the factor."""
    if rule is None:
        return set()
    found = set(signature(public(rules.Rule)[rule["name"]]).parameters)
    if rule["name"] == "GradientAmplification":
        choice = rule["selection"].get("of", rule["selection"])
        found |= {"factor", *signature(public(LayerChoice)[choice["name"]]).parameters}
    return found - {"selection", "phases", "seed", "measured", "factors_by_pattern"}


def with_arguments(rule: Mapping[str, Any] | None, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Give a rule, its phases as rows, those of the values that it takes; a command line joins ``kinds`` by "+"."""
    if rule is None or not values:
        return rule
    known = arguments_of(rule)
    given = {name: _plain(name, value) for name, value in values.items() if name in known}
    if not given:
        return rule
    changed = {**rule, **given}
    if rule["name"] == "GradientAmplification":
        factor = given.pop("factor", None)
        rows = [[until, on, factor if on and factor is not None else old] for until, on, old in rule["phases"]]
        choice = rule["selection"]
        choice = {**choice, "of": {**choice["of"], **given}} if "of" in choice else {**choice, **given}
        changed = {**rule, "phases": rows, "selection": choice}
    make_rule(changed, 0)
    return changed


def _plain(name: str, value: Any) -> Any:
    if name == "kinds":
        return str(value).split("+")
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def make_rule(specification: Mapping[str, Any] | None, seed: int, replay: Path | None = None) -> Any:
    """Make a rule of ``{"name": ..., **arguments}``; that of an amplification has ``selection``, alike, and ``phases``.

    ``layers_by`` beside the arguments is what the adapter takes as ``layers``, as ``["*"]``: one layer of all.

    Random choices take the seed of the run unless they name one. ``replay`` is the file of recorded factors.
    """
    if specification is None:
        return None
    arguments = dict(specification)
    name = arguments.pop("name", None)
    arguments.pop("layers_by", None)  # an argument of the adapter
    known = dict(public(rules.Rule))
    if replay is None:
        del known["Replay"]  # it needs a file
    if name not in known:
        raise UsageError(f"rule name {name!r}: use one of {', '.join(known)}")
    try:
        if name == "Replay":
            arguments = {"file": replay}
        elif name == "Constant":
            arguments = {"factors_by_pattern": arguments["factors"]}
        elif name == "GradientAmplification":
            arguments["selection"] = _selection(arguments["selection"], seed)
            arguments["phases"] = [rules.Phase(*row) for row in arguments["phases"]]
        return known[name](**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"rule {name}: {error}") from error


def _selection(specification: Mapping[str, Any], seed: int) -> Any:
    arguments = dict(specification)
    name = arguments.pop("name", None)
    known = public(LayerChoice)
    if name not in known:
        raise UsageError(f"selection name {name!r}: use one of {', '.join(known)}")
    if "seed" in signature(known[name]).parameters:
        arguments.setdefault("seed", seed)
    if name == "ShuffledLayers":
        arguments["measured"] = _selection(arguments.pop("of"), seed)
    return known[name](**arguments)
