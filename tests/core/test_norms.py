"""The norms of tensors against float64 NumPy."""

from __future__ import annotations

import pytest
import torch

from layerwise._norms import FEW, row_norms, tensor_norm_numbers, tensor_norms
from slow_norms import arrays, layer_norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds(dtype):
    tensors = [torch.full((1000,), 3e4, dtype=dtype), torch.full((100,), 1e-4, dtype=dtype)]
    norms, order = tensor_norms(tensors, torch.device("cpu"))
    expected = [layer_norm(arrays([tensors[i]])) for i in order]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)


LARGE_TENSORS = {
    "one dimension": lambda: torch.randn(2**20),
    "a matrix": lambda: torch.randn(512, 1024),
    "channels last": lambda: torch.randn(512, 128, 3, 3).to(memory_format=torch.channels_last),
    "a prime number of columns": lambda: torch.randn(640, 1009),
    "a prime number of numbers": lambda: torch.randn(524_309),
    "transposed": lambda: torch.randn(1000, 600).T,
    "every second column": lambda: torch.randn(600, 2000)[:, ::2],
    "float16": lambda: torch.full((600, 1024), 3e4, dtype=torch.float16),
    "bfloat16": lambda: torch.randn(600, 1024).bfloat16(),
    "float64": lambda: torch.randn(600, 1024, dtype=torch.float64),
    "complex": lambda: torch.randn(600, 1024, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", LARGE_TENSORS)
def test_a_large_tensor_among_small_ones_has_its_norm(name):
    torch.manual_seed(0)
    large = LARGE_TENSORS[name]()
    small = torch.randn(5, dtype=large.dtype)
    tensors = [small, large, small]
    norms, order = tensor_norms(tensors, torch.device("cpu"))
    assert sorted(order) == [0, 1, 2]
    expected = [layer_norm(arrays([tensors[i]])) for i in order]
    assert norms.tolist() == pytest.approx(expected, rel=1e-12 if large.dtype is torch.float64 else 1e-6)


ROWS = {
    **{name: make for name, make in LARGE_TENSORS.items() if make().ndim > 1},
    "rows of one number": lambda: torch.randn(5, 1),
    "no rows": lambda: torch.randn(0, 1009),
    "rows without numbers": lambda: torch.randn(3, 0),
    "a convolution of volumes": lambda: torch.randn(3, 70, 2, 2, 3),
    "equal numbers": lambda: torch.full((3, 100_000), 1.1),
    "float16, long": lambda: torch.full((3, 300_000), 3e4, dtype=torch.float16),
    "a gap after each row": lambda: torch.randn(600, 2000)[:, :1500],
}


@pytest.mark.parametrize(
    ("name", "dimension"),
    [(name, dimension) for name in ROWS for dimension in (0, 1) if (name, dimension) != ("float16, long", 1)],
)
def test_each_row_has_its_norm(name, dimension):
    torch.manual_seed(0)
    tensor = ROWS[name]()
    expected = [layer_norm(arrays([row])) for row in tensor.unbind(dimension)]
    assert row_norms(tensor, dimension).tolist() == pytest.approx(
        expected, rel=1e-12 if tensor.dtype is torch.float64 else 1e-6
    )


@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_few_norms_and_many_are_the_same_numbers(count, dtype):
    tensors = [torch.randn(3, dtype=dtype) for _ in range(count)]
    norms, order = tensor_norms(tensors, torch.device("cpu"))
    assert tensor_norm_numbers(tensors) == (norms.tolist(), order)
    assert order == range(count)


@pytest.mark.parametrize("norms", [tensor_norm_numbers, lambda tensors: tensor_norms(tensors, torch.device("cpu"))])
def test_large_and_small_tensors_together_are_read_once(norms, monkeypatch):
    read: list[int] = []
    whole = torch.linalg.vector_norm

    def counted(tensor, *args, **kwargs):
        read.append(tensor.numel())
        return whole(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "vector_norm", counted)
    norms([torch.ones(3), torch.ones(20_480), torch.ones(1000)])
    assert read == [20_480]


def test_numbers_of_several_kinds_come_with_the_order_of_their_tensors():
    tensors = [torch.full((4,), 1.0), torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 3.0)]
    numbers, order = tensor_norm_numbers(tensors)
    assert sorted(zip(order, numbers, strict=True)) == [(0, 2.0), (1, 4.0), (2, 6.0)]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_broken_number_in_a_large_tensor_is_seen(broken):
    large = torch.zeros(2**20)
    large[77_777] = broken
    norms, _ = tensor_norms([large], torch.device("cpu"))
    assert not norms.isfinite().any()
