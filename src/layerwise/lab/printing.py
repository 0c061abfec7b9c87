"""Names and words as a terminal, a log or a page may show them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress

NARROWEST, WIDEST = 20, 1000
"""Columns that ``COLUMNS`` may ask for; what is beyond is cut to them."""

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Controls of a terminal, marks that turn the direction of writing or cannot be seen, ends of lines, and surrogates."""


def shown(text: object, *, lines: bool = False) -> str:
    r"""Write out what would move the cursor, change colours, turn the direction of writing, or not be seen.

    Args:
        text: any words, as the name of a folder.
        lines: keep tabs and ends of lines, as of a traceback.

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
    """Give the width of lines: what ``COLUMNS`` says, else the terminal's, else 80 as in a pipe."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)


def open_streams() -> None:
    """Send what would go to a closed standard output or standard error nowhere, as the program was told by closing it.

    Their numbers are taken too: the next file that is opened would get them, and with it what is printed.
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
