"""Files that are whole or not there at all, plain and of a limited size; the machine and the versions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import runpy
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import layerwise
from layerwise.lab.errors import UsageError

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file of a run or a report; a larger one is not read, as it could only be meant to fill the memory."""

LARGEST_TABLE = 1 << 32
"""Bytes of a run's table."""

LARGEST_NUMBER, DEEPEST = 1e250, 32
"""Limits of a JSON file: the largest number, far beyond any rate or loss that is tried, and the deepest nesting."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}

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
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    processor = processor or platform.processor() or platform.machine()  # on some systems Python starts a program
    return {"processor": processor, "cores": usable_cores(), "system": platform.system()}


def usable_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_whole(path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
    """Write a file so that no reader ever finds half of it: a temporary file beside it, then ``os.replace``.

    With ``flush`` it is on the disk afterwards, and so is its folder, which is made if needed. A file that cannot be
    written, as on a full disk, is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path):
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


def append(path: Path, length: int, data: Any) -> bool:
    """Write data to the disk behind the first bytes of a file; False if there is no plain file of so many bytes.

    A process that is killed meanwhile leaves the first bytes as they are.
    """
    if kind_of(path) is not None or not path.exists():
        return False
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with _naming(path), open(os.open(path, flags), "r+b") as stream:
        if os.fstat(stream.fileno()).st_size < length:
            return False
        stream.truncate(length)
        stream.seek(length)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return True


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Let an error of the operating system name a file."""
    try:
        yield
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


def signed(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """Write JSON that names its own checksum; an indent of None makes one line."""
    content = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({**content, "sha256": _digest(content)}, indent=indent).encode()


def parts(path: str | os.PathLike[str], most: int, *, links: bool = False) -> Iterator[bytes]:
    """Read a plain file of unknown origin and at most so many bytes in parts; a small file comes in one.

    With ``links`` it may be a link, as users' own data may be.
    """
    name = os.fspath(path)
    # Without O_NONBLOCK opening a pipe waits for a writer; O_BINARY exists on Windows.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(name, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and (kind := kind_of(name)):
            raise UsageError(f"{name}: is {kind}, not a plain file") from error
        raise
    try:
        with _naming(name):
            about = os.fstat(file)
            if kind := _kind(about.st_mode):
                raise UsageError(f"{name}: is {kind}, not a file")
            length = 0
            # One byte more than the file's length, since it may have grown.
            while about.st_size <= most and (part := os.read(file, min(about.st_size + 1, 1 << 22))):
                length += len(part)
                if length > most:
                    break
                yield part
            if max(length, about.st_size) > most:
                raise UsageError(f"{name}: has more than {most:,} bytes, more than such a file may have")
    finally:
        os.close(file)


def read_bytes(path: str | os.PathLike[str], most: int, *, links: bool = False) -> bytes:
    """Read any file of a run, a report or a data set, whole; see ``parts``."""
    return b"".join(parts(path, most, links=links))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Give the kind of what is at a path; None for a plain file, and if there is nothing."""
    try:
        return _kind(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return None


def _kind(mode: int) -> str | None:
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


def digest_of(path: str | Path) -> str:
    """Give the SHA-256 of a file, which need not fit into memory."""
    digest = hashlib.sha256()
    for part in parts(path, LARGEST_TABLE):
        digest.update(part)
    return digest.hexdigest()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; its numbers, texts and depth are checked, so that later computations do not fail."""
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
    """Read what ``signed`` wrote, without the checksum; what does not match it is a UsageError."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise UsageError(f"{path}: damaged: its content does not match its checksum")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """Give the checksum of what a JSON file says, whatever its spaces and order."""
    return hashlib.sha256(_sorted(content).encode()).hexdigest()


def plain(value: Any, where: str = "state") -> Any:
    """Give a value as a checkpoint may hold it, in new containers: tensors, numbers, words, lists and dicts of them.

    What ``torch.load(weights_only=True)`` would refuse to read is found here, while the run can still say so. NumPy's
    numbers, which schedulers leave in the groups of optimizers, become Python's.
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
