"""What attaching adds to a step on sharded parameters: FSDP2, gloo, one to four processes on this machine.

How many collectives a step takes is no matter of time: `tests/sharded/test_collectives.py` counts them.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing, nn, optim

import layerwise
from layerwise.rules import LayerAdaptive

from .timing import Row, heading, ratio, show

TARGET = 1.10
"""Of the bare step, with two processes."""
LAYERS, WIDTH = 24, 1024


def one_process(rank: int, world: int, port: int, rounds: int, answer: Any) -> None:
    """Time steps of fused AdamW and of SGD, bare and attached, in one of the processes."""
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    makers = {
        "SGD momentum": lambda p: optim.SGD(p, lr=1e-6, momentum=0.9),
        "AdamW, fused": lambda p: optim.AdamW(p, lr=1e-6, fused=True),
    }
    for name, make in makers.items():
        steps = []
        for attach in (False, True):
            torch.manual_seed(0)
            model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
            optimizer = make(model.parameters())
            if attach:
                layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
            model(torch.randn(4, WIDTH)).sum().backward()
            steps.append(optimizer.step)

        def together(step: Any) -> Any:
            def run() -> None:
                dist.barrier()
                step()

            return run

        rows[name] = ratio(together(steps[0]), together(steps[1]), rounds)
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(rounds: int, worlds: tuple[int, ...] = (1, 2, 4)) -> dict[str, Row]:
    """Print the table and return its rows."""
    rows: dict[str, Row] = {}
    heading(f"FSDP2 step, {LAYERS} x Linear({WIDTH})")
    context = multiprocessing.get_context("spawn")
    for world in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answer = context.SimpleQueue()
        multiprocessing.spawn(one_process, (world, port, rounds, answer), nprocs=world)
        for name, row in answer.get().items():
            title = f"{name}, {world} process{'es' if world > 1 else ''}"
            rows[f"sharded, {title}"] = show(title, row, TARGET if world == 2 else None)
    return rows


if __name__ == "__main__":
    measure(30)
