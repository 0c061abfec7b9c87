"""Norms of tensors, and of layers made of them, with few operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import sqrt
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ._tensors import FLOAT8, WEIGHTS, as_dense_real, holds_weights, is_quantised, moved

_kind = attrgetter("device", "dtype", "layout")
SHORT, SHORTEST_ROW = 512, 256
"""The longest and the shortest row. A norm in float32 is accurate to 1e-6: each of 8 lanes adds 64 squares."""
MIDDLE = 2**13
"""The largest number of elements for which a norm in float64 is faster than norms of rows."""
CHUNK, CHUNK_ON_DEVICE = 2**18, 2**26
"""The most elements that are copied at once, where a tensor has gaps or a narrow type."""
MOST_ROWS = 2**19
"""The most rows whose squares float64 adds with an error below 1e-12."""
FEW = 8
"""The most tensors for which reading norms one by one takes no more operations than stacking them."""
NARROW = FLOAT8 | {torch.float16, torch.bfloat16}
"""Types whose squares are computed in float32, because the square of 300 overflows float16."""
ORDINARY = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Types for which PyTorch computes the norms of many tensors in one operation."""


_PLAIN = {Tensor, torch.nn.Parameter}


def tensor_norms(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int] | None]:
    """Return the 2-norms of tensors, at least one, and the position of each norm's tensor (None if they are in order).

    It takes one `_foreach_norm` for each kind (device, type) of tensor. A norm is accurate to 1e-6, of float64 tensors
    to 1e-12, for any size, stride and type. Accelerators sum in a tree. The CPU sums sequentially, so float32 sums are
    kept short and added in float64. This takes a few more operations for each large tensor, and copies of at most
    `CHUNK` elements if it has gaps or a narrow type.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.device("cpu"))
        (tensor([5., 0.]), None)
    """
    dense = list(tensors)
    kinds = set(map(_kind, dense))
    if not _all_ordinary(dense, kinds):
        dense = list(map(_measurable, dense))
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
    """Return what `tensor_norms` does as Python numbers, for tensors on the CPU.

    Example:
        >>> tensor_norm_numbers([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        ([5.0, 0.0], None)
    """
    kinds = set(map(_kind, tensors)) if len(tensors) <= FEW else ()
    if len(kinds) == 1 and _all_ordinary(tensors, kinds):
        return list(map(Tensor.item, _each_norm(tensors))), None
    norms, order = tensor_norms(tensors, torch.device("cpu"))
    every: Any = norms
    return every.tolist(), order


def _all_ordinary(tensors: Sequence[Tensor], kinds: Iterable[tuple[torch.device, torch.dtype, torch.layout]]) -> bool:
    """Return whether PyTorch computes the norms of all these tensors in one operation for each kind."""
    for _, dtype, layout in kinds:
        if dtype not in ORDINARY or layout is not torch.strided:
            return False
    classes = set(map(type, tensors))
    return classes <= _PLAIN or all(one.dequantize is Tensor.dequantize for one in classes)


