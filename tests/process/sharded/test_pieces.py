"""Which piece of a parameter each process holds, and over whom to sum, where that is not simply all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import layerwise
from layerwise.rules import AGC, BackMatching, Directionality, GradientAmplification, LayerAdaptive, Phase

from .cases import loss_of, momentum, network
from .processes import run
from .training import fsdp1, fsdp2, whole_weights

WORLD, TAKING_PART, STEPS = 5, 4, 3


def train_in_part_of_all(rank: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]] | None:
    """Train in two copies of two shards each; the last process of all has another job."""
    mesh = DeviceMesh("cpu", torch.arange(TAKING_PART).reshape(2, 2), mesh_dim_names=("replicate", "shard"))
    if rank >= TAKING_PART:
        torch.distributed.barrier()
        return None
    model = fsdp2(network(), mesh=mesh)
    optimizer = momentum(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    factors = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank, TAKING_PART).backward()
        optimizer.step()
        factors.append(adapter.get_last_factors())
    weights = whole_weights(model)
    torch.distributed.barrier()
    return factors, weights


@pytest.mark.dist
def test_a_mesh_of_two_dimensions_in_a_part_of_all_processes_gives_the_numbers_of_one_process() -> None:
    """One group for all of it does not exist, and cannot be made without the others: the sums go over its two."""
    *taking_part, other = run(WORLD, train_in_part_of_all)
    assert other is None
    model = network()
    optimizer = momentum(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    expected = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        expected.append(adapter.get_last_factors())
    for factors, weights in taking_part:
        assert factors == taking_part[0][0]  # to the bit, else the processes would drift apart
        for found, wanted in zip(factors, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-11)
        for name, p in model.named_parameters():
            torch.testing.assert_close(weights[name], p.detach(), rtol=1e-10, atol=1e-12)


def measured_with(measure: Any, model: nn.Module) -> tuple[layerwise.LayerwiseLR, optim.Optimizer]:
    """Attach a rule that sums an epoch's gradients, at rate 0, so that every way keeps the same weights."""
    rule = GradientAmplification(Directionality(measure, threshold=0.5), [Phase(2, True)])
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    return layerwise.LayerwiseLR(optimizer, rule, model), optimizer


def steps(model: nn.Module, optimizer: optim.Optimizer, numbers: range, part: int = 0, parts: int = 1) -> None:
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, number, part, parts).backward()
        optimizer.step()


