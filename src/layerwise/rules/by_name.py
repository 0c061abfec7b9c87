"""Rules from their names, as a configuration file or a command line holds them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .._arguments import has_type
from .base import Rule, check_rule
from .combine import chain
from .elementwise import ElementwiseRule


@cache
def every_rule() -> dict[str, Any]:
    """Return the public rules by class name, but for the classes that rules derive from."""
    from layerwise import rules

    kinds = {name: getattr(rules, name) for name in sorted(rules.__all__, key=str.casefold)}
    bases = (Rule, ElementwiseRule)
    return {n: k for n, k in kinds.items() if isinstance(k, type) and issubclass(k, Rule) and k not in bases}


def hyphenated(name: str) -> str:
    """Return the name of a class in small letters, as pages and arms of comparisons have it.

    Example:
        >>> [hyphenated(name) for name in ("LayerDecay", "InitialSNR", "LoRAPlus", "LDoG", "AGC")]
        ['layer-decay', 'initial-snr', 'lora-plus', 'l-dog', 'agc']
    """
    words = name.replace("LoRA", "Lora").replace("DoG", "Dog")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", words).lower()


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def make_rule(rule: Any, arguments: Mapping[str, Any] | None = None) -> Rule:
    """Return a rule from a rule, a name, a mapping with a name, or a list of these, which are chained.

    Capitals, `-` and `_` in a name make no difference: `"LayerDecay"`, `"layer_decay"`, `"layer-decay"`.

    Args:
        rule: Such as `"lars"` or `{"name": "lars", "trust_coefficient": 0.01}`.
        arguments: Further arguments of a rule that has a name.

    Raises:
        TypeError: `rule` is none of these, or there are arguments for a rule that is made already.
        ValueError: The name is unknown, or the rule does not take these arguments.

    Example:
        >>> make_rule({"name": "layer_decay", "decay": 0.75})
        LayerDecay(decay=0.75, style='beit', depth=None)
    """
    given = dict(arguments or {})
    if isinstance(rule, str):
        return _made(rule, given)
    if has_type(rule, Mapping):
        if not isinstance(rule.get("name"), str):
            raise TypeError(f"rule={rule!r} must hold the rule's name, such as {{'name': 'lars'}}")
        return _made(rule["name"], {**{key: value for key, value in rule.items() if key != "name"}, **given})
    if given:
        raise TypeError(f"{', '.join(given)}: arguments are for a rule given by its name; this one is made already")
    if has_type(rule, Sequence):
        return chain(*map(make_rule, rule))
    return check_rule(rule)


def _made(name: str, arguments: Mapping[str, Any]) -> Rule:
    known = {_key(one): kind for one, kind in every_rule().items()}
    if _key(name) not in known:
        near = [known[one].__name__ for one in difflib.get_close_matches(_key(name), known, n=1)]
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"rule {name!r} is unknown; there are {', '.join(every_rule())}{hint}")
    kind = known[_key(name)]
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}{inspect.signature(kind)}: {error}") from error
    return kind(**arguments)


def arguments_of(rule: Any) -> set[str]:
    """Return the names of the arguments of a rule that is given by its name; empty for any other."""
    name = rule.get("name") if has_type(rule, Mapping) else rule
    kind = {_key(one): kind for one, kind in every_rule().items()}.get(_key(name)) if isinstance(name, str) else None
    return set() if kind is None else set(inspect.signature(kind).parameters)


def show_rules() -> None:
    """Print each rule with its equation, the statistics it needs, where it acts, and its source."""
    print("\n".join(map(described_rule, every_rule())))  # noqa: T201 - what the caller asks for


def described_rule(name: str) -> str:
    """Return the lines that `show_rules` prints of a rule.

    Example:
        >>> print(described_rule("UpdateClip"))
        UpdateClip(limit=1.0)
            Steps whose root mean square is bounded, as Adafactor's.
            f_l = 1 / max(1, RMS(u_l) / limit)
            needs direction_rms; acts on update
            Shazeer, Stern: Adafactor, 2018, arXiv 1804.04235, section 6 (update clipping).
    """
    kind = every_rule()[name]
    text = inspect.getdoc(kind) or ""
    summary, equation = (" ".join(part.split()) for part in text.split("\n\n")[:2])
    needs: Sequence[str] = kind.needs if has_type(kind.needs, Sequence) else ()
    places = kind.places if kind.default_place is None else (kind.default_place,)
    arguments = ", ".join(
        one.name if one.default is one.empty else f"{one.name}={one.default!r}"
        for one in inspect.signature(kind).parameters.values()
    )
    source = " ".join(text.partition("Reference:")[2].split())
    lines = [summary, equation, f"needs {', '.join(needs) or 'nothing'}; acts on {' or '.join(places)}", source]
    return "\n    ".join([f"{name}({arguments})", *filter(None, lines)])
