"""Mean and standard deviation of the numbers in a layer's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._norms import NARROW, chunks
from ._tensors import as_dense_real


@dataclass(frozen=True)
class Moments:
    """How many numbers parts hold, their means, and the sums of their squared distances from these; one row a part.

    Example:
        >>> parts = Moments(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]))  # 0, 2 and 4
        >>> parts.joined(torch.tensor([0, 0]), torch.zeros(1))
        Moments(count=tensor([3.]), mean=tensor([2.]), squares=tensor([8.]))
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def joined(self, owners: Tensor, like: Tensor) -> Moments:
        """Return the moments of wholes from those of their parts, as Chan, Golub and LeVeque (1979) join them.

        Squares of means are never subtracted, so a mean far above the deviation costs no digits.

        Args:
            owners: The whole to which each part belongs.
            like: Zeros, one for each whole.
        """
        count = like.index_add(0, owners, self.count)
        mean = like.index_add(0, owners, self.count * self.mean) / count.clamp(min=1)
        apart = self.mean - mean.index_select(0, owners)
        return Moments(count, mean, like.index_add(0, owners, self.squares + self.count * apart.square()))

    def shares(self) -> list[Tensor]:
        """Return rows of numbers that add up over processes."""
        total = self.count * self.mean
        return [self.count, total, total * self.mean, self.squares]

    @classmethod
    def of_sums(cls, count: Tensor, total: Tensor, square: Tensor, squares: Tensor) -> Moments:
        """Return the moments of which these are the summed `shares`.

        One collective cannot subtract the common mean first, so the deviation is accurate to 2e-8 of the mean.
        """
        mean = total / count.clamp(min=1)
        return cls(count, mean, squares + (square - total * mean).clamp(min=0))


def tensor_moments(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[Tensor], list[Tensor]]:
    """Return the position, the size, the mean and the standard deviation (ddof 0) of each part of some tensors.

    A part is a tensor; on the CPU, which computes in float64, a piece of 2 MB. Accelerators take one kernel a tensor,
    or for narrow types two a piece, which is made wide first.

    Example:
        >>> tensor_moments([torch.tensor([1.0, 3.0]), torch.zeros(0)])
        ([0], [2], [tensor(2., dtype=torch.float64)], [tensor(1., dtype=torch.float64)])
    """
    owners: list[int] = []
    sizes: list[int] = []
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    for i, tensor in enumerate(map(as_dense_real, tensors)):
        for part in chunks(tensor) if tensor.is_cpu or tensor.dtype in NARROW else [tensor]:
            if part.numel():
                deviation, mean = _moments(part)
                owners.append(i)
                sizes.append(part.numel())
                means.append(mean)
                deviations.append(deviation)
    return owners, sizes, means, deviations


def _moments(part: Tensor) -> tuple[Tensor, Tensor]:
    functions: Any = torch
    if not part.is_cpu:
        return functions.std_mean(part.float() if part.dtype in NARROW else part, correction=0)
    # PyTorch's own goes through the numbers one by one on the CPU, with a division for each.
    own = part.to(torch.float64, copy=True, memory_format=torch.contiguous_format).view(-1)
    mean = own.mean()
    own -= mean
    return (own.dot(own) / len(own)).sqrt(), mean
