"""Finished runs on disk: one JSON file each, whole or not there at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import layerwise

Record = dict[str, object]


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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunStore:
    """The folder of the runs.

    Args:
        folder: where the files are; made when the first one is written.
        fields: what the record of a whole run holds; a file without them is broken.
    """

    def __init__(self, folder: Path, fields: Iterable[str] = ()) -> None:
        self.folder = folder
        self.fields = frozenset(fields)
        self.set_aside: list[Path] = []
        """Files that were not whole JSON and were renamed, in the order found."""

    def path(self, name: str) -> Path:
        """Give the file of a run."""
        return self.folder / f"{name}.json"

    def clear_leftovers(self) -> None:
        """Remove temporary files of a process that was killed while it wrote."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def save(self, name: str, record: Record) -> Record:
        """Write a finished run with the versions and the machine that made it.

        Args:
            name: of the run.
            record: what the training returned.

        Returns:
            The record as written.
        """
        whole = {
            **record,
            "versions": {**versions(), "python": platform.python_version()},
            "hardware": hardware(),
        }
        write_whole(self.path(name), json.dumps(whole, allow_nan=False).encode())
        return whole

    def load(self, name: str, configuration: Record) -> Record | None:
        """Read a finished run of this configuration and these versions.

        Args:
            name: of the run.
            configuration: what the run must have been.

        Returns:
            The record, or None if there is none, if it is of another configuration or version, or if its file
            is broken; a broken file is renamed to ``.json.broken`` and listed in ``set_aside``.
        """
        path = self.path(name)
        try:
            record = json.loads(path.read_bytes())
            same = record["configuration"] == configuration
            known = {key: record["versions"][key] for key in versions()}
            complete = self.fields <= set(record)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return self._put_aside(path)
        if not complete:
            return self._put_aside(path)
        return record if same and known == versions() else None

    def _put_aside(self, path: Path) -> None:
        path.replace(path.with_name(path.name + ".broken"))
        self.set_aside.append(path)
