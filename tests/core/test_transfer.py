"""Many values read at once come back as they went, each in its place."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise import _tensors
from layerwise._tensors import fetched

LIKE = torch.zeros((), dtype=torch.float64)


def test_tensors_numbers_and_what_is_not_there_come_back_in_their_order() -> None:
    values = [
        torch.tensor([[1.5, -2.0], [3.0, math.inf]]),
        None,
        [0.25, 0.5],
        torch.tensor(7, dtype=torch.int64),
        4,
        torch.zeros(0),
        torch.tensor([True, False]),
        0,
        [],
        (8.0,),
        torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True),
    ]
    expected = [[1.5, -2, 3, math.inf], [0], [0.25, 0.5], [7], [4], [], [1, 0], [0], [], [8], [2]]
    assert fetched(values, LIKE) == expected
    assert fetched(values[::-1], LIKE) == expected[::-1]


def test_what_is_not_contiguous_is_read_in_its_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert fetched([matrix.T, matrix[:, 1]], LIKE) == [[0, 3, 1, 4, 2, 5], [1, 4]]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, True), (torch.float32, False)])
def test_they_travel_in_the_type_that_is_asked_for(dtype: torch.dtype, exact: bool) -> None:
    """And numbers do not travel at all, so that they keep every digit."""
    ((tensor,), (number,)) = fetched([torch.tensor(0.1, dtype=torch.float64), [0.1]], torch.zeros((), dtype=dtype))
    assert (tensor == 0.1) is exact
    assert tensor == pytest.approx(0.1, rel=1e-7)
    assert number == 0.1


def test_all_tensors_are_read_together_and_no_number_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(tensor: torch.Tensor) -> list[float]:
        lengths.append(tensor.numel())
        return tensor.tolist()

    monkeypatch.setattr(_tensors, "transferred", counted)
    fetched([torch.ones(3), [1.0] * 5, None, torch.tensor(2.0), 9], LIKE)
    assert lengths == [4]
