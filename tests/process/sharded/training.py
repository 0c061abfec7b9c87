"""Training in several processes, as each way to share a network out does it; run by `processes.run`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from .cases import CASES, STEPS, Case, attach, loss_of, network, selection_of


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module, **arguments: Any) -> nn.Module:
    for part in list(model.children()):
        fully_shard(part, **arguments)
    fully_shard(model, **arguments)
    return model


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp2(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def offloaded(model: nn.Module) -> nn.Module:
    return fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


PLAN = {
    "embed": ColwiseParallel(output_layouts=Shard(0)),
    "norm": SequenceParallel(sequence_dim=0, use_local_output=True),
    "up": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    "middle": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), PLAN)


def fsdp2_and_tensor_parallel(model: nn.Module, plan: dict[str, Any] = PLAN) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp2(parallelize_module(model, mesh["tensor"], plan), mesh=mesh["data"])


def two_meshes(model: nn.Module) -> nn.Module:
    return fsdp2_and_tensor_parallel(model, {name: style for name, style in PLAN.items() if name != "head"})


def fsdp1(model: nn.Module, **arguments: Any) -> nn.Module:
    arguments["device_id"] = torch.device("cpu")
    for name in ("embed", "middle"):
        setattr(model, name, FullyShardedDataParallel(getattr(model, name), use_orig_params=True, **arguments))
    return FullyShardedDataParallel(model, use_orig_params=True, **arguments)


def fsdp1_unshared(model: nn.Module) -> nn.Module:
    return fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": ddp,
    "ZeroRedundancyOptimizer": ddp,
    "FSDP2": fsdp2,
    "FSDP2, offloaded": offloaded,
    "HSDP": hsdp,
    "tensor parallel": tensor_parallel,
    "FSDP2 and tensor parallel": fsdp2_and_tensor_parallel,
    "FSDP2 and tensor parallel, one layer apart": two_meshes,
    "FSDP1": fsdp1,
    "FSDP1, NO_SHARD": fsdp1_unshared,
}


def make_optimizer(way: str, case: Case, model: nn.Module) -> Any:
    """Return the case's optimizer, inside ZeRO's where the way is that."""
    if way != "ZeroRedundancyOptimizer":
        return case.optimizer(model.parameters())
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    example = case.optimizer([nn.Parameter(torch.zeros(1))])
    options = {k: v for k, v in example.param_groups[0].items() if k not in ("params", "initial_lr")}
    known = {k: v for k, v in options.items() if k in type(example).__init__.__code__.co_varnames}
    return ZeroRedundancyOptimizer(model.parameters(), type(example), **known)


def part_of(way: str, rank: int) -> tuple[int, int]:
    """Return which part of the batch a process trains on, of how many."""
    if way == "tensor parallel":
        return 0, 1
    if way.startswith("FSDP2 and tensor parallel"):
        return rank // 2, 2
    return rank, torch.distributed.get_world_size()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole parameters by their own names."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    full = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in full.items()}


def train(rank: int, way: str, names: list[str]) -> dict[str, Any]:
    """Train each case; return its weights, factors, selection, and the collectives of bare and attached steps."""
    return {name: train_one(rank, way, CASES[name]) for name in names}


def train_one(rank: int, way: str, case: Case, *, attached: bool = True) -> dict[str, Any]:
    """Train one case, with the rule or without it."""
    logging.disable()  # torch tells of collectives that gloo lacks
    model = WAYS[way](network())
    optimizer = make_optimizer(way, case, model)
    adapter = attach(case, model, optimizer) if attached else None
    part, parts = part_of(way, rank)
    factors, collectives = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, part, parts).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        collectives.append(counted.get_total_counts())
        if adapter is not None:
            factors.append(adapter.get_last_factors())
            if step % 3 == 2:
                adapter.end_epoch()
    return {
        "weights": whole_weights(model),
        "factors": factors,
        "selection": None if adapter is None else selection_of(adapter),
        "collectives": collectives,
    }


def count(rank: int, way: str, names: list[str]) -> dict[str, tuple[list[int], list[int]]]:
    """Return the collectives of each step, without a rule and with it."""
    result = {}
    for name in names:
        runs = [train_one(rank, way, CASES[name], attached=attached)["collectives"] for attached in (False, True)]
        result[name] = (runs[0], runs[1])
    return result
