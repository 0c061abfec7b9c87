"""A folder that one process works in: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from layerwise.lab.errors import UsageError

_held: set[IO[str]] = set()
"""Lock files that this process holds. A forked child, such as a loader's worker, closes them, since it would keep the
locks after this process has ended."""


def _close_held() -> None:
    for stream in _held:
        stream.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


class BusyError(RuntimeError):
    """Another process works on the run."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that use this function.

    Args:
        folder: an existing folder; its file ``lock`` stays there afterwards.

    Raises:
        BusyError: another process holds the lock.
        OSError: ``lock`` is a link, or cannot be written.
        UsageError: files cannot be locked there.
    """
    with open(folder / "lock", "a", opener=_no_link) as stream:
        if not locked(stream, folder / "lock"):
            raise BusyError(f"{folder}: another process works on this run")
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)


def _no_link(path: str, flags: int) -> int:
    """Open a file, but no link, which could create a file elsewhere; opening a pipe does not block."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def locked(stream: Any, path: Path) -> bool:
    """Take the lock of an open file.

    Args:
        stream: the file.
        path: its path, for the message.

    Returns:
        False where another process has it.

    Raises:
        UsageError: its file system cannot lock files.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{path}: files cannot be locked there ({error.strerror or error}), and without locks two processes could "
            "do the same run; give a folder on another file system with --out"
        ) from error
    return True
