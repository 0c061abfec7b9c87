"""The content of the task file that the user names."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.tasks.guests import Guest


def check(path: Path, source: bytes) -> None:
    """Refuse a file that is no Python.

    Args:
        path: that it was read from.
        source: its bytes.

    Raises:
        UsageError: it cannot be compiled; the line is named.
    """
    try:
        # dont_inherit: the statement "from __future__" above is none of the person's.
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UsageError(_unreadable(path, error)) from None


def parameters(function: Callable[..., Any], guest: Guest, name: str) -> tuple[dict[str, Any], bool]:
    """Give a function's parameters besides the seed.

    Args:
        function: of the person.
        guest: whose code it is.
        name: of the function.

    Returns:
        Name -> default, and whether it takes any other name.

    Raises:
        UsageError: it does not take the seed, or a parameter has no default.
    """
    with guest.at_work("its signature"):
        found = inspect.signature(function).parameters
    seed = found.get("seed")
    if seed is None or seed.kind not in (seed.POSITIONAL_OR_KEYWORD, seed.KEYWORD_ONLY):
        raise guest.refuse(f"does not take the seed: write def {name}(seed, lr=0.1)")
    own, taking_any = {}, False
    for word, parameter in found.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            taking_any = taking_any or parameter.kind is parameter.VAR_KEYWORD
        elif word != "seed":
            if parameter.default is parameter.empty or parameter.kind is parameter.POSITIONAL_ONLY:
                raise guest.refuse(f"parameter {word!r} has no default: write {word}=..., which --tune can change")
            own[word] = parameter.default
    return own, taking_any


def functions(path: Path, source: bytes) -> str:
    """List the functions of a file that is not executed, as words of a remedy."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        return _unreadable(path, error)
    names = [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    if not names:
        return "it has none; write def task(seed, lr=0.1), as docs/compare.md says"
    return f"use {' or '.join(f'{path.name}:{name}' for name in names)}"


def _unreadable(path: Path, error: Exception) -> str:
    """Say where a file is no Python."""
    line = getattr(error, "lineno", None)
    where = f", line {line}" if line else ""
    text = (getattr(error, "text", None) or "").strip()
    return f"{path.name}{where}: {getattr(error, 'msg', error)}" + (f": {text}" if text else "")
