"""Norms of tensors, and of layers out of them, with a constant number of operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import sqrt
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .tensors import as_dense_real, moved

_kind = attrgetter("device", "dtype", "layout")
LARGE = 2**19
"""Numbers from which a tensor on the CPU is cut into rows."""
FEW = 8
"""Tensors up to which reading their norms one by one takes no more operations than to stack them and go on."""
SHORTEST_ROW, LONGEST_ROW = 256, 4096


def tensor_norms(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int] | None]:
    """Return the 2-norm of each tensor, kind by kind.

    One `_foreach_norm` for each kind (device, type) of tensor. Half precision is accumulated in float32, because the
    square of 300 overflows float16; a sparse tensor is coalesced first, because the norm of repeated entries is not
    the norm of their sum; a complex one is seen as pairs of reals. On the CPU one operation more for each large tensor
    shares it out among the threads.

    Args:
        tensors: Dense, sparse or complex tensors, at least one.
        device: Where the result goes.

    Returns:
        The norms, shape `[len(tensors)]`, of their own or the widest type, and the position of each one's tensor; None
        if they are in order.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.device("cpu"))
        (tensor([5., 0.]), None)
    """
    dense = list(tensors)
    kinds = set(map(_kind, dense))
    if any(layout is not torch.strided or dtype.is_complex for _, dtype, layout in kinds):
        dense = [as_dense_real(tensor) for tensor in tensors]
        kinds = set(map(_kind, dense))
    if len(kinds) == 1:
        return _norms_of_one_kind(dense, device), None
    parts: list[Tensor] = []
    order: list[int] = []
    for kind in sorted(kinds, key=str):
        positions = [i for i, tensor in enumerate(dense) if _kind(tensor) == kind]
        parts.append(_norms_of_one_kind([dense[i] for i in positions], device))
        order += positions
    return torch.cat(parts), order


def tensor_norm_numbers(tensors: Sequence[Tensor]) -> tuple[list[float], list[int] | None]:
    """Return the same for tensors on the CPU, in plain numbers.

    Args:
        tensors: As for `tensor_norms`.

    Example:
        >>> tensor_norm_numbers([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        ([5.0, 0.0], None)
    """
    if len(tensors) <= FEW and len(set(map(_kind, tensors))) == 1 and not _is_special(tensors[0]):
        return list(map(Tensor.item, _each_norm(list(tensors)))), None
    norms, order = tensor_norms(tensors, torch.device("cpu"))
    every: Any = norms
    return every.tolist(), order


def _is_special(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_complex()


def _norms_of_one_kind(tensors: list[Tensor], device: torch.device) -> Tensor:
    return moved(torch.stack(_each_norm(tensors)), device)


def _each_norm(tensors: list[Tensor]) -> list[Tensor]:
    """Return the norms of tensors of one kind."""
    wide = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else None
    if tensors[0].is_cpu:
        tensors = [_norms_of_rows(tensor, wide) if tensor.numel() >= LARGE else tensor for tensor in tensors]
    return list(torch._foreach_norm(tensors, 2, wide))


def _norms_of_rows(tensor: Tensor, wide: torch.dtype | None) -> Tensor:
    """Return the norms of parts of a large tensor, a vector of the same norm.

    Torch's norm of a whole tensor runs on one thread and adds millions of squares up one after another, which costs
    float32 five digits; the norms of rows run on all threads, and their sums are short.
    """
    length = _row_length(tensor.numel())
    if length and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    if not length or not tensor.is_contiguous():
        return tensor
    linalg: Any = torch.linalg
    return linalg.vector_norm(tensor.view(-1, length), dim=1, dtype=wide)


@cache
def _row_length(count: int) -> int:
    """Return the longest row in which that many numbers can be cut evenly, or 0."""
    return next((length for length in range(LONGEST_ROW, SHORTEST_ROW - 1, -1) if count % length == 0), 0)


class JointNorms:
    """The norms of layers out of those of their tensors: `‖l‖ = sqrt(Σ_i (c_i ‖t_i‖)²)` over the layer's tensors.

    Args:
        layers: The layer of each tensor.
        scales: c of each tensor; a tensor with c = 0 is left out, so that it may hold what is not finite.
        like: The layers' zeros: their number, their device, their type.
    """

    def __init__(self, layers: Sequence[int], scales: Sequence[float], like: Tensor) -> None:
        self._zeros, self._count = like, len(like)
        self._kept = [(i, layer, scale) for i, (layer, scale) in enumerate(zip(layers, scales, strict=True)) if scale]
        # Copied to the device here, once: such a copy waits for it.
        self._index = torch.tensor([layer for _, layer, _ in self._kept], dtype=torch.long, device=like.device)
        self._positions: Tensor | None = None
        self._scales: Tensor | None = None
        if len(self._kept) < len(layers):
            self._positions = torch.tensor([i for i, _, _ in self._kept], dtype=torch.long, device=like.device)
        if any(scale != 1 for _, _, scale in self._kept):
            self._scales = torch.tensor([c for _, _, c in self._kept], dtype=like.dtype, device=like.device)

    def of(self, norms: Tensor) -> Tensor:
        """Return the layers' norms from those of the tensors."""
        norms = norms.to(self._zeros.dtype)
        if self._positions is not None:
            norms = norms.index_select(0, self._positions)
        if self._scales is not None:
            norms = norms * self._scales
        return self._zeros.index_add(0, self._index, norms.square()).sqrt_()

    def of_numbers(self, norms: Sequence[float]) -> list[float]:
        """Return the same in plain numbers."""
        squares = [0.0] * self._count
        for position, layer, scale in self._kept:
            norm = norms[position] * scale
            squares[layer] += norm * norm
        return list(map(sqrt, squares))
