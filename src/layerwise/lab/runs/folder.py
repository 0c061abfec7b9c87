"""Folders of runs, which survive being killed at any moment.

A run's folder holds ``run.json`` (configuration, versions, hardware), ``status.json`` (how far it is), two checkpoints
and ``checkpoint-rows.bin`` while it runs, and ``metrics.parquet`` and ``record.json`` when it is finished. What is
recorded only grows, so each checkpoint appends the new rows to ``checkpoint-rows.bin``, and holds the length and the
checksum of that file; what lies behind is ignored. Every other file is written beside its place and moved there when
it is whole. ``record.json`` comes last and names the checksum of ``metrics.parquet``: a run with both is finished, any
other goes on from its last checkpoint. A lock of the operating system keeps a second process out of the folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from layerwise.lab.errors import UsageError
from layerwise.lab.runs import store
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.files import refuse_links, remove_leftovers
from layerwise.lab.runs.record import Record, Recorder, read_about, read_summary

MAGIC = b"layerwise checkpoint 1\n"
DIGEST_LENGTH = 32

STATES, ROWS = ("checkpoint.pt", "checkpoint-before.pt"), "checkpoint-rows.bin"
CHECKPOINTS = (*STATES, ROWS)
"""What an unfinished run is gone on with: the state of the training twice, and what is recorded."""

FACTORS = "factors.jsonl"
"""Recorded factors, in the folder of a run that repeats them."""

NAMES = ("run.json", "status.json", "metrics.parquet", "record.json", *CHECKPOINTS)
"""The files that the lab writes into a run's folder, besides ``FACTORS`` and the lock; others are never removed."""

LARGEST_CHECKPOINT = 1 << 38
"""Bytes of a checkpoint."""