def _measurable(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor of the same norm; an empty one for integers, which count as no weights."""
    if not holds_weights(tensor):
        return torch.zeros(0, device=tensor.device)
    if is_quantised(tensor):
        return _each_norm([tensor.dequantize()])[0]
    return _norms_of_rows(tensor) if tensor.dtype in FLOAT8 and tensor.numel() else as_dense_real(tensor)


def subtract(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors whose norms are those of `before - after`; `before` is overwritten.

    Example:
        >>> subtract([torch.tensor([3.0])], [torch.tensor([1.0])])
        [tensor([2.])]
    """
    result = list(before)
    plain: list[int] = []
    for i, new in enumerate(after):
        if new.dtype in WEIGHTS - FLOAT8 and not is_quantised(new):
            plain.append(i)
        else:
            result[i] = _odd_difference(before[i], new)
    if plain:
        torch._foreach_sub_([result[i] for i in plain], [after[i] for i in plain])
    return result


def _odd_difference(before: Tensor, after: Tensor) -> Tensor:
    if not holds_weights(after) or not holds_weights(before):
        return after
    if is_quantised(after):
        return _each_norm([before.dequantize() - after.dequantize()])[0]
    pairs = zip(_chunks(before), _chunks(after), strict=True)
    return torch.stack([_each_norm([old.float() - new.float()])[0] for old, new in pairs])


def _norms_of_one_kind(tensors: list[Tensor], device: torch.device) -> Tensor:
    parts = _norms_by_length(tensors)
    # The types of the parts differ: stacking them together would convert the norms one by one.
    stacked = [torch.stack(norms) for _, norms in parts]
    if len(stacked) == 1:
        return moved(stacked[0], device)
    order = [position for positions, _ in parts for position in positions]
    places = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    return moved(torch.cat([part.double() for part in stacked]).index_select(0, places), device)


def _each_norm(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the norms of tensors of one kind."""
    (positions, norms), *others = _norms_by_length(tensors)
    if not others:
        return norms
    found = dict(zip(positions, norms, strict=True))
    for positions, norms in others:
        found.update(zip(positions, norms, strict=True))
    return [found[i] for i in range(len(tensors))]


def _norms_by_length(tensors: Sequence[Tensor]) -> list[tuple[Sequence[int], list[Tensor]]]:
    """Return positions and norms, first of the tensors that PyTorch's own norm measures to 1e-6, then of the others."""
    wide = torch.float32 if tensors[0].dtype in NARROW else None
    every = range(len(tensors))
    long: list[int] = []
    for i, tensor in enumerate(tensors):
        if tensor.numel() > SHORT or not tensor.is_contiguous():
            long.append(i)
    if not long or not tensors[0].is_cpu:
        return [(every, list(torch._foreach_norm(list(tensors), 2, wide)))]
    parts = [_norms_of_rows(t) if t.numel() > MIDDLE else t for t in map(tensors.__getitem__, long)]
    found: list[tuple[Sequence[int], list[Tensor]]] = [(long, list(torch._foreach_norm(parts, 2, torch.float64)))]
    if len(long) < len(tensors):
        others = set(long)
        short = [i for i in every if i not in others]
        found.insert(0, (short, list(torch._foreach_norm([tensors[i] for i in short], 2, wide))))
    return found


def absolute_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return Σ|x| of each dense real tensor, on its own device, accurate to 1e-6.

    Example:
        >>> absolute_sums([torch.tensor([3.0, -4.0])])
        [tensor(7.)]
    """
    return list(map(_absolute_sum, tensors))


def _absolute_sum(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if not tensor.is_cpu:
        return tensor.abs().sum(dtype=wide)
    # PyTorch's sum is a cascade; its 1-norm adds one number after another.
    parts = [chunk.abs().sum(dtype=wide) for chunk in _chunks(tensor)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dtype=torch.float64)


def _norms_of_rows(tensor: Tensor) -> Tensor:
    """Return a vector with the same norm as a large tensor on the CPU: the norms of its rows.

    PyTorch's norm of a whole tensor runs on one thread and sums millions of squares sequentially, which costs float32
    five digits. The norms of rows run on all threads, and their sums are short.
    """
    narrow = tensor.dtype in NARROW
    if tensor.is_contiguous() and not narrow:
        norms = _norms_of_flat_rows(tensor.view(-1))
    else:
        # In memory order, so that a transposed or channels_last tensor has no gaps.
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        dense = tensor.is_contiguous()
        if dense and not narrow:
            return _norms_of_rows(tensor)
        wide = torch.float32 if narrow else tensor.dtype
        copies = (chunk.to(wide).contiguous().view(-1) for chunk in _chunks(tensor.view(-1) if dense else tensor))
        norms = torch.cat(list(map(_norms_of_flat_rows, copies)))
    return norms if norms.numel() <= MOST_ROWS else _norms_of_rows(norms.double())


def _norms_of_flat_rows(flat: Tensor) -> Tensor:
    linalg: Any = torch.linalg
    length = _row_length(flat.numel())
    rest = flat.numel() % length
    if not rest:
        return linalg.vector_norm(flat.view(-1, length), dim=1)
    rows = linalg.vector_norm(flat[:-rest].view(-1, length), dim=1)
    return torch.cat([rows, linalg.vector_norm(flat[-rest:]).view(1)])


@cache
def _row_length(count: int) -> int:
    """Return the longest row length that divides this count, or `SHORT`, which leaves a remainder."""
    return next((length for length in range(SHORT, SHORTEST_ROW - 1, -1) if count % length == 0), SHORT)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor of at most `CHUNK` elements each, `CHUNK_ON_DEVICE` on an accelerator."""
    if tensor.numel() <= (CHUNK if tensor.is_cpu else CHUNK_ON_DEVICE):
        yield tensor
        return
    longest = max(range(tensor.ndim), key=tensor.size)
    for half in tensor.tensor_split(2, longest):
        yield from _chunks(half)


class JointNorms:
    """Norms of layers from those of their tensors: `‖l‖ = sqrt(Σ_i (c_i ‖t_i‖)²)` over the layer's tensors.

    Args:
        entries: The position of a norm, the row and the layer to which it belongs, and c. A tensor with c = 0 is left
            out, so that it may hold non-finite numbers.
        rows: How many norms each layer has.
        like: Zeros, one for each layer, of the device and type of the result.
    """

    def __init__(self, entries: Sequence[tuple[int, int, int, float]], rows: int, like: Tensor) -> None:
        layers = len(like)
        self._rows, self._layers, self._like = rows, layers, like
        self._kept = [(at, row * layers + layer, scale) for at, row, layer, scale in entries if scale]
        self._copied: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self._in_order = [at for at, *_ in self._kept] == list(range(len(entries)))

    def _on_device(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return zeros, indices, positions and scales; copied to the device once, since such a copy waits for it."""
        if self._copied is None:
            like = self._like
            positions, index, scales = ([entry[i] for entry in self._kept] for i in range(3))
            self._copied = (
                like.repeat(self._rows),
                torch.tensor(index, dtype=torch.long, device=like.device),
                None if self._in_order else torch.tensor(positions, dtype=torch.long, device=like.device),
                torch.tensor(scales, dtype=like.dtype, device=like.device) if any(c != 1 for c in scales) else None,
            )
        return self._copied

    def of(self, norms: Tensor) -> Sequence[Tensor]:
        """Return the norms of layers, a tensor for each row, from those of tensors."""
        zeros, index, positions, scales = self._on_device()
        norms = norms.to(zeros.dtype)
        if positions is not None:
            norms = norms.index_select(0, positions)
        if scales is not None:
            norms = norms * scales
        sums = zeros.index_add(0, index, norms.square()).sqrt_()
        return (sums,) if self._rows == 1 else sums.view(self._rows, -1).unbind()

    def of_numbers(self, norms: Sequence[float]) -> Sequence[list[float]]:
        """Return the same as Python numbers."""
        count = self._layers
        squares = [0.0] * (self._rows * count)
        for position, output, scale in self._kept:
            norm = norms[position] * scale
            squares[output] += norm * norm
        roots = list(map(sqrt, squares))
        if self._rows == 1:
            return (roots,)
        return [roots[i : i + count] for i in range(0, len(roots), count)]
