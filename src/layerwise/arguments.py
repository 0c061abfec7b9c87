"""Checks of arguments, and what `"auto"` stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """Tell whether an argument has the type that its annotation promises, which not everybody's tools hold them to."""
    return isinstance(value, kind)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of the allowed words.

    Raises:
        TypeError: It is no string.
        ValueError: It is another word.
    """
    words = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {words}")


def chosen(argument: Any, preferred: Any, otherwise: Any) -> Any:
    """Return the argument, or for `"auto"` what the rule prefers, or else the common choice."""
    if not (isinstance(argument, str) and argument == "auto"):
        return argument
    return otherwise if preferred is None else preferred
