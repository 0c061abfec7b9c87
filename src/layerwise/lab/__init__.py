"""The lab: comparisons of per-layer methods with paired seeds, controls and intervals.

Importing this package is cheap; what a command needs beyond PyTorch comes with
``pip install -e '.[lab]'`` and is imported by the module that uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.lab.tasks.task import Task

__all__ = ["Task"]


def __getattr__(name: str) -> Any:
    """Import ``Task`` when it is first asked for."""
    if name == "Task":
        from layerwise.lab.tasks.task import Task

        return Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
