"""Where networks are trained: which devices there are, how many processes share them, and what memory a run takes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from layerwise.lab.errors import UsageError

LARGEST_LOADERS = 16
"""Processes that decode photographs for one that trains; each has some 0.3 GB."""


def check_device(name: str, *, here: bool = True) -> None:
    """Refuse a device that PyTorch does not know, or, where runs are trained ``here``, does not find."""
    if name == "cpu":
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is none of PyTorch's: use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu" or not here:
        return
    backend = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    if backend is None or not backend.is_available():
        raise UsageError(
            f"device={name!r}: PyTorch {torch.__version__} finds none on this machine: use cpu, or install the driver "
            "and the build of PyTorch that it needs"
        )
    count = getattr(backend, "device_count", lambda: 1)()
    if (device.index or 0) >= count:
        raise UsageError(f"device={name!r}: this machine has {count}, counted from 0: use {device.type}:{count - 1}")


def default_jobs(device: str, *, cores: int, threads: int, cards: int) -> int:
    """Give the number of processes side by side: one a GPU, and on the CPU as many as the cores take."""
    if device == "cuda":
        return max(1, cards)
    return max(1, cores // threads) if device == "cpu" else 1


def loader_count(*, cores: int, threads: int, processes: int) -> int:
    """Give the processes that decode photographs ahead, for each of the processes that train: the cores left over."""
    return min(LARGEST_LOADERS, max(0, cores // processes - threads))


def device_of_worker(device: str, number: int, cards: int) -> str:
    """Give the device of a worker: worker k, from 0, of ``--device cuda`` gets GPU k mod ``cards``."""
    return f"cuda:{number % cards}" if device == "cuda" and cards else device


def card_count() -> int:
    """Count the GPUs of this machine, without starting work on any."""
    import torch

    return torch.cuda.device_count()


def begin_memory(device: str = "cpu") -> None:
    """Begin to look for the largest memory of this process on a device anew, where the system allows it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.init()  # before it there is nothing to reset, which is an error
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str = "cpu") -> int:
    """Give the largest memory since ``begin_memory``, in bytes: on a GPU what PyTorch reserved, else of the process.

    Where a system does not let it begin anew, it is that since the process started, or 0.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def whole_memory(device: str = "cpu") -> int:
    """Give the memory of a device in bytes; 0 where the system does not say it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    with suppress(AttributeError, OSError, ValueError):  # no such question on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def memory_words(device: str, used: int, whole: int, *, jobs: int, cards: int) -> str:
    """Say how much memory a run takes, of how many bytes, where that decides ``--jobs``; else ""."""
    if not (used and whole):
        return ""
    places = max(1, cards) if device == "cuda" else 1
    fit = places * max(1, whole * 9 // 10 // used)
    words = f"A run takes {used / 1e9:.2g} of the {whole / 1e9:.2g} GB of {device}"
    if jobs > fit:
        return f"{words}: {jobs} side by side may not fit; use --jobs {fit}"
    return f"{words}: --jobs {fit} would fit" if device.startswith("cuda") else ""
