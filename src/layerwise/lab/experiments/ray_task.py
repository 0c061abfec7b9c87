"""What a Ray task does: a chain of runs, with what it needs from the driver and what it sends back."""

from __future__ import annotations

import socket
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.chain import Advance, Chain, Finished, do_chain
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.runs.store import LARGEST_TABLE, read_bytes, versions, write_whole

FILES = ("run.json", "status.json", "metrics.parquet", "record.json")
"""What a finished run consists of; its record last, as it says that the run is finished."""

ASK_SECONDS = 0.5
"""How often a task asks whether it is to stop."""

TELL_SECONDS = 0.2
"""How often a task tells how far it is."""

Files = dict[str, bytes]


@dataclass(frozen=True)
class Delivery:
    """A run that was finished where the driver's folder is not: its message and its files."""

    finished: Finished
    files: Files


@dataclass(frozen=True)
class Parcel:
    """What a task is given.

    Attributes:
        name: of the task.
        chain: to be done; its folder is the driver's.
        token: name and content of a file in that folder.
        versions: that the driver's results depend on.
        finished: configuration and files of the runs of the chain that are finished.
    """

    name: str
    chain: Chain
    token: str
    versions: dict[str, str]
    finished: tuple[tuple[Configuration, Files], ...] = ()


class Board:
    """The actor that tasks and driver talk through."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, str, Any]] = []
        self._stopped = False

    def put(self, task: str, kind: str, content: Any) -> None:
        """Keep a message of a task until it is taken."""
        self._messages.append((task, kind, content))

    def take(self) -> list[tuple[str, str, Any]]:
        """Give the messages since the last time, in the order in which they came."""
        messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        """Ask the tasks to stop."""
        self._stopped = True

    def stopped(self) -> bool:
        """Say whether tasks are to stop."""
        return self._stopped


class BoardLink:
    """A task's end: what ``pool.Link`` is to a local worker.

    Args:
        ray: the module.
        board: handle of the actor.
        task: name of the task.
    """

    private: Runs | None = None
    """Where finished runs are if the driver does not see them; they are sent then."""

    def __init__(self, ray: Any, board: Any, task: str) -> None:
        self._ray, self._board, self._task = ray, board, task
        self._stopped = False
        self._asked = self._told = 0.0

    def stopped(self) -> bool:
        """Say whether the task is to stop now."""
        if not self._stopped and time.monotonic() - self._asked > ASK_SECONDS:
            self._stopped = self._ray.get(self._board.stopped.remote())
            self._asked = time.monotonic()
        return self._stopped

    def doing(self, name: str) -> None:
        """Say what is worked on, so that a crash can be named."""
        self._ray.get(self._board.put.remote(self._task, "doing", name))

    def send(self, message: object) -> None:
        """Send a message to the driver; how far a run is, only now and then."""
        if isinstance(message, Advance):
            if time.monotonic() - self._told > TELL_SECONDS:
                self._told = time.monotonic()
                self._board.put.remote(self._task, "message", message)
            return
        if isinstance(message, Finished) and self.private is not None:
            message = Delivery(message, files_of(self.private.folder(message.configuration).path))
        self._ray.get(self._board.put.remote(self._task, "message", message))


def files_of(path: Path) -> Files:
    """Read the files of a finished run."""
    return {name: read_bytes(path / name, LARGEST_TABLE) for name in FILES if (path / name).exists()}


def write_files(path: Path, files: Files) -> None:
    """Write the files of a finished run, each whole, its record last."""
    for name in FILES:
        if name in files:
            write_whole(path / name, files[name])


def do_parcel(parcel: Parcel, board: Any) -> tuple[str, str] | None:
    """Do a chain; runs in a Ray worker.

    Args:
        parcel: the chain and what it needs.
        board: handle of the actor.

    Returns:
        Reason and traceback if it failed, else None.
    """
    import ray

    chain = parcel.chain
    link = BoardLink(ray, board, parcel.name)
    try:
        if link.stopped():  # before it could begin
            return None
        _check_here(parcel)
        with ExitStack() as held:
            if not is_shared(chain.out, parcel.token):
                private = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="layerwise-")))
                runs = Runs(private)
                for configuration, files in parcel.finished:
                    write_files(runs.folder(configuration).path, files)
                chain, link.private = replace(chain, out=private), runs
            do_chain(chain, link)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", traceback.format_exc()
    return None


def is_shared(out: Path, token: str) -> bool:
    """Say whether a folder is the one that the driver has put a token into."""
    try:
        return read_bytes(out / token, len(token)) == token.encode()
    except (OSError, UsageError):
        return False


def _check_here(parcel: Parcel) -> None:
    """Refuse a machine whose numbers would be others, or that lacks the data."""
    host = socket.gethostname()
    if versions() != parcel.versions:
        raise UsageError(
            f"versions={versions()!r} of {host} are not the {parcel.versions!r} of the machine that asks, and results "
            "depend on them: install the same there"
        )
    place = parcel.chain.data_dir
    if place is not None and not place.is_dir():
        raise UsageError(f"data_dir={str(place)!r} does not exist on {host}: put the data at the same place everywhere")
