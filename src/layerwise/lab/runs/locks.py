"""A folder that one process works in: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import kind_of


class BusyError(RuntimeError):
    """Another process works on the run."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder by its file ``lock``, which stays; a forked child, as a loader's worker, does not hold the lock."""
    path = folder / "lock"
    if kind := kind_of(path):
        raise UsageError(f"{path}: is {kind}, where the lab writes a file; remove it")
    try:
        # The fallback is a file that a killed process would leave, which would keep its run from ever going on.
        held = FileLock(path, blocking=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise BusyError(f"{folder}: another process works on this run") from None
    except OSError as error:
        if error.filename is not None:  # it could not be opened
            raise
        raise UsageError(
            f"{folder}: files cannot be locked there ({error.strerror or error}), and without locks two processes "
            "could do the same run; give a folder on another file system with --out"
        ) from error
    with held:
        yield
