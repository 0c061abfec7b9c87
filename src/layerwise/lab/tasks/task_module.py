"""The file of a task as a module, and the errors that its code raises.

The file's bytes are copied once, under their SHA-256. Every process imports that copy, also the spawned worker of a
loader, as a module of this package; an environment variable names its place. ``__file__`` and tracebacks name the
original file, so that a task finds data beside it.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import json
import linecache
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.abc import SourceLoader
from importlib.util import decode_source, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes, write_whole

__path__: list[str] = []  # makes this module a package, whose modules `_Copy` finds

_PLACES = "LAYERWISE_TASK_"
"""Prefix of the environment variables that hold the places of a copy and of its original, for other processes."""

_START_METHOD = multiprocessing.get_start_method(allow_none=True)  # of processes, before any task has set another
_QUOTED = "Original Traceback (most recent call last):"
"""Line before the traceback of a loader's worker in the message of its error."""

_PICKLED = (
    "A spawned worker of a loader receives the data set and the functions by pickle: define them at the top level of "
    "{}, without lambdas, and open files in the worker; or give the loader multiprocessing_context='fork' or "
    "num_workers=0"
)


def _stem_of(source: bytes) -> str:
    return f"task_{hashlib.sha256(source).hexdigest()}"


class _Copy(SourceLoader):
    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.copy, self.original = json.loads(os.environ[_PLACES + stem])

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, stem = fullname.rpartition(".")
        if package != __name__ or _PLACES + stem not in os.environ:
            return None
        return spec_from_loader(fullname, cls(stem))

    def get_filename(self, fullname: str) -> str:
        return self.original

    def get_data(self, path: str | bytes) -> bytes:
        source = Path(self.copy).read_bytes()
        if _stem_of(source) != self.stem:
            raise ImportError(f"{self.copy} has changed: its SHA-256 does not match its name; remove it")
        # What reads the source again, as torch.jit.script does, finds this one, also if the original has changed.
        linecache.cache[self.original] = len(source), None, decode_source(source).splitlines(True), self.original
        return source


sys.meta_path.append(_Copy)


@cache
def _temporary() -> Path:
    """Create a folder for copies that no run needs; it is removed when this process ends."""
    path = tempfile.mkdtemp(prefix="layerwise-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@dataclass(frozen=True)
class TaskModule:
    """A file with a task's function, as it was when it was read."""

    path: Path
    function: str
    source: bytes = field(repr=False)

    @property
    def label(self) -> str:
        """What messages and pages call it, without the folder."""
        return f"{self.path.name}:{self.function}"

    @property
    def sha256(self) -> str:
        """Checksum of the file, by which a changed file is another task."""
        return hashlib.sha256(self.source).hexdigest()

    def refuse(self, problem: str) -> UsageError:
        """Make the error that names the task and what is wrong with it."""
        return UsageError(f"{self.label}: {problem}")

    def imported(self, folder: Path | None = None) -> ModuleType:
        """Execute the file, again if it was executed before, so that no run affects the next.

        Its copy is written into the folder unless it is there; None for a folder that ends with this process.
        """
        stem = _stem_of(self.source)
        copy = (_temporary() if folder is None else folder.resolve()) / f"{stem}.py"
        if not copy.is_file() or read_bytes(copy, len(self.source) + 1) != self.source:
            write_whole(copy, self.source)
        os.environ[_PLACES + stem] = json.dumps([str(copy), str(self.path)])
        default, *_ = multiprocessing.get_all_start_methods()
        # None lets the task choose without force.
        multiprocessing.set_start_method(None if default == _START_METHOD else _START_METHOD, force=True)
        name = f"{__name__}.{stem}"
        sys.modules.pop(name, None)
        with self.running("the file"):
            return importlib.import_module(name)

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Turn what the task's code raises into an error whose lines are those of its file."""
        try:
            yield
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise self.refuse(f"{what} raised {self._described(error)}") from error

    def _described(self, error: BaseException) -> str:
        words, path = str(error).strip(), str(self.path)
        first = f"{type(error).__name__}: {words}".partition("\n")[0].removesuffix(": ")
        if _QUOTED in words:
            first = words.splitlines()[-1]
        first = first.replace(f"{__name__}.{_stem_of(self.source)}", self.path.name)
        # Those of the traceback, of a syntax error, and of the traceback that a loader's worker has sent.
        text = "".join(traceback.format_exception(error))
        places = re.findall(rf'^ *File "{re.escape(path)}", line (\d+)(?:, in (.*))?', text, re.MULTILINE)
        lines = [f"{first} (line {places[-1][0]})" if places else first]
        for number, name in places:
            line = self.source.splitlines()[int(number) - 1].decode(errors="replace").strip()
            lines.append(f'  File "{path}", line {number}, in {name or "<module>"}\n    {line}')
        if isinstance(error, ModuleNotFoundError):
            lines.append(f"Only {self.path.name} is read: install {error.name}, or put its code into {self.path.name}")
        if any(word in words.lower() for word in ("pickle", "can't get local object")):
            lines.append(_PICKLED.format(self.path.name))
        return "\n".join(lines)