class BusyError(RuntimeError):
    """Another process works on the run."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder by its file ``lock``, which stays; a forked child, as a loader's worker, does not hold the lock."""
    path = folder / "lock"
    if kind := store.kind_of(path):
        raise UsageError(f"{path}: is {kind}, where the lab writes a file; remove it")
    try:
        # The fallback is a file that a killed process would leave, which would keep its run from ever going on.
        held = FileLock(path, blocking=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise BusyError(f"{folder}: another process works on this run") from None
    except OSError as error:
        if error.filename is not None:  # it could not be opened
            raise
        raise UsageError(
            f"{folder}: files cannot be locked there ({error.strerror or error}), and without locks two processes "
            "could do the same run; give a folder on another file system with --out"
        ) from error
    with held:
        yield


@dataclass
class RunFolder:
    """One run's folder, and the broken files that were renamed."""

    path: Path
    configuration: Configuration
    set_aside: list[Path] = field(default_factory=list)
    _held: bool = field(default=False, repr=False)
    _rows: tuple[int, Any] = field(default_factory=lambda: (0, hashlib.sha256()), repr=False)
    """Length and checksum of ``checkpoint-rows.bin``, as far as it belongs to this run."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process out of the folder; BusyError if one is in it."""
        refuse_links(self.path, self.path.parent.parent)
        self.path.mkdir(parents=True, exist_ok=True)
        with alone_in(self.path):
            remove_leftovers(self.path, NAMES, seconds=0.0)
            for leftover in self.path.glob(f"{FACTORS}.*.part"):
                leftover.unlink(missing_ok=True)
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def begin(self, labels: dict[str, Any]) -> dict[str, Any]:
        """Write ``run.json``, unless it is there already, and give what it holds.

        A run that goes on on another machine names that one too, under ``later``.
        """
        found, here = self._read("run.json", read_about), store.hardware()
        if found is None:
            about = {
                "configuration": self.configuration.as_json(),
                "labels": labels,
                "versions": store.versions(),
                "python": platform.python_version(),
                "hardware": here,
                "later": [],
                "started": _now(),
            }
        else:
            about = found[1]
            if here in (about["hardware"], *about.setdefault("later", [])):
                return about
            about["later"].append(here)
        self._write("run.json", about)
        return about

    def say(self, state: str, iteration: int, total: int | None, **more: Any) -> None:
        """Write ``status.json``: what the run is doing, for people and for ``layerwise list``."""
        self._write("status.json", {"state": state, "iteration": iteration, "of": total, "at": _now(), **more})

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state of the training; the checkpoint before is kept until the next one.

        ``state["recorder"]["rows"]`` is a tensor of bytes that only grows from one checkpoint to the next; what is new
        is appended to a file of its own.
        """
        import torch

        if "recorder" in state:
            state = {**state, "recorder": {**state["recorder"], "rows": self._append(state["recorder"]["rows"])}}
        buffer = io.BytesIO()
        torch.save(store.plain(state), buffer)
        content = buffer.getbuffer()
        path = self.path / "checkpoint.pt"
        if path.exists():
            os.replace(path, self.path / "checkpoint-before.pt")
        store.write_whole(path, MAGIC + hashlib.sha256(content).digest() + content)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the newest whole checkpoint; one that is damaged is set aside and the one before it is taken."""
        for name in STATES:
            path = self.path / name
            try:
                content = _content_of(path)
            except FileNotFoundError:
                continue
            state = None if content is None else _state_of(path, content)
            if state is not None and self._read_rows(state):
                return state
            self._put_aside(path)
        return None

    def _append(self, rows: Any) -> list[Any]:
        """Append what is new of the recorded rows to their file; give its length and checksum."""
        (length, digest), path, content = self._rows, self.path / ROWS, memoryview(rows.numpy())
        if not (length and store.append(path, length, content[length:])):
            store.write_whole(path, content)
        digest = digest.copy()
        digest.update(content[length:])
        self._rows = (len(content), digest)
        return [len(content), digest.hexdigest()]

    def _read_rows(self, state: Any) -> bool:
        """Put the recorded rows into the state of a checkpoint; False if their file does not hold them."""
        import torch

        match state:
            case {"recorder": {"rows": [int() as length, str() as expected]}} if length >= 0:
                pass
            case _:  # no state of a training, as will be found
                return True
        try:
            content = store.read_bytes(self.path / ROWS, store.LARGEST_TABLE)[:length]
        except (FileNotFoundError, ValueError):
            return False
        digest = hashlib.sha256(content)
        if len(content) < length or digest.hexdigest() != expected:
            return False
        state["recorder"]["rows"] = torch.from_numpy(np.array(memoryview(content)))
        self._rows = (length, digest)
        return True

    def finish(self, recorder: Recorder, summary: dict[str, Any]) -> None:
        """Write the metrics and the record; the run is then finished and its checkpoints are removed."""
        buffer = io.BytesIO()
        recorder.frame().write_parquet(buffer, compression="zstd")
        content = buffer.getvalue()
        store.write_whole(self.path / "metrics.parquet", content)
        self._write("record.json", {**summary, "metrics_sha256": hashlib.sha256(content).hexdigest()})
        self.tidy(summary)

    def tidy(self, summary: dict[str, Any]) -> None:
        """Say that the run is finished and remove its checkpoints; again, if it was killed before it could."""
        left = [path for name in CHECKPOINTS if os.path.lexists(path := self.path / name)]
        state = "finished" if summary["diverged_at"] is None else "diverged"
        status = None if left else self._read("status.json", lambda folder: store.read_signed(folder / "status.json"))
        if status is None or status.get("state") != state:
            self.say(state, summary["iterations"], summary["iterations"])
        for path in left:
            if store.kind_of(path) == "a folder":  # none that the lab has made
                self._put_aside(path)
            with suppress(FileNotFoundError):
                path.unlink()

    def record(self) -> Record | None:
        """Read the finished run; None if it is not finished, or damaged (then it is set aside)."""
        about, summary = self._read("run.json", read_about), self._read("record.json", read_summary)
        if about is None or summary is None:
            return None
        if about[0].identity != self.configuration.identity:  # the files were copied from another run
            self._put_aside(self.path / "run.json")
            return None
        path = self.path / "metrics.parquet"
        try:
            digest = store.digest_of(path)
        except (FileNotFoundError, ValueError):
            digest = None
        if digest != summary["metrics_sha256"]:
            for broken in (path, self.path / "record.json"):
                self._put_aside(broken)
            return None
        return Record(self.path, self.configuration, summary, about[1])

    def _write(self, name: str, content: dict[str, Any]) -> None:
        store.write_whole(self.path / name, store.signed(content))

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        """Read a file of the run; None if it does not exist or is damaged. A damaged file is renamed."""
        if self.path.is_symlink():
            return None
        try:
            return read(self.path)
        except FileNotFoundError:
            return None
        except ValueError:
            self._put_aside(self.path / name)
            return None

    def _put_aside(self, path: Path) -> None:
        """Rename a broken file, unless another process is at work here: what looks broken may be half of its work.

        Where nothing can be written it stays; it is not taken for whole there either.
        """
        if not self._held:
            with suppress(BusyError, OSError, UsageError), self.lock():
                self._put_aside(path)
            return
        with suppress(FileNotFoundError):
            aside = path.with_name(path.name + ".broken")
            for number in count(2):  # files that were renamed before stay
                if not os.path.lexists(aside):
                    break
                aside = path.with_name(f"{path.name}.broken-{number}")
            path.rename(aside)
            self.set_aside.append(path)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _content_of(path: Path) -> memoryview | None:
    """Read the content of a checkpoint; None if it does not match its checksum, or is no plain file."""
    try:
        if not next(store.parts(path, LARGEST_CHECKPOINT), b"").startswith(MAGIC):
            return None
        content = memoryview(store.read_bytes(path, LARGEST_CHECKPOINT))[len(MAGIC) :]
    except ValueError:
        return None
    digest, content = content[:DIGEST_LENGTH], content[DIGEST_LENGTH:]
    return content if hashlib.sha256(content).digest() == digest else None


def _state_of(path: Path, content: memoryview) -> dict[str, Any]:
    """Read the state in a checkpoint; nothing that it names is run, and it takes no more memory than it is long."""
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if any(part.compress_type != zipfile.ZIP_STORED for part in packed.infolist()):
                raise ValueError("it is compressed, as no checkpoint is")
            if sum(part.file_size for part in packed.infolist()) > len(content):
                raise ValueError("its parts overlap")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what is made by hand raises nearly everything
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise UsageError(
            f"{path}: no checkpoint of layerwise: torch.load(weights_only=True) refuses it, and nothing in it was run "
            f"({reason}); remove it, and the run goes on from the one before it or begins anew"
        ) from error


class Runs:
    """All runs below the folder that ``--out`` names, by configuration, whatever experiment asked for them first."""

    def __init__(self, out: Path) -> None:
        self.path = out / "store"
        self.set_aside: list[Path] = []

    def folder(self, configuration: Configuration) -> RunFolder:
        """Give the folder of a run; it need not exist."""
        return RunFolder(self.path / configuration.name, configuration, self.set_aside)

    def find(self, configuration: Configuration) -> Record | None:
        """Give a finished run, or None."""
        return self.folder(configuration).record()

    def tidy(self, record: Record) -> None:
        """Remove what a kill has left beside a finished run, unless another process is just about to."""
        left = [name for name in CHECKPOINTS if os.path.lexists(record.folder / name)]
        if left or any(record.folder.glob(".*.tmp")):
            folder = RunFolder(record.folder, record.configuration, self.set_aside)
            with suppress(BusyError, OSError, UsageError), folder.lock():
                folder.tidy(record.summary)
