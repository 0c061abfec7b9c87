"""Checks of arguments and of files, and what copies of public objects hold."""

from __future__ import annotations

import copy
import errno
import inspect
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """Tell whether an argument has the type that its annotation promises, which not everybody's tools hold them to."""
    return isinstance(value, kind)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of the allowed words.

    Raises:
        TypeError: It is no string.
        ValueError: It is another word.
    """
    words = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {words}")


def chosen(argument: Any, preferred: Any, otherwise: Any) -> Any:
    """Return the argument, or for `"auto"` what the rule prefers, or else the common choice."""
    if not (isinstance(argument, str) and argument == "auto"):
        return argument
    return otherwise if preferred is None else preferred


# --- Files -----------------------------------------------------------------------------------------------------------

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


# --- Copies ----------------------------------------------------------------------------------------------------------


class StaysBehind:
    """An object whose copy or pickle is None, so that a module or trainer that holds one can be copied.

    The first copy of each object warns and names the remedy.
    """

    _copy_remedy: ClassVar[str] = "make a new one for the copy"
    _copy_warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # used by both `copy` and `pickle`
        """Return how the copy is made, which is None."""
        if not self._copy_warned:
            self._copy_warned = True
            here = inspect.currentframe()
            level, frame = 2, None if here is None else here.f_back
            while frame is not None and frame.f_code.co_filename == copy.__file__:  # point at the line that copies
                level, frame = level + 1, frame.f_back
            warnings.warn(
                f"a {type(self).__name__} is not copied or pickled: the copy holds None in its place; "
                f"{self._copy_remedy}",
                UserWarning,
                stacklevel=level,
            )
        return type(None), ()
