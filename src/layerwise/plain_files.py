"""Reads files of unknown origin; pipes, devices and files that are too large are refused."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

BLOCK = 1 << 22
"""Bytes of a further call of the system; a file's own length is asked for at first."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


class NotPlainError(ValueError):
    """The path is no plain file, or the file is larger than allowed."""


def parts(path: str | os.PathLike[str], most: int, *, links: bool = False) -> Iterator[bytes]:
    """Read a plain file part by part.

    Args:
        path: The file.
        most: The most bytes that it may have.
        links: Whether `path` itself may be a link, as to data that several users share.

    Yields:
        Its content; what is small comes in one part.

    Raises:
        OSError: It is not there or cannot be read.
        NotPlainError: It is a link, a pipe, a device or a folder, or larger than `most`.
    """
    name = os.fspath(path)
    # Without O_NONBLOCK opening a pipe waits for a writer; O_BINARY exists on Windows.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        file = os.open(name, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        kind = kind_of(name) if error.errno in (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EISDIR) else None
        if kind is None:
            raise
        raise NotPlainError(f"{name}: is {kind}, not a plain file") from error
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise NotPlainError(f"{name}: is {KINDS.get(stat.S_IFMT(about.st_mode), 'something else')}, not a file")
        length = 0
        while about.st_size <= most and length <= most:
            asked = min(max(about.st_size - length, 0) + 1, BLOCK)
            part = os.read(file, asked)
            length += len(part)
            if part and length <= most:
                yield part
            if len(part) < asked and length <= most:
                return
        raise NotPlainError(f"{name}: has more than {most:,} bytes, more than such a file may have")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name) from error
    finally:
        os.close(file)


def read_plain(path: str | os.PathLike[str], most: int, *, links: bool = False) -> bytes:
    """Read a plain file whole; arguments and errors are those of `parts`."""
    return b"".join(parts(path, most, links=links))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Name the kind of what is at a path; None for a plain file, and if there is nothing."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")
