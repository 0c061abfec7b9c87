"""Sums of gradients over an epoch, and the directionality ratios G and G′ that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import Layer
from .statistics import Gradients
from .tensors import as_dense_real, moved

Sums = dict[str, Any]
"""Empty, or `signed`, `absolute`, `received`: tensors by parameter, for a checkpoint to hold; and `iterations`."""

PARTS = ("signed", "absolute", "received")


class DirectionalitySums:
    """Accumulates Σ_j g_ij and Σ_j |g_ij| over the steps that count.

    G needs one buffer a parameter (Σ_j g_ij) and one number a parameter tensor (Σ_ij |g_ij|), G′ two buffers. They are
    float32, or float64 for float64 gradients, and exist from the first step that is added until they are dropped.

    Steps with a gradient that is not finite, steps that a gradient scaler skips and steps whose gradients are all zero
    do not count.

    Args:
        layers: The layers.
        each_weight: Whether Σ_j |g_ij| is kept for each weight (G′) or summed at once (G).
        sample: Number of weights of each layer that stand for it; None for all.
        measured: Which layers are summed; None for all. The others still tell whether a step counts.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        each_weight: bool,
        sample: int | None = None,
        measured: Sequence[bool] | None = None,
    ) -> None:
        self.each_weight = each_weight
        self.sample = sample
        self._layers = [layer.parameters for layer in layers]
        self._parameters = [p for layer in layers for p in layer.parameters]
        names = [
            name
            for layer in layers
            for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
        ]
        # A state's own entries that begin with an underscore are not saved; a parameter's name may begin with one.
        self._keys = [f"/{name}" for name in names]
        self._taken = [taken for layer in self._layers for taken in _shares(layer, sample)]
        inside = [True] * len(layers) if measured is None else measured
        self._measured = [flag for layer, flag in zip(self._layers, inside, strict=True) for _ in layer]

    @torch.no_grad()
    def add(self, sums: Sums, gradients: Gradients) -> Sums:
        """Return the sums with one step more; the buffers are changed in place.

        Args:
            sums: Those so far; empty before the first step.
            gradients: This step's.
        """
        every = [(i, _real(g)) for i, g in enumerate(gradients.tensors) if g is not None]
        if not every:
            return sums
        device = every[0][1].device
        totals: list[Tensor] = []
        if self.sample is None and not self.each_weight and all(self._measured):
            totals = _absolute_sums([g for _, g in every])
            size = torch.stack([moved(t, device) for t in totals]).sum()
        else:
            size = _size([g for _, g in every], device)
        present = [(i, self._some(i, g)) for i, g in every if self._measured[i]]
        if size.device.type == "cpu" and gradients.skipped is None:
            if not 0 < size.item() < math.inf:
                return sums
            counts = None
            scale: Any = 1.0 if gradients.scale is None else 1 / float(gradients.scale)
        else:
            counts = (size > 0) & (size < math.inf)
            if gradients.skipped is not None:
                counts &= moved(gradients.skipped, device) == 0
            scale = 1.0 if gradients.scale is None else gradients.scale.double().reciprocal()
        sums = sums or {**{part: {} for part in PARTS}, "iterations": torch.zeros((), dtype=torch.int64, device=device)}
        sums["iterations"] = moved(sums["iterations"], device) + (1 if counts is None else counts)
        for i, gradient in present:
            self._open(sums, i, gradient)
            key = self._keys[i]
            if counts is None:
                sums["received"][key] = True
            else:
                sums["received"][key] = sums["received"][key] | moved(counts, gradient.device)
        values = [gradient for _, gradient in present]
        self._accumulate(sums["signed"], present, values, scale, counts)
        if self.each_weight:
            for item in present:  # one at a time: together they would take the room of all parameters once more
                self._accumulate(sums["absolute"], [item], [item[1].abs()], scale, counts)
        else:
            totals = totals or _absolute_sums(values)
            self._accumulate(sums["absolute"], present, totals, scale, counts)
        return sums

    def ratios(self, sums: Sums) -> tuple[list[float], list[bool]]:
        """Return G or G′ of each layer, and which layers received a gradient. Waits for the device.

        Args:
            sums: Those of the epoch; may be empty.
        """
        ratios: list[float] = []
        received: list[bool] = []
        position = 0
        for layer in self._layers:
            numbers = range(position, position + len(layer))
            position += len(layer)
            keys = [self._keys[i] for i in numbers if sums and self._keys[i] in sums["signed"]]
            received.append(any(bool(sums["received"][key]) for key in keys))
            signed = [sums["signed"][key].double().abs() for key in keys]
            absolute = [sums["absolute"][key].double() for key in keys]
            if self.each_weight:
                count = sum(self._count(i) for i in numbers)
                terms = sum(float(torch.where(a > 0, s / a, 0.0).sum()) for s, a in zip(signed, absolute, strict=True))
                ratios.append(min(terms / count, 1.0) if count else 0.0)
            else:
                total = sum(map(float, absolute))
                ratios.append(min(sum(float(s.sum()) for s in signed) / total, 1.0) if total > 0 else 0.0)
        return ratios, received

    def _accumulate(
        self,
        buffers: dict[str, Tensor],
        present: Sequence[tuple[int, Tensor]],
        values: Sequence[Tensor],
        scale: Any,
        counts: Tensor | None,
    ) -> None:
        """Add `scale` times the values, or nothing where `counts` is false; the values need not be finite then."""
        into = [buffers[self._keys[i]] for i, _ in present]
        if counts is None:
            torch._foreach_add_(into, list(values), alpha=scale)
            return
        for buffer, value in zip(into, values, strict=True):
            factor = moved(scale, buffer.device) if isinstance(scale, Tensor) else scale
            counted = torch.where(moved(counts, buffer.device), value.to(buffer.dtype) * factor, 0)
            buffer.add_(counted.to(buffer.dtype))

    def _count(self, i: int) -> int:
        """Return how many numbers stand for a parameter."""
        taken = self._taken[i]
        return _numbers(self._parameters[i]) if taken is None else taken[0]

    def loaded(self, sums: Any) -> Sums:
        """Return a copy of saved sums.

        Raises:
            ValueError: They are not of this form, or of other parameters.
        """
        if sums == {}:
            return {}
        form = isinstance(sums, dict) and sorted(sums) == sorted([*PARTS, "iterations"])
        if not form or not all(isinstance(sums[part], dict) for part in PARTS):
            raise ValueError(f"the saved sums must hold {', '.join(PARTS)} by parameter, and iterations")
        if not isinstance(sums["iterations"], Tensor) or sums["iterations"].ndim:
            raise ValueError("the saved sums hold no number of iterations")
        copy: Sums = {**{part: {} for part in PARTS}, "iterations": sums["iterations"].clone()}
        for part in PARTS:
            if sums[part].keys() != sums["signed"].keys():
                raise ValueError(f"the saved sums are of different parameters in 'signed' and {part!r}")
            for key, buffer in sums[part].items():
                if key not in self._keys:
                    raise ValueError(f"the saved sums hold {key!r}, which is no parameter here; use the same model")
                if part == "received" and isinstance(buffer, bool):
                    copy[part][key] = buffer
                    continue
                whole = part == "signed" or (part == "absolute" and self.each_weight)
                wanted = self._shape(self._keys.index(key)) if whole else ()
                if not isinstance(buffer, Tensor) or buffer.shape != wanted:
                    found = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
                    raise ValueError(f"the saved sums of {key!r} have shape {found}, here {tuple(wanted)}; same rule?")
                copy[part][key] = buffer.detach().clone()
        return copy

    def _shape(self, i: int) -> tuple[int, ...]:
        parameter, taken = self._parameters[i], self._taken[i]
        if taken is not None:
            return (taken[0],)
        return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)

    def _open(self, sums: Sums, i: int, gradient: Tensor) -> None:
        """Make a parameter's buffers, or bring those of a file, or of a model that was moved, to its device."""
        key = self._keys[i]
        known = sums["signed"].get(key)
        if known is not None and known.shape == gradient.shape:
            if known.device != gradient.device:
                for part in PARTS:
                    buffer = sums[part][key]
                    sums[part][key] = moved(buffer, gradient.device) if isinstance(buffer, Tensor) else buffer
            return
        wide = torch.promote_types(gradient.dtype, torch.float32)
        sums["signed"][key] = torch.zeros_like(gradient, dtype=wide)
        sums["received"][key] = False
        sums["absolute"][key] = (
            torch.zeros_like(gradient, dtype=wide)
            if self.each_weight
            else torch.zeros((), dtype=torch.float64, device=gradient.device)
        )

    def _some(self, i: int, gradient: Tensor) -> Tensor:
        """Return the fixed weights that stand for the parameter."""
        taken, parameter = self._taken[i], self._parameters[i]
        if taken is None:
            return gradient
        if gradient.shape == parameter.shape and gradient.stride() != parameter.stride():
            # The positions are those in the parameter's memory.
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        count, stride = taken
        # The positions are computed anew: kept, they would take as much memory as the sums.
        positions = torch.arange(count, device=gradient.device).mul_(stride).remainder_(gradient.numel())
        dense = gradient if _dense(gradient) else gradient.contiguous()
        return dense.as_strided((gradient.numel(),), (1,)).index_select(0, positions)


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient that can be added up: repeated entries of a sparse one summed, complex ones as pairs."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    return as_dense_real(gradient)


