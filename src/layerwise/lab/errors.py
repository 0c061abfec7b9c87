"""Errors that a person at the command line can act on."""

from __future__ import annotations

LAB_MODULES = ("PIL", "jinja2", "mlxtend", "numpy", "platformdirs", "polars", "rich", "scipy", "tyro", "vl_convert")
"""Top-level modules of the extra ``lab`` in pyproject.toml."""


class UsageError(ValueError):
    """A value that the person can correct: its text is one line and names value, allowed range and remedy."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Explain a missing dependency of the lab.

    Args:
        error: what the import raised.

    Returns:
        One line that names the module and the remedy, or None if the module is not one of the lab's.
    """
    module = (error.name or "").partition(".")[0]
    if module not in LAB_MODULES:
        return None
    return f'the lab needs the module {module!r}, which is not installed: run  pip install "layerwise[lab]"'
