"""A gradient that is not finite in one process's piece is an error in all of them, before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import layerwise
from layerwise.rules import LayerAdaptive

from .cases import loss_of, momentum, network
from .processes import run


def step_with_a_broken_piece(rank: int) -> str:
    """Break one number of the last process's piece, and return what the step says."""
    model = network()
    fully_shard(model)
    optimizer = momentum(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    loss_of(model, 0).backward()
    optimizer.step()
    loss_of(model, 1).backward()
    if rank == 1:
        model.middle.weight.grad.to_local()[0, 0] = torch.nan
    before, factors = [p.to_local().clone() for p in model.parameters()], adapter.get_last_factors()
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before, strict=True))
    assert adapter.get_last_factors() == factors
    return str(caught.value)


@pytest.mark.dist
def test_every_process_raises_when_the_gradient_of_one_is_not_finite():
    first, second = run(2, step_with_a_broken_piece)
    assert first == second
    assert "step 2: the gradient of layer 'middle' is not finite (middle.weight)" in first
