"""A folder that one process works in: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_held: set[IO[str]] = set()
"""Lock files that this process holds. A process forked from it, as a loader's workers are, closes them: it would hold
them on when this one is gone."""


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
    """Keep every other process that asks out of a folder.

    Args:
        folder: exists; its file ``lock`` stays when it is left.

    Raises:
        BusyError: another process is in it.
    """
    with open(folder / "lock", "a", opener=_no_link) as stream:
        if not _locked(stream):
            raise BusyError(f"{folder}: another process works on this run")
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)


def _no_link(path: str, flags: int) -> int:
    """Open a file, unless it is a link, by which somebody could have a file made elsewhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _locked(stream: Any) -> bool:
    """Take the lock of a file, or say that another process has it."""
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
    return True
