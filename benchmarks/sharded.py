"""What attaching adds to a step on sharded parameters: FSDP2, gloo, one to four processes on this machine.

How many collectives a step takes is no matter of time: `tests/process/sharded/test_collectives.py` counts them.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing, nn, optim

import layerwise
from layerwise.rules import LayerAdaptive

from .growth import exponent
from .timing import Row, heading, ratio, show

TARGET = 1.10
"""Of the bare step, with two processes."""
LAYERS, WIDTH, BATCH = 24, 1024, 64


def iteration(model: Any, optimizer: optim.Optimizer) -> None:
    """Take an iteration."""
    optimizer.zero_grad()
    model(torch.randn(BATCH, WIDTH)).sum().backward()
    optimizer.step()


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
        steps, iterations = [], []
        for attach in (False, True):
            torch.manual_seed(0)
            model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
            optimizer = make(model.parameters())
            if attach:
                layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
            model(torch.randn(BATCH, WIDTH)).sum().backward()
            steps.append(optimizer.step)
            iterations.append(partial(iteration, model, optimizer))

        def together(step: Any) -> Any:
            def run() -> None:
                dist.barrier()
                step()

            return run

        rows[name] = ratio(together(steps[0]), together(steps[1]), rounds)
        rows[f"{name}, iteration"] = ratio(together(iterations[0]), together(iterations[1]), max(3, rounds // 3))
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def measure(rounds: int, worlds: tuple[int, ...] = (1, 2, 4)) -> dict[str, Row]:
    """Print the table and return its rows."""
    rows: dict[str, Row] = {}
    more: dict[str, list[float]] = {}
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
            more.setdefault(name, []).append(row["attached_ms"] - row["bare_ms"])
    for name in ("SGD momentum", "AdamW, fused"):
        fitted = exponent(list(worlds), more[name])
        rows[f"sharded, exponent of processes, {name}"] = {"more": fitted, "target": 1.0}
        print(f"{name}: what attaching adds grows with the processes as n^{fitted:.2f} (target 1)")
    return rows


if __name__ == "__main__":
    measure(30)