def go_on_sharded(rank: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Load what one process has saved in the middle of an epoch, and end the epoch with shared parameters."""
    found = {}
    for measure, state in saved.items():
        model = fsdp2(network())
        adapter, optimizer = measured_with(measure, model)
        adapter.load_state_dict(state)
        steps(model, optimizer, range(1, STEPS), rank, 2)
        adapter.end_epoch()
        found[measure] = adapter.get_last_selection()
        cut, _ = measured_with(measure, fsdp1(network()))  # whose pieces have no shape of their own
        with pytest.raises(ValueError, match=r"the saved sums of '/embed.weight' have shape \(8, 6\)"):
            cut.load_state_dict(state)
        assert cut.state_dict()["state"]["sums"] == {}
    return found


@pytest.mark.dist
def test_sums_that_one_process_has_saved_are_cut_into_pieces_when_several_load_them() -> None:
    saved, expected = {}, {}
    for measure in ("G", "G_prime"):
        model = network()
        adapter, optimizer = measured_with(measure, model)
        steps(model, optimizer, range(1))
        saved[measure] = adapter.state_dict()
        steps(model, optimizer, range(1, STEPS))
        adapter.end_epoch()
        expected[measure] = adapter.get_last_selection()
    for found in run(2, go_on_sharded, saved):
        for measure, wanted in expected.items():
            assert found[measure].keys() == wanted.keys()
            for name, one in wanted.items():
                assert found[measure][name].selected == one.selected
                assert found[measure][name].value == pytest.approx(one.value, rel=1e-9)
                assert found[measure][name].z == pytest.approx(one.z, rel=1e-7)


def normalised() -> nn.Module:
    """Batch normalisations whose running variances differ from channel to channel."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    for norm in (model[1], model[3]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        norm.running_var.uniform_(0.2, 3.0)
    return model.eval()


def factors_of_normalised(model: nn.Module) -> dict[str, float]:
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, BackMatching(), model)
    model(torch.ones(4, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    return adapter.get_last_factors()


def factors_of_shards(rank: int) -> list[dict[str, float]]:
    return [factors_of_normalised(fsdp2(normalised())), factors_of_normalised(fully_sharded_once(normalised()))]


def fully_sharded_once(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.dist
def test_the_gain_of_a_shared_batch_normalisation_takes_this_process_s_part_of_the_running_variance() -> None:
    expected = factors_of_normalised(normalised())
    assert len(set(expected.values())) == 4
    for found in run(2, factors_of_shards):
        assert found == [pytest.approx(expected, rel=1e-10)] * 2


# --- What cannot be known, in one process that takes itself for one of four -----------------------------------------


@pytest.fixture
def four() -> Iterator[None]:
    """A process group without other processes: nothing is sent, which is enough to be refused."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four")
def test_a_parameter_that_is_still_a_sum_over_processes_is_refused() -> None:
    mesh = init_device_mesh("cpu", (4,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Partial()], run_check=False))
    optimizer = optim.SGD([("weight", weight)], lr=0.1)
    with pytest.raises(ValueError, match=r"a parameter with placements .*Partial.* is a sum over processes; reduce it"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.usefixtures("four")
def test_fsdp1_around_tensor_parallel_parameters_is_refused() -> None:
    mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    inner = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh["tensor"], {"0": ColwiseParallel()})
    assert isinstance(inner[0].weight.placements[0], Shard)
    arguments = {"device_id": torch.device("cpu"), "use_orig_params": True}
    model = FullyShardedDataParallel(inner, device_mesh=mesh["data"], **arguments)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="over tensor parallel parameters hides how these are shared; use fully_shard"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.usefixtures("four")
def test_an_fsdp1_module_without_parameters_of_its_own_does_not_hide_those_below() -> None:
    """Its ten numbers are cut into four pieces of three, of which the last is filled up."""
    arguments: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    model = FullyShardedDataParallel(nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 2), **arguments)), **arguments)
    assert model._handle is None
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    (layer,) = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model).layer_table()
    assert (layer.name, layer.parameter_names) == ("0", ("0.weight", "0.bias"))
    assert [(tuple(shard.shape), shard.span) for shard in layer.shards if shard] == [((2, 4), (0, 3)), ((2,), (0, 0))]


@pytest.mark.usefixtures("four")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_rows_of_shards_have_no_factors() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = fsdp2(network())
    optimizer = momentum(model.parameters())
    with pytest.raises(ValueError, match=r"is sharded.*pass layers='parameter'"):
        layerwise.LayerwiseLR(optimizer, AGC(), model, layers="unit")
    assert not optimizer._optimizer_step_pre_hooks
    layerwise.LayerwiseLR(optimizer, AGC(), model, layers="parameter")
    whole = nn.Linear(4, 4)
    zero = ZeroRedundancyOptimizer(whole.parameters(), optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="layers='unit' does not work with ZeroRedundancyOptimizer"):
        layerwise.LayerwiseLR(zero, AGC(), whole, layers="unit")
    layerwise.LayerwiseLR(zero, AGC(), whole, layers="parameter")


@pytest.mark.usefixtures("four")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_monitor_is_not_attached_to_zero_whose_processes_see_a_part_of_a_step_each() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero = ZeroRedundancyOptimizer(nn.Linear(4, 4).parameters(), optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="no process sees a whole step; watch one without it"):
        layerwise.Monitor(zero, nn.Linear(4, 4))
