"""Sums of gradients over an epoch, and the directionality ratios G and G′ that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .arguments import has_type
from .buffers import Buffers, number_count
from .layers import Layer
from .norms import absolute_sums
from .samples import samples_of
from .sharding import Sharing, sharing_of
from .statistics import Gradients
from .tensors import as_dense_real, local, moved

Sums = dict[str, Any]
"""Empty, or `signed`, `absolute`, `received`: tensors by parameter, for a checkpoint to hold; and `iterations`."""

PARTS = ("signed", "absolute", "received")
LARGEST = 2.0**100
"""Σ|g| of a step that counts is below this, so that 2²⁸ steps add up to what float32 can hold."""


class DirectionalitySums:
    """Accumulates Σ_j g_ij and Σ_j |g_ij| over the steps that count.

    G needs one buffer a parameter (Σ_j g_ij) and one number a parameter tensor (Σ_ij |g_ij|), G′ two buffers. They are
    float32, or float64 for float64 gradients, and exist from the first step that is added until they are dropped.

    Steps with a gradient that is not finite or beyond any training (Σ|g| of 2¹⁰⁰ ≈ 1e30), steps that a gradient scaler
    skips and steps whose gradients are all zero do not count.

    Where parameters are shared among processes, so are their buffers; a step and the end of an epoch take one
    collective each.

    Args:
        layers: The layers.
        each_weight: Whether Σ_j |g_ij| is kept for each weight (G′) or summed at once (G).
        sample: Number of weights of each layer that stand for it; None for all.
        measured: Which layers are summed; None for all. The others still tell whether a step counts.

    Raises:
        ValueError: A sample is asked for of parameters that are shared among processes.
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
        self._sizes = [len(layer.parameters) for layer in layers]
        self._parameters = [p for layer in layers for p in layer.parameters]
        names = [
            name
            for layer in layers
            for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
        ]
        # A state's own entries that begin with an underscore are not saved; a parameter's name may begin with one.
        self._keys = [f"/{name}" for name in names]
        pieces = [piece for layer in layers for piece in layer.pieces or [None] * len(layer.parameters)]
        self._pieces, self._sharing = pieces, sharing_of(pieces)
        if sample is not None and self._sharing is not None:
            raise ValueError(
                f"sample={sample!r}: the parameters are sharded, and which weights stand for a layer depends on the "
                "number of processes; leave sample out, the sums are sharded too"
            )
        self._samples = [taken for layer in layers for taken in samples_of(layer.whole(), sample)]
        self._counts = [
            number_count(whole) if taken is None else taken.count
            for whole, taken in zip((p for layer in layers for p in layer.whole()), self._samples, strict=True)
        ]
        self._buffers = Buffers(self._parameters, pieces, [None if s is None else s.count for s in self._samples])
        inside = [True] * len(layers) if measured is None else measured
        self._measured = [flag for size, flag in zip(self._sizes, inside, strict=True) for _ in range(size)]

    @torch.no_grad()
    def add(self, sums: Sums, gradients: Gradients) -> Sums:
        """Return the sums with one step more; the buffers are changed in place.

        Args:
            sums: Those so far; empty before the first step.
            gradients: This step's.
        """
        every = [(i, _real(g)) for i, g in enumerate(gradients.tensors) if g is not None]
        if not every and self._sharing is None:
            return sums
        device = every[0][1].device if every else local(self._parameters[0]).device
        totals: list[Tensor] | None = None
        received: Tensor | None = None
        if self._sharing is not None:
            joint, received = self._joined(every, device)
            size = joint.sum()
            totals = list(joint)
        elif self.sample is None and not self.each_weight and all(self._measured):
            totals = [torch.zeros(())] * len(self._keys)
            for (i, _), total in zip(every, absolute_sums([g for _, g in every]), strict=True):
                totals[i] = total
            size = torch.stack([moved(totals[i], device) for i, _ in every]).sum()
        else:
            size = _size([g for _, g in every], device)
        present = [
            (i, g if (sample := self._samples[i]) is None else sample.of(g, self._parameters[i]))
            for i, g in every
            if self._measured[i]
        ]
        if size.device.type == "cpu" and gradients.skipped is None:
            if not 0 < size.item() < LARGEST:
                return sums
            counts = None
            scale: Any = 1.0 if gradients.scale is None else 1 / float(gradients.scale)
        else:
            counts = (size > 0) & (size < LARGEST)
            if gradients.skipped is not None:
                counts &= moved(gradients.skipped, device) == 0
            scale = 1.0 if gradients.scale is None else gradients.scale.double().reciprocal()
        sums = sums or {**{part: {} for part in PARTS}, "iterations": torch.zeros((), dtype=torch.int64, device=device)}
        sums["iterations"] = moved(sums["iterations"], device) + (1 if counts is None else counts)
        elsewhere = self._elsewhere({i for i, _ in every})
        for i, gradient in [*present, *elsewhere]:
            self._open(sums, i, gradient)
            key = self._keys[i]
            arrived: Any = True if received is None else received[i] > 0
            if counts is not None:
                arrived = moved(counts, gradient.device) & arrived
            elif received is not None:
                arrived = bool(arrived)
            sums["received"][key] = sums["received"][key] | arrived
        values = [gradient for _, gradient in present]
        self._accumulate(sums["signed"], present, values, scale, counts)
        if self.each_weight:
            for item in present:  # one at a time: together they would take the room of all parameters once more
                self._accumulate(sums["absolute"], [item], [item[1].abs()], scale, counts)
        else:
            own = absolute_sums(values) if totals is None else [totals[i] for i, _ in present]
            others = [] if totals is None else [totals[i] for i, _ in elsewhere]
            self._accumulate(sums["absolute"], [*present, *elsewhere], own + others, scale, counts)
        return sums

    def ratios(self, sums: Sums) -> tuple[list[float], list[bool]]:
        """Return G or G′ of each layer, and which layers received a gradient. Waits for the device.

        Args:
            sums: Those of the epoch; may be empty.
        """
        found = [self._fraction(sums, i) for i in range(len(self._keys))]
        if self._sharing is not None:
            device = local(self._parameters[0]).device
            shares = torch.tensor([[above, flag] for above, _, flag in found], dtype=torch.float64, device=device)
            joint: Any = self._sharing.sum(shares.T.contiguous())
            above, flags = joint.tolist()
            found = [(x, below, flag > 0) for x, flag, (_, below, _) in zip(above, flags, found, strict=True)]
        ratios: list[float] = []
        received: list[bool] = []
        position = 0
        for size in self._sizes:
            parts = found[position : position + size]
            position += size
            below = sum(part[1] for part in parts)
            ratios.append(min(sum(part[0] for part in parts) / below, 1.0) if below > 0 else 0.0)
            received.append(any(part[2] for part in parts))
        return ratios, received

    def _fraction(self, sums: Sums, i: int) -> tuple[float, float, bool]:
        """Return what a parameter adds above and below the fraction bar, and whether it received a gradient.

        The first and the last are those of the piece that this process holds, the second of the whole parameter.
        """
        key = self._keys[i]
        below = float(self._counts[i]) if self.each_weight else 0.0
        if not sums or key not in sums["signed"]:
            return 0.0, below, False
        signed, absolute = local(sums["signed"][key]).double().abs(), local(sums["absolute"][key]).double()
        received = bool(sums["received"][key])
        if not self.each_weight:
            return float(signed.sum()), float(absolute), received
        return float(torch.where(absolute > 0, signed / absolute, 0.0).sum()), below, received

    def _elsewhere(self, held: Collection[int]) -> list[tuple[int, Tensor]]:
        """Return the shared parameters of which only other processes may have a gradient, with one of that form.

        Their sums go on here too: a process that left a step out would find another G, and choose other layers.

        Args:
            held: The parameters of which this process has a gradient.
        """
        return [
            (i, as_dense_real(local(p.detach())))
            for i, (p, piece) in enumerate(zip(self._parameters, self._pieces, strict=True))
            if piece is not None and i not in held and self._measured[i] and p.requires_grad
        ]

    def _joined(self, every: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return Σ|g| of each parameter over all processes, and how many hold a part of its gradient."""
        shares = torch.zeros(2, len(self._keys), dtype=torch.float64, device=device)
        for (i, gradient), total in zip(every, absolute_sums([g for _, g in every]), strict=True):
            shares[0, i] = total
            shares[1, i] = float(gradient.numel() > 0)
        joint, received = cast(Sharing, self._sharing).sum(shares)
        return joint, received

    def _accumulate(
        self,
        buffers: dict[str, Tensor],
        present: Sequence[tuple[int, Tensor]],
        values: Sequence[Tensor],
        scale: Any,
        counts: Tensor | None,
    ) -> None:
        """Add `scale` times the values, or nothing where `counts` is false; the values need not be finite then."""
        into = [local(buffers[self._keys[i]]) for i, _ in present]
        if counts is None:
            torch._foreach_add_(into, list(values), alpha=scale)
            return
        for buffer, value in zip(into, values, strict=True):
            factor = moved(scale, buffer.device) if isinstance(scale, Tensor) else scale
            counted = torch.where(moved(counts, buffer.device), value.to(buffer.dtype) * factor, 0)
            buffer.add_(counted.to(buffer.dtype))

    def loaded(self, sums: Any) -> Sums:
        """Return a copy of saved sums, shared among processes as the parameters are now.

        Raises:
            ValueError: They are not of this form, or of other parameters.
        """
        if sums == {}:
            return {}
        if has_type(sums, dict):  # a distributed checkpoint leaves out what is empty
            empty: Sums = {part: {} for part in PARTS}
            sums = {**empty, **sums}
        form = has_type(sums, dict) and sorted(sums) == sorted([*PARTS, "iterations"])
        if not form or not all(has_type(sums[part], dict) for part in PARTS):
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
                copy[part][key] = self._buffers.loaded(self._keys.index(key), buffer, key, scalar=not whole)
        return copy

    def _open(self, sums: Sums, i: int, gradient: Tensor) -> None:
        """Make a parameter's buffers, or bring those of a file, or of a model that was moved, to its device."""
        key = self._keys[i]
        known = sums["signed"].get(key)
        if known is not None and local(known).shape == gradient.shape:
            if known.device != gradient.device:
                for part in PARTS:
                    buffer = sums[part][key]
                    sums[part][key] = moved(buffer, gradient.device) if isinstance(buffer, Tensor) else buffer
            return
        sums["signed"][key] = self._buffers.zeros(i, gradient)
        sums["received"][key] = False
        sums["absolute"][key] = (
            self._buffers.zeros(i, gradient)
            if self.each_weight
            else torch.zeros((), dtype=torch.float64, device=gradient.device)
        )


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient that can be added up: repeated entries of a sparse one summed, complex ones as pairs."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    return as_dense_real(gradient)


def _size(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return about Σ|g| over all tensors: zero where all are, not finite where one is not; no square can overflow.

    Half precision is summed in float32, since float16 ends at 65,504.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(gradient.dtype, []).append(gradient)
    norms: list[Tensor] = []
    for dtype, same in kinds.items():
        norms += torch._foreach_norm(same, 1, torch.float32 if dtype in (torch.float16, torch.bfloat16) else None)
    return torch.stack([moved(norm, device) for norm in norms]).sum()


def buffer_bytes(sums: Mapping[str, Any]) -> int:
    """Return the bytes that sums hold."""
    tensors = (value for value in sums.values() if isinstance(value, Tensor))
    inner = (value for value in sums.values() if has_type(value, dict))
    return sum(x.numel() * x.element_size() for x in tensors) + sum(map(buffer_bytes, inner))
