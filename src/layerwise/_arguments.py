"""Checks of arguments, and copies of public objects."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """Return whether an argument has the type of its annotation, which type checkers take for granted."""
    return isinstance(value, kind)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of the allowed words."""
    words = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {words}")


def check_count(name: str, value: object, remedy: str = "") -> None:
    """Raise unless a value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a whole number of at least 1")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1{remedy}")


def chosen(argument: Any, preferred: Any, otherwise: Any) -> Any:
    """Return the argument, or for `"auto"` the rule's preference, or else the common choice."""
    if not (isinstance(argument, str) and argument == "auto"):
        return argument
    return otherwise if preferred is None else preferred


# --- Copies ----------------------------------------------------------------------------------------------------------


class StaysBehind:
    """An object whose copy or pickle is None, so that a module or trainer that holds one can be copied.

    The first copy of each object warns and names the remedy.
    """

    _copy_remedy: ClassVar[str] = "make a new one for the copy"
    _copy_warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # used by both `copy` and `pickle`
        """Return how to make a copy, which is None."""
        if not self._copy_warned:
            self._copy_warned = True
            level = 2
            while sys._getframe(level - 1).f_code.co_filename == copy.__file__:  # point at the line that copies
                level += 1
            warnings.warn(
                f"a {type(self).__name__} is not copied or pickled: the copy holds None in its place; "
                f"{self._copy_remedy}",
                stacklevel=level,
            )
        return type(None), ()
