"""Files that are whole or not there at all, and what is told of the machine and the versions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.plain_files import kind_of, parts, read_bytes

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file of a run or a report; a larger one is not read, as it could only be meant to fill the memory."""

LARGEST_TABLE = 1 << 32
"""Bytes of a run's table."""

LARGEST_NUMBER, DEEPEST = 1e250, 32
"""Limits of a JSON file: the largest number, far beyond any rate or loss that is tried, and the deepest nesting."""

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


def write_whole(path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
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


def append(path: Path, length: int, data: Any) -> bool:
    """Append to a file, and wait until it is on the disk; what lies behind its first bytes is overwritten.

    A process that is killed meanwhile leaves the first bytes as they are.

    Args:
        path: the file.
        length: bytes that stay.
        data: the bytes that come after them.

    Returns:
        Whether there was a plain file of so many bytes; if not, nothing is written.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names the file.
    """
    if kind_of(path) is not None or not path.exists():
        return False
    try:
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "r+b") as stream:
            if os.fstat(stream.fileno()).st_size < length:
                return False
            stream.truncate(length)
            stream.seek(length)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    return True


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


def digest_of(path: str | Path, most: int = LARGEST_TABLE) -> str:
    """Give the SHA-256 of a file, which need not fit into memory; arguments and errors are those of ``read_bytes``."""
    digest = hashlib.sha256()
    for part in parts(path, most):
        digest.update(part)
    return digest.hexdigest()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; its numbers and texts are checked, so that later computations do not fail.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        OSError: it is not there or cannot be read.
        UsageError: it is no plain file, too large, no JSON in UTF-8, or holds a number that is not finite or beyond
            ``LARGEST_NUMBER``, half a letter, or more than ``DEEPEST`` brackets in one another.
    """
    content = read_bytes(path, LARGEST_JSON)
    try:
        text = content.decode()
        made = _decoded(text)
        if _ODD.search(text) or text.count("[") + text.count("{") > DEEPEST:
            _check_plain(made)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0] if isinstance(error, ValueError) else "too many brackets"
        raise UsageError(f"{path}: damaged: it is no JSON that layerwise writes ({reason})") from None
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_decoded = json.JSONDecoder(parse_constant=_refuse_constant).decode
_ODD = re.compile(r"\d{19}|[eE]\+?\d{3}|\\u[dD][89abAB]")
"""Text that may hold a number that is too large, or half a surrogate pair; few files match."""


def _check_plain(made: Any) -> None:
    """Refuse what ``read_json`` says."""
    left = [(made, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, (dict, list)):
            if depth == DEEPEST:
                raise ValueError("too many brackets")
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            left += [(each, depth + 1) for each in inside]
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER:
            raise ValueError(f"a number beyond {LARGEST_NUMBER:g}")


def read_signed(path: str | Path) -> dict[str, Any]:
    """Read what ``signed`` wrote.

    Args:
        path: the file.

    Returns:
        Its content, without the checksum.

    Raises:
        OSError: it is not there or cannot be read.
        UsageError: it is damaged, or another file, or what ``read_json`` refuses.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise UsageError(f"{path}: damaged: its content does not match its checksum")
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
