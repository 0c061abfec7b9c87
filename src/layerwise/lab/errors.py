"""Errors that a user can act on, Ctrl-C during imports, and text that is safe to show."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress

LAB_MODULES = (
    "PIL",
    "filelock",
    "jinja2",
    "numpy",
    "platformdirs",
    "polars",
    "pooch",
    "rich",
    "scipy",
    "tyro",
    "vl_convert",
)
"""Top-level modules of the extra ``lab`` in pyproject.toml."""

INTERRUPTED = 130  # exit code of a program that Ctrl-C ends, as shells report it
NARROWEST, WIDEST = 20, 1000  # the least and the most columns that ``COLUMNS`` may set
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Terminal controls, direction marks, invisible characters, line ends and surrogates."""


class UsageError(ValueError):
    """A value that the person can correct: its text is one line and names value, allowed range and remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Guess what a mistyped word was meant to be."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Say in one line how to get a missing module of the extra ``lab``; None if it is none of ``LAB_MODULES``."""
    module = (error.name or "").partition(".")[0]
    if module not in LAB_MODULES:
        return None
    return f"the lab needs the module {module!r}, which is not installed: run  pip install -e '.[lab]'  in the clone"


@contextmanager
def leaving() -> Generator[None]:
    """Let Ctrl-C end the program silently while modules are imported.

    A `KeyboardInterrupt` would rise inside an import, which may show a traceback or take it for another error. If the
    signal is ignored, or has a handler of the program's own, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()  # only this thread can set handlers
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def shown(text: object, *, lines: bool = False) -> str:
    """Escape control characters, direction marks and invisible characters; ``lines`` keeps tabs and line ends."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if lines and found[0] in "\n\t" else found[0].encode("unicode_escape").decode()

    return _UNSEEN.sub(escaped, str(text))


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
