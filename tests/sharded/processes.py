"""Several real processes that talk by gloo, for tests of sharded training."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
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


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Call `function(rank, *args)` in `world` processes of one process group; return what each returned.

    The processes are forked from one that has imported torch already. A failure of any of them is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world, str(Path(folder, "store")), sender, function, args)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _results(pipes, timeout)
            for process in processes:
                process.join(60)  # it has answered, and may still have its coverage to write
            return results
        finally:
            for process in processes:
                process.join(5)
                process.kill()


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


def _work(rank: int, world: int, store: str, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    failure, result = "", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
            )
            result = function(rank, *args)
    except BaseException:
        failure = traceback.format_exc()
    # Not sender.send: it would pass tensors through shared memory, which ends with this process.
    sender.send_bytes(pickle.dumps((failure, result)))
    sender.close()
    if not failure:
        torch.distributed.destroy_process_group()
