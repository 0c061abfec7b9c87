"""Norms of tensors, and of layers made of them, with few operations; means and deviations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from math import sqrt
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from ._tensors import FLOAT8, WEIGHTS, as_dense_real, holds_weights, is_quantised, moved

_kind, _dequantize = attrgetter("device", "dtype", "layout"), attrgetter("dequantize")
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


def tensor_norms(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Sequence[int]]:
    """Return the 2-norms of tensors, at least one, and the position of each norm's tensor.

    It takes one `_foreach_norm` for each kind (device, type) of tensor, on the CPU two. A norm is accurate to 1e-6, of
    float64 tensors to 1e-12, for any size, stride and type. Accelerators sum in a tree. The CPU sums sequentially, so
    float32 sums are kept short and added in float64. This takes a few more operations for each large tensor, and copies
    of at most `CHUNK` elements if it has gaps or a narrow type.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.device("cpu"))
        (tensor([5., 0.]), range(0, 2))
    """
    parts, order = _norms(tensors)
    # The types of the parts differ: stacking them together would convert the norms one by one.
    stacked = [moved(torch.stack(list(part)), device) for part in parts]
    return stacked[0] if len(stacked) == 1 else torch.cat(stacked), order


def tensor_norm_numbers(tensors: Sequence[Tensor]) -> tuple[list[float], Sequence[int]]:
    """Return what `tensor_norms` does as Python numbers, for tensors on the CPU.

    Example:
        >>> tensor_norm_numbers([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        ([5.0, 0.0], range(0, 2))
    """
    if len(tensors) > FEW:
        norms, order = tensor_norms(tensors, torch.device("cpu"))
        every: Any = norms
        return every.tolist(), order
    parts, order = _norms(tensors)
    return list(map(Tensor.item, chain.from_iterable(parts))), order


def _norms(tensors: Sequence[Tensor]) -> tuple[list[Sequence[Tensor]], Sequence[int]]:
    """Return the norms of tensors in parts of one type each, and the position of each norm's tensor."""
    dense = list(tensors)
    kinds = set(map(_kind, dense))
    ordinary = set(map(_dequantize, set(map(type, dense)))) == {Tensor.dequantize}
    for _, dtype, layout in kinds:
        ordinary = ordinary and dtype in ORDINARY and layout is torch.strided
    if not ordinary:
        dense = list(map(_measurable, dense))
        kinds = set(map(_kind, dense))
    if len(kinds) == 1:
        return _norms_of_one_kind(dense)
    parts: list[Sequence[Tensor]] = []
    order: list[int] = []
    for kind in sorted(kinds, key=str):
        positions = [i for i, tensor in enumerate(dense) if _kind(tensor) == kind]
        own_parts, own_order = _norms_of_one_kind([dense[i] for i in positions])
        parts += own_parts
        order += [positions[i] for i in own_order]
    return parts, order


def _measurable(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor of the same norm; an empty one for integers, which count as no weights."""
    if not holds_weights(tensor):
        return torch.zeros(0, device=tensor.device)
    if is_quantised(tensor):
        return tensor_norms([tensor.dequantize()], tensor.device)[0]
    return _norms_of_rows(tensor) if tensor.dtype in FLOAT8 else as_dense_real(tensor)


def _norms_of_one_kind(tensors: list[Tensor]) -> tuple[list[Sequence[Tensor]], Sequence[int]]:
    """Return what `_norms` does; on the CPU the tensors that PyTorch's own norm does not measure to 1e-6 come first."""
    wide = torch.float32 if tensors[0].dtype in NARROW else None
    long: list[int] = []
    if tensors[0].is_cpu:
        for i, tensor in enumerate(tensors):
            if tensor.numel() > SHORT or not tensor.is_contiguous():
                long.append(i)
    if not long:
        return [torch._foreach_norm(tensors, 2, wide)], range(len(tensors))
    in_rows = [_norms_of_rows(t) if t.numel() > MIDDLE else t for t in map(tensors.__getitem__, long)]
    parts: list[Sequence[Tensor]] = [torch._foreach_norm(in_rows, 2, torch.float64)]
    short = sorted(set(range(len(tensors))).difference(long))
    if short:
        parts.append(torch._foreach_norm([tensors[i] for i in short], 2, wide))
    return parts, [*long, *short]


def subtract(before: Sequence[Tensor], after: Sequence[Tensor], *, in_place: bool = False) -> list[Tensor]:
    """Return tensors whose norms are those of `before - after`; `in_place` overwrites `before`.

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
    old, new = [before[i] for i in plain], [after[i] for i in plain]
    if plain and in_place:
        torch._foreach_sub_(old, new)
    elif plain:
        for i, change in zip(plain, cast(Any, torch._foreach_sub(old, new)), strict=True):
            result[i] = change
    return result


def _odd_difference(before: Tensor, after: Tensor) -> Tensor:
    if not holds_weights(after) or not holds_weights(before):
        return after
    if is_quantised(after):
        pairs = [(before.dequantize(), after.dequantize())]
    else:
        pairs = ((old.float(), new.float()) for old, new in zip(_chunks(before), _chunks(after), strict=True))
    return torch.cat([tensor_norms([old - new], old.device)[0] for old, new in pairs])


def absolute_sum(tensor: Tensor) -> Tensor:
    """Return Σ|x| of a dense real tensor, on its own device, accurate to 1e-6.

    Example:
        >>> absolute_sum(torch.tensor([3.0, -4.0]))
        tensor(7.)
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if not tensor.is_cpu:
        return tensor.abs().sum(dtype=wide)
    # PyTorch's sum is a cascade; its 1-norm adds one number after another.
    parts = [chunk.abs().sum(dtype=wide) for chunk in _chunks(tensor)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dtype=torch.float64)


def row_norms(tensor: Tensor, dimension: int) -> Tensor:
    """Return the 2-norm of each row of a dense tensor of two or more dimensions: of each index of a dimension.

    It is as accurate as `tensor_norms`. An accelerator takes one launch. The CPU measures long rows in pieces. It
    copies tensors whose rows have gaps, and narrow types in parts of at most `CHUNK` elements or one row.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 0)
        tensor([5., 2.])
    """
    dense = as_dense_real(tensor)
    if dimension or not dense.is_contiguous():
        # In memory order, so that a channels_last tensor has no gaps.
        dense = dense.movedim(dimension, 0)
        dense = dense.permute(0, *sorted(range(1, dense.ndim), key=dense.stride, reverse=True))
    rows = dense.flatten(1)
    if not rows.is_cpu:
        return _norms_along(rows, 1)
    rows = rows.contiguous()
    if rows.dtype in NARROW and rows.numel() > CHUNK:
        return torch.cat(list(map(_norms_of_each, rows.tensor_split(-(-rows.numel() // CHUNK)))))
    return _norms_of_each(rows)


def _norms_of_each(rows: Tensor) -> Tensor:
    """Return the norms of the rows of a matrix on the CPU."""
    size = rows.shape[1]
    if size <= SHORT:
        return _norms_along(rows, 1)
    length = _row_length(size)
    whole = size - size % length
    norms = _norms_along(rows[:, :whole].view(len(rows), whole // length, length), 2)
    if whole < size:
        norms = torch.cat([norms, _norms_along(rows[:, whole:], 1)[:, None]], 1)
    return _norms_along(norms.double(), 1)


def _norms_along(tensor: Tensor, dimension: int) -> Tensor:
    linalg: Any = torch.linalg
    return linalg.vector_norm(tensor, dim=dimension, dtype=torch.float32 if tensor.dtype in NARROW else None)


def _norms_of_rows(tensor: Tensor) -> Tensor:
    """Return a vector with the same norm as a large tensor on the CPU: the norms of its rows.

    PyTorch's norm of a whole tensor runs on one thread and sums millions of squares sequentially, which costs float32
    five digits. The norms of rows run on all threads, and their sums are short.
    """
    if not tensor.is_contiguous():
        # In memory order, so that a transposed or channels_last tensor has no gaps.
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    if flat.is_contiguous() and flat.dtype not in NARROW:
        norms = _norms_of_flat_rows(flat)
    else:
        wide = torch.float32 if flat.dtype in NARROW else flat.dtype
        copies = (chunk.to(wide).contiguous().view(-1) for chunk in _chunks(flat))
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
        self._rows, self._layers, self._like = rows, len(like), like
        self._kept = [(at, row * self._layers + layer, scale) for at, row, layer, scale in entries if scale]
        self._in_order = [at for at, *_ in self._kept] == list(range(len(entries)))

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Zeros, indices, positions and scales; copied to the device once, since such a copy waits for it."""
        like = self._like
        positions, index, scales = ([entry[i] for entry in self._kept] for i in range(3))
        return (
            like.repeat(self._rows),
            torch.tensor(index, dtype=torch.long, device=like.device),
            None if self._in_order else torch.tensor(positions, dtype=torch.long, device=like.device),
            torch.tensor(scales, dtype=like.dtype, device=like.device) if any(c != 1 for c in scales) else None,
        )

    def of(self, norms: Tensor) -> Sequence[Tensor]:
        """Return the norms of layers, a tensor for each row, from those of tensors."""
        zeros, index, positions, scales = self._on_device
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
        return (roots,) if self._rows == 1 else [roots[i : i + count] for i in range(0, len(roots), count)]


# --- Moments ----------------------------------------------------------------------------------------------------------


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
        for part in _chunks(tensor) if tensor.is_cpu or tensor.dtype in NARROW else [tensor]:
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
