"""What importing adds to the import of PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .timing import Row, heading, ratio, show


def measure(rounds: int) -> dict[str, Row]:
    """Import torch, and layerwise, each in new processes; print the row and return it."""

    def run(program: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", program], check=True)

    heading("a new process", "torch ms")
    whole = "import layerwise; layerwise.LayerwiseLR"  # importing the package alone imports nothing
    return {"import layerwise": show("import layerwise", ratio(run("import torch"), run(whole), min(rounds, 7)), 1.2)}
