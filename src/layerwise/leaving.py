"""Ctrl-C while modules are imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

INTERRUPTED = 130
"""What a shell says of a program that Ctrl-C ended."""


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)


@contextmanager
def leaving() -> Generator[None]:
    """Let Ctrl-C end the program without a word meanwhile.

    It would come up in whatever is being imported, which may show a traceback or take it for another error. Where
    somebody else looks after the signal, or it is ignored, nothing changes.
    """
    mine = threading.current_thread() is threading.main_thread()  # signals belong to that one
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
