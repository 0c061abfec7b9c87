"""Files that are whole or not there at all, and what is told of the machine and the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import layerwise


def versions() -> dict[str, str]:
    """Give the versions that a result depends on. A run of other versions is not taken for finished."""
    return {"layerwise": layerwise.__version__, "torch": str(torch.__version__)}


def hardware() -> dict[str, object]:
    """Describe this machine in words for the report."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"processor": processor, "cores": usable_cores(), "system": platform.system()}


def usable_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever finds half of it: a temporary file beside it, then ``os.replace``.

    Args:
        path: the file; its folder is made if needed.
        data: the content.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names the file, which is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any, where: str = "state") -> Any:
    """Give a value as a checkpoint may hold it: tensors, numbers, words, and lists, tuples and dicts of them.

    What ``torch.load(weights_only=True)`` would refuse to read is found here, while the run can still say so. NumPy's
    numbers, which schedulers leave in the groups of optimizers, become Python's.

    Args:
        value: what is to be saved.
        where: its place, for the message.

    Returns:
        The value, in new containers.

    Raises:
        TypeError: something else is in it.
    """
    import numpy

    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {plain(key, where): plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)) and type(value) in (list, tuple, set, torch.Size):
        return type(value)(plain(entry, f"{where}[{place}]") for place, entry in enumerate(value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype)):
        return value
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which a checkpoint cannot hold safely: let state_dict() give "
        "tensors, numbers, words, and lists and dicts of them"
    )
