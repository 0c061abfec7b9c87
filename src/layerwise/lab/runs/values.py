"""Values that the parameters of a user's task may have."""

from __future__ import annotations

import math
from typing import Any

Value = int | float | str | bool | None


def is_plain(value: Any) -> bool:
    """Tell whether JSON holds a value as it is."""
    return isinstance(value, (str, bool, int)) or value is None or (isinstance(value, float) and math.isfinite(value))


def kind_of(value: Any) -> str:
    """Name the kind of a value, by which a mistyped one is found; "" for None, which tells nothing."""
    kinds = {bool: "True or False", int: "a number", float: "a number", str: "a word"}
    return kinds.get(type(value), "")


def equal(one: Any, other: Any) -> bool:
    """Tell whether two values are the same: 1, 1.0 and True are three."""
    return type(one) is type(other) and one == other


def like(value: Any, default: Any) -> Any:
    """Give a value the type of the parameter's default, as far as that changes nothing."""
    words = {"true": True, "false": False}
    if isinstance(default, bool) and isinstance(value, str):
        return words.get(value.lower(), value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value
