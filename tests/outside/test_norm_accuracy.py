"""Norms are good to 1e-6 of float64 for every size, stride and type."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import layerwise
from layerwise.rules import LARS, Directionality, GradientAmplification, Phase

MEASURED = {torch.float64: 1e-12, torch.complex128: 1e-12}


def exact_norm(tensor: torch.Tensor) -> float:
    """Return the norm from pieces that float64 holds without loss."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return math.sqrt(math.fsum(float(piece.double().square().sum()) for piece in real.reshape(-1).split(2**16)))


class Unstepped(torch.optim.Optimizer):
    """Moves nothing, and so takes gradients of any layout."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None):
        return None


def recorded_norm(gradient: torch.Tensor) -> float:
    """Return the norm that a Monitor records for a gradient of this stride and layout."""
    shape = gradient.shape
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.zeros((), dtype=gradient.dtype).expand(shape))
    optimizer = Unstepped(owner.parameters())
    monitor = layerwise.Monitor(optimizer, owner, every=1)
    owner.weight.grad = gradient
    optimizer.step()
    record = monitor.get_last_record()
    assert record is not None
    return record.gradient_norm[0]


# Primes, powers of two and their neighbours: on both sides of every size at which a norm is computed differently.
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
SIZES = (1, 7, 255, 257, 511, 512, 513, 1000, 4095, 4096, 8191, 8193, 9973, 65_537, 262_147, 524_287, 524_288, 524_309)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equal_and_random_numbers_of_any_count_have_their_norm(size, dtype):
    torch.manual_seed(size)
    limit = MEASURED.get(dtype, 1e-6)
    for gradient in (torch.full((size,), 0.1, dtype=dtype), torch.randn(size, dtype=dtype)):
        assert recorded_norm(gradient) == pytest.approx(exact_norm(gradient), rel=limit)


def test_no_constant_is_added_up_worse_than_another():
    for size in (512, 4096, 524_287):
        for constant in torch.linspace(1, 2, 25).tolist():
            gradient = torch.full((size,), constant)
            assert recorded_norm(gradient) == pytest.approx(exact_norm(gradient), rel=1e-6), (size, constant)


STRIDES = {
    "transposed": lambda make: make(1009, 997).T,
    "channels last": lambda make: make(61, 67, 11, 13).to(memory_format=torch.channels_last),
    "channels last in three dimensions": lambda make: make(13, 17, 5, 11, 23).to(memory_format=torch.channels_last_3d),
    "permuted": lambda make: make(101, 103, 59).permute(1, 2, 0),
    "every second column": lambda make: make(603, 2003)[:, ::2],
    "few with gaps": lambda make: make(509, 2)[:, 0],
    "thousands with gaps": lambda make: make(8191, 2)[:, 1],
    "a slice in the middle": lambda make: make(64, 33, 17, 19)[:, 1:-1, ::2],
    "a transposed slice": lambda make: make(1009, 997)[3:, 5:].T,
    "expanded along rows": lambda make: make(1009, 1).expand(1009, 997),
    "expanded along columns": lambda make: make(1, 1009).expand(997, 1009),
    "one number expanded": lambda make: make(1).expand(600_011),
    "windows that overlap": lambda make: make(700_001).unfold(0, 3, 1),
    "no numbers": lambda make: make(0, 5),
    "one number": lambda make: make(1)[0],
}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_a_gradient_of_any_stride_has_its_norm(stride, dtype):
    torch.manual_seed(0)
    for make in (lambda *shape: torch.full(shape, 0.1, dtype=dtype), lambda *shape: torch.randn(shape, dtype=dtype)):
        gradient = STRIDES[stride](make)
        assert recorded_norm(gradient) == pytest.approx(exact_norm(gradient), rel=MEASURED.get(dtype, 1e-6), abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_sparse_gradient_of_any_count_has_its_norm(dtype):
    torch.manual_seed(0)
    rows = torch.randint(0, 9973, (20_011,))  # with repeated entries, which add up
    for values in (torch.full((20_011, 64), 0.1, dtype=dtype), torch.randn(20_011, 64, dtype=dtype)):
        gradient = torch.sparse_coo_tensor(rows[None], values, (9973, 64), check_invariants=True).coalesce()
        assert recorded_norm(gradient) == pytest.approx(exact_norm(gradient), rel=MEASURED.get(dtype, 1e-6))


def test_half_precision_overflows_at_no_size():
    for size in (300, 5000, 600_011):
        gradient = torch.full((size,), 3e4, dtype=torch.float16)
        assert recorded_norm(gradient) == pytest.approx(3e4 * math.sqrt(size), rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "random"])
def test_a_large_embedding_under_lars_has_its_factor_and_its_norms(constant):
    torch.manual_seed(0)
    embedding = nn.Embedding(1_000_003, 64)
    weight = embedding.weight
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 0.1) if constant else torch.randn_like(weight)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5, weight_decay=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(trust_coefficient=0.01, eps=0), embedding)
    monitor = layerwise.Monitor(optimizer, embedding, every=1)
    gradient_norm, weight_norm = exact_norm(weight.grad), exact_norm(before)
    optimizer.step()
    expected = 0.01 * weight_norm / (gradient_norm + 0.01 * weight_norm)
    assert adapter.get_last_factors() == {"weight": pytest.approx(expected, rel=1e-6)}
    record = monitor.get_last_record()
    assert record is not None
    assert record.gradient_norm == [pytest.approx(gradient_norm, rel=1e-6)]
    assert record.weight_norm == [pytest.approx(weight_norm, rel=1e-6)]
    assert record.update_norm == [pytest.approx(exact_norm(weight.detach() - before), rel=1e-6)]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_million_numbers_have_their_norm(dtype):
    gradient = torch.full((10**8 + 7,), 0.1, dtype=dtype)
    assert recorded_norm(gradient) == pytest.approx(float(gradient[0]) * math.sqrt(10**8 + 7), rel=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_directionality_of_half_a_million_equal_gradients_is_exact(transposed):
    model = nn.Sequential(nn.Linear(1009, 997, bias=False), nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = GradientAmplification(Directionality(measure="G"), [Phase(1, False), Phase(3, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    adapter.end_epoch()
    for constant in (0.1, 0.3, -0.1):
        for p in model.parameters():
            p.grad = torch.full(p.shape[::-1], constant).T if transposed else torch.full(p.shape, constant)
        optimizer.step()
    adapter.end_epoch()
    assert adapter.get_last_selection()["0"].value == pytest.approx(0.6, rel=1e-6)
