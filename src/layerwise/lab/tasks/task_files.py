"""Copies of task files, which every process imports as modules of this package.

A task's file is copied once, named by its SHA-256, into a folder that is in ``sys.path`` while the task's code runs.
``multiprocessing`` passes ``sys.path`` to every process that it starts, with any start method. So a loader's worker can
import what the file defines. ``__file__`` is the original file, so that a task finds data beside it.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from layerwise.lab.runs.store import read_bytes, write_whole

__path__: list[str] = []  # makes this module a package, whose modules _Finder finds

folders: list[str] = []
"""The folders of the copies that this process imports; the last one is searched first."""

PLACE = "LAYERWISE_FILE_"
"""Prefix of the environment variables that hold the original path of each copy, for other processes."""


class _Copy(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        if stem_of(source) != fullname.rpartition(".")[2]:
            raise ImportError(f"{self.path} has changed: its SHA-256 does not match its name; remove it")
        return self.source_to_code(source, self.path)  # no bytecode cache, which would not be checked


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, stem = fullname.rpartition(".")
        if package != __name__:
            return None
        copies = (os.path.join(folder, f"{stem}.py") for folder in (*reversed(folders), *sys.path))
        copy = next(filter(os.path.isfile, copies), None)
        if copy is None:
            return None
        original = os.environ.get(PLACE + stem, copy)
        return importlib.util.spec_from_file_location(fullname, original, loader=_Copy(fullname, copy))


sys.meta_path.append(_Finder())


@cache
def _temporary() -> Path:
    """Create a folder for copies that no run needs; it is removed when this process ends."""
    path = tempfile.mkdtemp(prefix="layerwise-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@cache
def _start_method() -> str | None:
    """Give the start method for tasks that do not set one; None for Python's default."""
    default, *_ = multiprocessing.get_all_start_methods()
    chosen = multiprocessing.get_start_method(allow_none=True)
    return None if chosen == default else chosen  # None lets the task choose without force


def stem_of(source: bytes) -> str:
    """Give the name of a file's copy, without its ending."""
    return f"task_{hashlib.sha256(source).hexdigest()}"


def keep(source: bytes, original: Path, folder: Path | None = None) -> str:
    """Write the copy of a file unless it exists, and make it importable in this process and its children.

    Args:
        source: the file's content.
        original: the file.
        folder: the folder of the copy; None for a temporary one.

    Returns:
        The name of its module.

    Raises:
        OSError: the copy cannot be written.
    """
    folder = _temporary() if folder is None else folder.resolve()
    stem = stem_of(source)
    copy = folder / f"{stem}.py"
    if not copy.is_file() or read_bytes(copy, len(source) + 1) != source:
        write_whole(copy, source)
    if str(folder) in folders:
        folders.remove(str(folder))
    folders.append(str(folder))
    os.environ[PLACE + stem] = str(original)
    return f"{__name__}.{stem}"


def import_anew(name: str) -> ModuleType:
    """Execute a copy again, so that no run affects the next, and reset the start method that the file may have set.

    Args:
        name: the name of its module.

    Returns:
        The module.
    """
    multiprocessing.set_start_method(_start_method(), force=True)
    sys.modules.pop(name, None)
    return importlib.import_module(name)
