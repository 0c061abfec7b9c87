"""Plain files read up to a size; links, pipes, devices and folders are refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from layerwise.lab.errors import UsageError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def parts(path: str | os.PathLike[str], most: int, *, links: bool = False) -> Iterator[bytes]:
    """Read a file of unknown origin in parts; a small file comes in one.

    Args:
        path: the file.
        most: bytes that it may have.
        links: whether it may be a link, as users' own data may be.

    Raises:
        OSError: it is not there or cannot be read.
        UsageError: it is no plain file, or larger.
    """
    name = os.fspath(path)
    # Without O_NONBLOCK opening a pipe waits for a writer; O_BINARY exists on Windows.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(name, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and (kind := kind_of(name)):
            raise UsageError(f"{name}: is {kind}, not a plain file") from error
        raise
    try:
        about = os.fstat(file)
        if kind := _kind(about.st_mode):
            raise UsageError(f"{name}: is {kind}, not a file")
        length = 0
        # One byte more than the file's length, since it may have grown.
        while about.st_size <= most and (part := os.read(file, min(about.st_size + 1, 1 << 22))):
            length += len(part)
            if length > most:
                break
            yield part
        if max(length, about.st_size) > most:
            raise UsageError(f"{name}: has more than {most:,} bytes, more than such a file may have")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name) from error
    finally:
        os.close(file)


def read_bytes(path: str | os.PathLike[str], most: int, *, links: bool = False) -> bytes:
    """Read any file of a run, a report or a data set, whole; arguments and errors are those of `parts`."""
    return b"".join(parts(path, most, links=links))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of what is at a path; None for a plain file, and if there is nothing."""
    try:
        return _kind(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return None


def _kind(mode: int) -> str | None:
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")
