"""Memory that has been freed and that the process still holds."""

from __future__ import annotations

import ctypes
import sys

LARGE = 2**20
"""Bytes from which on a freed tensor is worth returning."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_freed_memory() -> None:
    """Return to the system what has been freed on the CPU, where the C library is glibc; else do nothing.

    A gap between tensors in use stays with the process, and takes no tensor of the same size, whose alignment needs
    some bytes more. Returned pages cost nothing until the gap is used again. It takes about a millisecond.
    """
    if _trim is not None:
        _trim(0)
