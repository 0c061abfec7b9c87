"""Records as lines of JSON."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

from .record import QUANTITIES, Record


class JSONL:
    """Appends one line of JSON a record: `{"step": …, "layers": […], "gradient_norm": […], …}`, one number a layer.

    A line is written with one system call and the file is closed again. So it may be read while training goes on, and a
    killed run loses nothing. A line that cannot be written whole is removed. An existing file is appended to, as a
    resumed run needs it. JSON has no NaN and no infinity: both become null.

    Args:
        path: The file; its folder is created if needed.

    Raises:
        OSError: The file cannot be opened.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "layers.jsonl"
        >>> JSONL(path)(Record(50, ("conv",), [0.5], [2.0], [0.01], [1.5], [0.15], [float("nan")]))
        >>> json.loads(path.read_text())["update_ratio"]
        [None]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the program may change its folder
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():  # end a line that another program left unfinished
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def __call__(self, record: Record) -> None:
        """Append a record."""
        content: dict[str, Any] = {"step": record.step, "layers": record.layers}
        for quantity in QUANTITIES:
            content[quantity] = [value if isfinite(value) else None for value in getattr(record, quantity)]
        line = (json.dumps(content) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(f"only a part of a line could be written to {self.path}; is the disk full?")
            except OSError:
                file.truncate(end)
                raise

    def __repr__(self) -> str:
        return f"JSONL({str(self.path)!r})"
