"""Packages that only one sink needs."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, sink: str, package: str) -> Any:
    """Import a module that is not installed with the core.

    Args:
        module: Its name.
        sink: Who asks.
        package: What to install.

    Raises:
        ImportError: It is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sinks.{sink} needs {package}, which is not installed: run  pip install {package}"
        ) from error
