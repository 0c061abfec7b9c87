"""A monitor records of sharded training what it records of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import layerwise
from layerwise.rules import LayerAdaptive

from .cases import STEPS, loss_of, momentum, network
from .processes import run
from .training import WAYS, part_of, whole_weights

QUANTITIES = ("gradient_norm", "weight_norm", "update_norm", "factor", "lr", "update_ratio")
RUNS = [("DDP", 2), ("FSDP2", 3), ("HSDP", 4), ("tensor parallel", 2), ("FSDP1", 2)]


def watch(rank: int, way: str, attached: bool) -> Any:
    """Train; return the records, the collectives of each step, and the weights."""
    model = WAYS[way](network()) if way else network()
    optimizer = momentum(model.parameters())
    if attached:
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    records: list[Any] = []
    monitor = layerwise.Monitor(optimizer, model, every=2, sinks=[records.append])
    part, parts = part_of(way, rank) if way else (0, 1)
    collectives = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, part, parts).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        collectives.append(counted.get_total_counts())
    monitor.detach()
    rows = [(record.layers, [getattr(record, quantity) for quantity in QUANTITIES]) for record in records]
    return rows, collectives, whole_weights(model)


@pytest.mark.dist
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "with a rule"])
@pytest.mark.parametrize(("way", "world"), RUNS, ids=[f"{way}, {world} processes" for way, world in RUNS])
def test_a_record_is_that_of_one_process_and_takes_one_collective(way, world, attached):
    ((expected, _, weights),) = run(1, watch, "", attached)
    for records, collectives, found in run(world, watch, way, attached):
        assert len(records) == STEPS // 2
        for (layers, numbers), (names, wanted) in zip(records, expected, strict=True):
            assert layers == names
            for quantity, ours, one in zip(QUANTITIES, numbers, wanted, strict=True):
                assert ours == pytest.approx(one, rel=1e-9), quantity
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-10, atol=1e-12)
        if way != "tensor parallel":  # where the optimizer's own are among them
            shared = way != "DDP"
            assert collectives == [attached * shared, (1 + attached) * shared] * (STEPS // 2)
