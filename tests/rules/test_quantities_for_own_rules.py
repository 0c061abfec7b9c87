"""What a rule of one's own may build on: changes of gradients, distances of weights, spectra; against float64 loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

import reference
from layerwise import LayerwiseLR
from layerwise.layers import Layer
from layerwise.rules.copies import RemembersGradients, RemembersWeights
from layerwise.rules.heavy_tail import hill_alpha, spectral_norm, stable_rank
from layerwise.sharding import Shard
from layerwise.statistics import Gradients, Statistics

CPU = torch.device("cpu")
SHAPES = [(300, 7), (5,), (9, 4, 3), (1,)]


class Watching(RemembersGradients):
    """Keeps what it compares."""

    def factors(self, statistics: Statistics, state: Any) -> Any:
        previous, difference, new = self.compared(statistics, state)
        self.found = previous, difference, self.gradient_inner(state, new)
        return torch.ones_like(previous), new


class Moving(RemembersWeights):
    """Keeps how far the weights have come."""

    needs = ()

    def factors(self, statistics: Statistics, state: Any) -> Any:
        state = self.begun(state)
        self.found = self.distance(state), self.rotation(state)
        return torch.ones_like(self.found[0]), state


def network(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def attached(rule: Any, weights: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(weights, lr=0.1, **options)
    layers = {"matrix and bias": weights[:2], "kernel": weights[2:3], "scale": weights[3:]}
    LayerwiseLR(optimizer, rule, layers=layers)
    return optimizer


def by_layer(tensors: list[torch.Tensor]) -> list[list[np.ndarray]]:
    arrays = [t.detach().double().numpy().copy() for t in tensors]
    return [arrays[:2], arrays[2:3], arrays[3:]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 1e-6)])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_changes_of_gradients_are_those_of_loops(dtype: torch.dtype, tolerance: float, scale: float | None) -> None:
    weights, rule = network(dtype), Watching()
    optimizer: Any = attached(rule, weights, fused=scale is not None)
    generator = torch.Generator().manual_seed(1)
    before = by_layer([torch.zeros_like(p) for p in weights])
    for _ in range(3):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        now = by_layer([p.grad for p in weights])
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            for p in weights:
                p.grad *= scale
        optimizer.step()
        for i, (x, y) in enumerate(zip(before, now, strict=True)):
            wanted = reference.change(x, y)
            previous, difference, inner = (float(one[i]) for one in rule.found)
            size = wanted[0] * reference.change(y, y)[0]
            assert (previous, difference) == pytest.approx(wanted[:2], rel=tolerance)
            assert inner == pytest.approx(wanted[2], abs=tolerance * size)
        before = now


def test_a_step_that_a_scaler_skips_has_no_change_and_a_missing_gradient_is_zero() -> None:
    rule, layers = Watching(), [Layer("w", (torch.zeros(2, dtype=torch.float64),))]
    state = rule.init(layers, CPU)
    shown = []
    for gradient, skipped in (([3.0, 4.0], 0.0), ([9.0, 9.0], 1.0), ([3.0, 6.0], 0.0), (None, 0.0)):
        tensor = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        _, state = rule.factors(Statistics(gradients=Gradients([tensor], skipped=torch.tensor(skipped))), state)
        shown.append([float(one) for one in rule.found[:2]])
    assert shown[0] == [0, 5]
    assert shown[1][0] == 5
    assert math.isnan(shown[1][1])
    assert shown[2:] == [[5, 2], [45**0.5, 45**0.5]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_distance_and_rotation_are_those_of_loops(dtype: torch.dtype, tolerance: float, size: float) -> None:
    weights, rule = network(dtype), Moving()
    optimizer = attached(rule, weights)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in weights:
            p.mul_(2)  # as a checkpoint that is loaded after attaching
    first = by_layer(list(weights))
    for _ in range(4):
        now = by_layer(list(weights))
        for p in weights:
            p.grad = size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
        for i, (x, y) in enumerate(zip(first, now, strict=True)):
            far, turned = (float(one[i]) for one in rule.found)
            assert far == pytest.approx(reference.change(x, y)[1], rel=tolerance)
            # Turns that are small beside what norms are accurate to count too.
            assert turned == pytest.approx(reference.rotation(x, y), rel=1e-3, abs=tolerance * size)


def test_weights_that_only_grow_do_not_turn_and_zero_weights_have_no_direction() -> None:
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    rule, layers = Moving(), [Layer("w", (weight,)), Layer("zero", (torch.zeros(2, dtype=torch.float64),))]
    _, state = rule.factors(Statistics(), rule.init(layers, CPU))
    for scale, turned in ((3.0, 0.0), (-1.0, 2.0)):
        weight.mul_(scale)
        rule.factors(Statistics(), state)
        assert float(rule.found[1][0]) == pytest.approx(turned, abs=1e-15)
        assert math.isnan(rule.found[1][1])


@pytest.mark.parametrize("shape", [(4, 4), (20, 7), (6, 5, 3, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_spectra_are_those_of_numpy(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    eigenvalues = reference.spectrum(weight.double().numpy())
    for measure, wanted in (
        (hill_alpha, reference.hill_alpha(eigenvalues)),
        (stable_rank, reference.stable_rank(eigenvalues)),
        (spectral_norm, reference.spectral_norm(eigenvalues)),
    ):
        found = measure(weight)
        assert (found.dtype, found.shape) == (torch.float64, ())
        assert float(found) == pytest.approx(wanted, rel=tolerance)
        assert math.isnan(measure(torch.full(shape, math.inf)))
    assert math.isnan(stable_rank(torch.zeros(shape)))
    assert float(spectral_norm(torch.zeros(shape))) == 0


@pytest.fixture
def four() -> Iterator[None]:
    """A process group without other processes."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("measure", [hill_alpha, stable_rank, spectral_norm])
def test_a_spectrum_is_refused_with_the_remedy_where_there_is_no_whole_matrix(measure: Any) -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3,\).*two or more dimensions"):
        measure(torch.ones(3))
    whole = torch.randn(4, 4)
    sharded = DTensor.from_local(whole, init_device_mesh("cpu", (4,)), [Replicate()], run_check=False)
    with pytest.raises(ValueError, match=r"weight is sharded.*full_tensor\(\)"):
        measure(sharded)
    assert torch.equal(measure(sharded.full_tensor()), measure(whole))


@pytest.mark.parametrize("rule", [Watching(), Moving()])
def test_shards_are_refused(rule: Any) -> None:
    shard = Shard(torch.Size([4, 2]), 1, (), "cpu", (0, 1))
    with pytest.raises(
        ValueError, match="measures whole tensors, and the parameters are sharded: use a rule that needs"
    ):
        rule.init([Layer("w", (torch.zeros(2, 2),), shards=(shard,))], CPU)
