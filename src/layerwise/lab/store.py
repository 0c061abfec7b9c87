"""Files that are whole or not there at all, and what is told of the machine and the versions."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import runpy
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import layerwise

LEFTOVER_SECONDS = 3600.0
"""Age of a half-written file that nobody writes any more."""

SMALL, LARGE = 1 << 16, 1 << 22
"""Bytes that are read at first, and then, by one call of the system."""

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file of a run or a report; a larger one is not read, as it could only be meant to fill the memory."""

_sorted = json.JSONEncoder(sort_keys=True).encode


def versions() -> dict[str, str]:
    """Give the versions that a result depends on. A run of other versions is not taken for finished."""
    return {"layerwise": layerwise.__version__, "torch": torch_version()}


@cache
def torch_version() -> str:
    """Give PyTorch's version, read from its file: importing it takes as long as reading thousands of runs."""
    found = None if "torch" in sys.modules else find_spec("torch")
    if found is not None and found.origin is not None:
        with suppress(OSError, KeyError):
            return str(runpy.run_path(str(Path(found.origin).with_name("version.py")))["__version__"])
    import torch

    return str(torch.__version__)


def hardware() -> dict[str, object]:
    """Describe this machine in words for the report."""
    processor = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    # Asked last: for its answer Python starts another program on some systems.
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "system": platform.system(),
    }


def usable_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_whole(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Write a file so that no reader ever finds half of it: a temporary file beside it, then ``os.replace``.

    Args:
        path: the file; its folder is made if needed.
        data: the content.
        flush: wait until it is on the disk, so that it is there after a power failure too.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names the file, which is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with _made_anew(temporary) as stream:
                stream.write(data)
                stream.flush()
                if flush:
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
            if flush:
                _flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: a file's own flush says nothing of what it is called."""
    if os.name != "posix":  # only there can a folder be opened
        return
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # it may be written, but not listed
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot flush a folder
            raise
    finally:
        os.close(folder)


def _made_anew(path: Path) -> IO[bytes]:
    """Open a file that was not there; a link that lies there is not followed. Its folder is made if needed."""
    try:
        return path.open("xb")
    except FileExistsError:
        path.unlink()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush_folder(path.parent.parent)
    return path.open("xb")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write into a folder, long ago: another process may be at work now.

    Args:
        folder: need not exist.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def signed(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """Write JSON that names its own checksum.

    Args:
        content: what it says.
        indent: of its lines; None for one line.

    Returns:
        The file.

    Raises:
        ValueError: a number is not finite, or something is of a kind that JSON does not have.
    """
    content = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({**content, "sha256": _digest(content)}, indent=indent).encode()


def read_bytes(path: str | Path, most: float = math.inf) -> bytes:
    """Read a file, as ``Path.read_bytes`` does with twice the calls of the system: of thousands of files that matters.

    Args:
        path: the file.
        most: bytes to read of it, or a little more.

    Returns:
        Its content.

    Raises:
        OSError: it is not there or cannot be read.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows has that one
    try:
        parts, length = [os.read(file, SMALL)], 0
        while parts[-1] and length < most:
            length += len(parts[-1])
            parts.append(os.read(file, LARGE if length >= SMALL else SMALL))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(file)
    return b"".join(parts)


def read_signed(path: str | Path) -> dict[str, Any]:
    """Read what ``signed`` wrote.

    Args:
        path: the file.

    Returns:
        Its content, without the checksum.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is damaged, or another file.
    """
    text = read_bytes(path, LARGEST_JSON + 1)
    try:
        content = json.loads(text) if len(text) <= LARGEST_JSON else None
    except RecursionError:  # brackets in brackets
        content = None
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{path}: damaged: what it says does not have the checksum that it names")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """Give the checksum of what a JSON file says, whatever its spaces and order."""
    return hashlib.sha256(_sorted(content).encode()).hexdigest()


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
    import torch

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
