"""Makes text safe for a terminal, a log or a page."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress

NARROWEST, WIDEST = 20, 1000
"""The least and the most columns that ``COLUMNS`` may set."""

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Terminal controls, direction marks, invisible characters, line ends and surrogates."""


def shown(text: object, *, lines: bool = False) -> str:
    r"""Escape control characters, direction marks and invisible characters.

    Args:
        text: any text, such as the name of a folder.
        lines: whether tabs and line ends are kept, as for a traceback.

    Example:
        >>> print(shown("a\x1b[31mb\nc"))
        a\x1b[31mb\nc
    """
    return _UNSEEN.sub(lambda found: found[0] if lines and found[0] in "\n\t" else _written(found[0]), str(text))


def _written(letter: str) -> str:
    number = ord(letter)
    names = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return names.get(letter) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def columns() -> int:
    """Give the line width: ``COLUMNS`` if set, else the terminal's width, else 80."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)


def open_streams() -> None:
    """Replace a closed standard output or standard error by the null device.

    Their file descriptors are taken too. Otherwise the next file that is opened would get them, and receive the output.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None:
            with suppress(AttributeError, ValueError, OSError):  # a terminal without "±" shows "?" instead of failing
                stream.reconfigure(errors="replace")
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
