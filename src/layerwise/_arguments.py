"""Checks of arguments, reading of plain files, and copies of public objects."""

from __future__ import annotations

import copy
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """Return whether an argument has the type of its annotation, which type checkers take for granted."""
    return isinstance(value, kind)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of the allowed words."""
    words = ", ".join(map(repr, allowed))
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {words}")


def check_count(name: str, value: object, remedy: str = "") -> None:
    """Raise unless a value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a whole number of at least 1")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1{remedy}")


def chosen(argument: Any, preferred: Any, otherwise: Any) -> Any:
    """Return the argument, or for `"auto"` the rule's preference, or else the common choice."""
    if not (isinstance(argument, str) and argument == "auto"):
        return argument
    return otherwise if preferred is None else preferred


# --- Files -----------------------------------------------------------------------------------------------------------

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def parts(path: str | os.PathLike[str], most: int, *, links: bool = False) -> Iterator[bytes]:
    """Read a plain file of at most `most` bytes in parts; a small file comes in one.

    With `links` the path itself may be a link, as to data that several users share.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is a link, a pipe, a device or a folder, or larger than `most`.
    """
    name = os.fspath(path)
    # Without O_NONBLOCK opening a pipe waits for a writer; O_BINARY exists on Windows.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(name, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and (kind := kind_of(name)):
            raise ValueError(f"{name}: is {kind}, not a plain file") from error
        raise
    try:
        about = os.fstat(file)
        if kind := _kind(about.st_mode):
            raise ValueError(f"{name}: is {kind}, not a file")
        length = 0
        # One byte more than the file's length, since it may have grown.
        while about.st_size <= most and (part := os.read(file, min(about.st_size + 1, 1 << 22))):
            length += len(part)
            if length > most:
                break
            yield part
        if max(length, about.st_size) > most:
            raise ValueError(f"{name}: has more than {most:,} bytes, more than such a file may have")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name) from error
    finally:
        os.close(file)


def read_plain(path: str | os.PathLike[str], most: int, *, links: bool = False) -> bytes:
    """Read a plain file whole; arguments and errors are those of `parts`."""
    return b"".join(parts(path, most, links=links))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of what is at a path; None for a plain file, and if there is nothing."""
    try:
        return _kind(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return None


def _kind(mode: int) -> str | None:
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


# --- Copies ----------------------------------------------------------------------------------------------------------


class StaysBehind:
    """An object whose copy or pickle is None, so that a module or trainer that holds one can be copied.

    The first copy of each object warns and names the remedy.
    """

    _copy_remedy: ClassVar[str] = "make a new one for the copy"
    _copy_warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:  # used by both `copy` and `pickle`
        """Return how to make a copy, which is None."""
        if not self._copy_warned:
            self._copy_warned = True
            level = 2
            while sys._getframe(level - 1).f_code.co_filename == copy.__file__:  # point at the line that copies
                level += 1
            warnings.warn(
                f"a {type(self).__name__} is not copied or pickled: the copy holds None in its place; "
                f"{self._copy_remedy}",
                stacklevel=level,
            )
        return type(None), ()
