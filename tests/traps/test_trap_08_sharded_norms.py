"""Trap 8: the norm of a shard is not the layer's norm, and a process may hold nothing of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded.cases import loss_of, momentum, network
from sharded.processes import run
from sharded.training import fsdp2
from torch.distributed.tensor.debug import CommDebugMode

import layerwise
from layerwise.rules import LayerAdaptive
from reference import layer_adaptive

WORLD = 4


def first_step(rank: int) -> Any:
    """Take one step; return the factors, the collectives, and the norms and sizes of the pieces that are held."""
    model = fsdp2(network())
    optimizer = momentum(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    loss_of(model, 0, rank, WORLD).backward()
    pieces = {name: p.grad.to_local() for name, p in model.named_parameters()}
    with CommDebugMode() as counted:
        optimizer.step()
    norms = {name: float(piece.norm()) for name, piece in pieces.items()}
    return adapter.get_last_factors(), counted.get_total_counts(), norms, {n: p.numel() for n, p in pieces.items()}


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="PyTorch 2.6's FSDP2 does not run on the CPU")
@pytest.mark.dist
def test_the_norms_of_shards_are_put_together_with_one_collective():
    model = network()
    loss_of(model, 0).backward()
    layers = dict(model.named_children())
    gradients = [[p.grad.numpy() for p in layer.parameters()] for layer in layers.values()]
    expected = dict(zip(layers, layer_adaptive(gradients).tolist(), strict=True))
    whole = {name: float(torch.linalg.vector_norm(p.grad)) for name, p in model.named_parameters()}
    results = run(WORLD, first_step)
    for factors, collectives, norms, _ in results:
        assert factors == pytest.approx(expected, rel=1e-12)
        assert collectives == 1
        assert factors == results[0][0], "the processes must agree to the bit"
        assert any(norms[name] < 0.9 * whole[name] for name in whole), "a shard's norm would have done: no test"
    assert any(size == 0 for *_, sizes in results for size in sizes.values()), "no shard was empty: no test"
