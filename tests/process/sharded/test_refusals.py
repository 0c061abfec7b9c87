"""What cannot work in sharded training is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import layerwise
from layerwise.rules import (
    LARS,
    AlignUpdates,
    BackMatching,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    Phase,
    Trust,
    refresh,
)

from .cases import CASES, attach, loss_of, momentum, network
from .processes import run
from .training import fsdp1


def refuse(rank: int) -> None:
    """Try what is refused, in each process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="use_orig_params=True"):
        layerwise.LayerwiseLR(momentum(flat.parameters()), LayerAdaptive(), flat)

    model = fsdp1(network())
    with pytest.raises(ValueError, match="pass model=, the wrapped model"):
        layerwise.LayerwiseLR(momentum(model.named_parameters()), LayerAdaptive())

    split, whole = {"embed.weight": 2}, network()
    fully_shard(whole)
    for shared in (model, whole):
        with pytest.raises(ValueError, match=r"split: 'embed.weight' is .* sharded.* leave it out of split"):
            layerwise.LayerwiseLR(momentum(shared.parameters()), LayerAdaptive(), shared, split=split)

    bare = network()
    optimizer = momentum(bare.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), bare)
    wrapped = fsdp1(bare)
    loss_of(wrapped, 0).backward()
    with pytest.raises(ValueError, match="pass the wrapped model itself"):
        optimizer.step()
    adapter.detach()

    normalised = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="convert_sync_batchnorm"):
        layerwise.LayerwiseLR(momentum(normalised.parameters()), BackMatching(), normalised)

    sampled = GradientAmplification(Directionality(sample=2), [Phase(2, True)])
    sharded = network()
    fully_shard(sharded)
    optimizer = momentum(sharded.parameters())
    with pytest.raises(ValueError, match="leave sample out"):
        layerwise.LayerwiseLR(optimizer, sampled, sharded)
    assert not optimizer._optimizer_step_pre_hooks

    forward = network()
    fully_shard(forward)
    optimizer = momentum(forward.parameters())
    forward(torch.ones(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"owns none of .*Attach before the first forward pass"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), forward)

    zero = ZeroRedundancyOptimizer(network().parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(ValueError, match="overlap_with_ddp=False"):
        layerwise.LayerwiseLR(zero, LayerAdaptive())
    model = network()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="steps only some of the parameters: shard with FSDP"):
        layerwise.LayerwiseLR(zero, Trust(), model)
    with pytest.raises(ValueError, match="leave split out, or use the optimizer itself"):
        layerwise.LayerwiseLR(zero, LayerAdaptive(), model, split=split)
    assert not zero._optimizer_step_pre_hooks


def follow(rank: int) -> tuple[int, int]:
    """Add a group to ZeRO's optimizer after attaching: its inner optimizer is then another one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    zero = ZeroRedundancyOptimizer(model.embed.parameters(), torch.optim.SGD, lr=0.1)
    adapter = layerwise.LayerwiseLR(zero, LayerAdaptive(), model)
    zero.add_param_group({"params": list(model.head.parameters())})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    zero.step()
    factors = adapter.get_last_factors()
    adapter.detach()
    return len(factors), len(zero._optimizer_step_pre_hooks) + len(zero.optim._optimizer_step_pre_hooks)


def rate_zero(rank: int) -> int:
    """Train at rate 0 where one process holds nothing that is trained."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.Linear(2, 30)).double()
    model[1].requires_grad_(False)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    for rate in (0.01, 0.0, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        model(torch.ones(3, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert adapter.get_last_factors()["0"] > 1
    return monitor.steps


@pytest.mark.dist
def test_a_process_that_holds_nothing_that_is_trained_steps_with_the_others_at_rate_zero():
    assert run(2, rate_zero, timeout=100) == [3, 3]


def load_of_another(rank: int, path: str) -> None:
    """Let the first process save its state, and all load it."""
    model = network()
    fully_shard(model)
    optimizer = momentum(model.parameters())
    adapter = attach(CASES["amplification by G"], model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    if rank == 0:
        torch.save(adapter.state_dict(), path)
    torch.distributed.barrier()
    saved = torch.load(path, weights_only=True)
    if rank == 0:
        adapter.load_state_dict(saved)
        return
    before = adapter.state_dict()["state"]["sums"]["signed"]["/up.weight"].to_local()
    with pytest.raises(ValueError, match="the shard of another process"):
        adapter.load_state_dict(saved)
    assert torch.equal(adapter.state_dict()["state"]["sums"]["signed"]["/up.weight"].to_local(), before)


@pytest.mark.dist
def test_the_shards_of_another_process_are_not_taken_for_ones_own(tmp_path):
    run(2, load_of_another, str(tmp_path / "state.pt"))


@pytest.mark.dist
def test_what_cannot_work_is_refused():
    run(2, refuse)


@pytest.mark.dist
def test_zero_is_followed_when_it_makes_its_inner_optimizer_anew():
    assert run(2, follow) == [(2, 0), (2, 0)]


def pause_alone(rank: int) -> list[dict[str, float]]:
    """Pause in one process alone, under rules that measure every few steps only."""
    found = []
    for rule in (refresh(LARS(), every=3), AlignUpdates(every=3), Trust()):
        model = network()
        fully_shard(model)
        optimizer = momentum(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
        for step in range(8):
            loss_of(model, step, rank, 2).backward()
            if rank == 0 and step == 1:
                with adapter.paused():
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        found.append(adapter.get_last_factors())
    return found


@pytest.mark.dist
def test_a_process_that_pauses_alone_counts_the_steps_of_the_others() -> None:
    first, second = run(2, pause_alone)
    assert first == second
    assert all(len(set(factors.values())) > 2 for factors in first)
