"""What importing adds to the import of PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .timing import Row, heading, ratio, show


def measure(rounds: int) -> dict[str, Row]:
    """Import torch, and layerwise, each in new processes; print the row and return it."""

    def run(module: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    heading("a new process", "torch ms")
    return {"import layerwise": show("import layerwise", ratio(run("torch"), run("layerwise"), min(rounds, 7)), 1.2)}
