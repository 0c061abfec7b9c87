"""Several real processes that talk by gloo, for tests of sharded training."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch._dynamo",  # which the first step of an optimizer with hooks imports
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "layerwise",
]


class World:
    """Processes that stay from one call to the next, each call being a process group of its own among the first."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.calls = itertools.count()

    def grow(self, size: int) -> None:
        """Start processes, forked from one that has imported torch already, until there are so many."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        while len(self.processes) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(len(self.processes), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """Call the function in the first processes, and return what each returned."""
        self.grow(size)
        store = str(Path(self.folder.name, str(next(self.calls))))
        call = pickle.dumps((size, store, function, args))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(call)
        return _results(self.pipes[:size], timeout)

    def end(self, patience: float) -> None:
        """Let the processes end, which may still have their coverage to write; kill those that do not."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(patience)
            process.kill()
        self.folder.cleanup()


_worlds: list[World] = []


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Call `function(rank, *args)` in `world` processes of one process group; return what each returned.

    A failure of any of them is raised here, and the next call has new processes.
    """
    if not _worlds:
        _worlds.append(World())
    try:
        return _worlds[0].run(world, function, args, timeout)
    except BaseException:
        _worlds.pop().end(5)
        raise


def end() -> None:
    """End the processes that wait for a call, and the one that they are forked from."""
    while _worlds:
        _worlds.pop().end(60)
    # Killed: it would wait for every process that was forked since, such as a loader's worker that a traceback keeps.
    if forkserver._forkserver._forkserver_pid is not None:
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    forkserver._forkserver._stop()


def _results(pipes: list[Any], timeout: float) -> list[Any]:
    waiting, results = dict(enumerate(pipes)), {}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout)
        if not ready:
            raise TimeoutError(f"processes {sorted(waiting)} have not answered in {timeout} s: a collective hangs")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failure, results[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise RuntimeError(f"process {rank} died") from None
            if failure:
                raise AssertionError(f"in process {rank}:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _work(rank: int, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        failure, result = "", None
        torch.manual_seed(0)
        logging.disable(logging.NOTSET)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size, path, function, args = pickle.loads(call)
                store = torch.distributed.FileStore(path, size)
                torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
                result = function(rank, *args)
        except BaseException:
            failure = traceback.format_exc()
        # Not pipe.send: it would pass tensors through shared memory, which ends with this process.
        pipe.send_bytes(pickle.dumps((failure, result)))
        if failure:
            return
        torch.distributed.destroy_process_group()
