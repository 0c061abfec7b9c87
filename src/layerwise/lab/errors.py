"""Errors that a user of the command line can act on, and Ctrl-C while modules are imported."""

from __future__ import annotations

import difflib
import os
import signal
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager

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

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ends, as shells report it."""


class UsageError(ValueError):
    """A value that the person can correct: its text is one line and names value, allowed range and remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Guess what a mistyped word was meant to be.

    Args:
        word: as it was given.
        known: the words that there are.

    Returns:
        " Did you mean ...?", or "" where none is near.

    Example:
        >>> nearest("lasr", ["lars", "larc", "plain"])
        ' Did you mean lars?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Explain a missing dependency of the lab.

    Args:
        error: what the import raised.

    Returns:
        One line that names the module and the remedy, or None if the module is not one of the lab's.
    """
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