def _absolute_sums(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return Σ|g| of each tensor.

    Summed in cascades, good to the last digits of float32, where a norm is to 1e-6 for thousands of numbers and 1e-4
    for millions; a temporary copy of each tensor is the price.
    """
    return [g.abs().sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]


def _size(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return about Σ|g| over all tensors: zero where all are, not finite where one is not; no square can overflow."""
    norms = torch._foreach_norm(list(gradients), 1)
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = [moved(norm, device).float() for norm in norms]
    return moved(torch.stack(list(norms)).float().sum(), device)


def _numbers(parameter: Tensor) -> int:
    """Return how many real numbers a parameter holds."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _shares(layer: Sequence[Tensor], sample: int | None) -> list[tuple[int, int] | None]:
    """Return for each parameter how many of its weights are taken, and by what step; None for all.

    Weight k · step mod n, for a step near n/φ (φ the golden ratio) without a common divisor: no weight twice, none of
    the channels or positions in a kernel left out.
    """
    total = sum(map(_numbers, layer))
    if sample is None or total <= sample:
        return [None] * len(layer)
    shares: list[tuple[int, int] | None] = []
    for numbers in map(_numbers, layer):
        step = max(1, round(numbers * (math.sqrt(5) - 1) / 2))
        while math.gcd(step, numbers) > 1:
            step += 1
        shares.append((min(numbers, max(1, round(sample * numbers / total))), step))
    return shares


def _dense(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory without gaps."""
    return tensor.is_contiguous() or (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        == tensor.numel()
    )


def buffer_bytes(sums: Mapping[str, Any]) -> int:
    """Return the bytes that sums hold."""
    tensors = (value for value in sums.values() if isinstance(value, Tensor))
    inner = (value for value in sums.values() if isinstance(value, dict))
    return sum(x.numel() * x.element_size() for x in tensors) + sum(map(buffer_bytes, inner))
