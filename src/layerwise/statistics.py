"""Per-layer norms and sums, computed where the parameters live, with a constant number of operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .layers import Layer


class Statistics:
    """What a rule is told about the layers at one step: what it asked for in `needs`, and no more.

    Every tensor but `counts` has shape `[n_layers]`, lives on the parameters' device and is float64 (float32 on devices
    without float64). Norms are 2-norms over all parameters of the layer together.

    Args:
        gradient_norm: ‖g_l‖ of the mini-batch gradient: after clipping and unscaling, before weight decay and before
            any factor; 0 for a layer without a gradient.
        weight_norm: ‖w_l‖.
        matrix_norm: ‖W_l‖ over the layer's parameters of two or more dimensions: its weight without its bias.
        normalisation_gain: Mean over channels of γ²/σ² for a normalisation layer (σ² its running variance, 1 if it
            keeps none), 1 for every other layer.
        decay_norm: ‖λ w_l‖, the norm of the weight-decay term, with each parameter's own λ.
        learning_rate: The layer's rate in its parameter group (the largest one, where a layer spans several groups).
        counts: Bool scalar: whether this is a step to count. Steps that a gradient scaler skips, steps with a
            gradient that is not finite and steps whose gradients are all zero are not.

    Raises:
        AttributeError: A statistic is read that was not asked for.
    """

    gradient_norm: Tensor
    weight_norm: Tensor
    matrix_norm: Tensor
    normalisation_gain: Tensor
    decay_norm: Tensor
    learning_rate: Tensor
    counts: Tensor

    def __init__(self, **statistics: Tensor) -> None:
        vars(self).update(statistics)

    def __getattr__(self, name: str) -> Any:  # only called for what is not there
        if name in NEEDS:
            raise AttributeError(f"the rule reads statistics.{name} without asking for it; add {name!r} to its needs")
        raise AttributeError(f"there is no statistic {name!r}; there are {', '.join(NEEDS)}")


NEEDS = tuple(Statistics.__annotations__)


class LayerStatistics:
    """Computes `Statistics` for fixed layers.

    Args:
        layers: The layers.
        needs: Names of the statistics to compute.

    Raises:
        ValueError: A name is not one of `NEEDS`.
    """

    def __init__(self, layers: Sequence[Layer], needs: Collection[str]) -> None:
        check_needs(needs)
        self.needs = frozenset(needs)
        self.layers = tuple(layers)
        self.count = len(layers)
        self.members = [p for layer in layers for p in layer.parameters]
        self.layer_of = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters}
        self.device, self.dtype = common_device(layers)
        self._zeros = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        self._indices: dict[str, tuple[list[Tensor], list[int] | None, Tensor]] = {}
        self._numbers: dict[str, tuple[list[float], Tensor]] = {}

    def moved_away(self) -> bool:
        """Tell whether the parameters have left the device on which the statistics are kept."""
        return self.members[0].device != self.device

    @torch.no_grad()
    def compute(self, groups: Sequence[Mapping[str, Any]], grad_scale: Tensor | None = None) -> Statistics:
        """Return this step's statistics.

        Args:
            groups: The optimizer's parameter groups.
            grad_scale: The factor by which a gradient scaler left the gradients multiplied, if it did.

        Returns:
            The statistics in `needs`.
        """
        needs, values = self.needs, {}
        if "gradient_norm" in needs or "counts" in needs:
            norms = self._gradient_norms(grad_scale)
            if "gradient_norm" in needs:
                values["gradient_norm"] = norms
            if "counts" in needs:
                total = norms.sum()  # not finite if any of them is not
                values["counts"] = (total > 0) & (total < torch.inf)
        if "weight_norm" in needs:
            values["weight_norm"] = self._norms("weight", self.members, self.members)
        if "matrix_norm" in needs:
            matrices = [p for p in self.members if p.ndim > 1]
            values["matrix_norm"] = self._norms("matrix", matrices, matrices)
        if "normalisation_gain" in needs:
            values["normalisation_gain"] = self._normalisation_gains()
        if "decay_norm" in needs:
            decay_of = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
            decayed = [p for p in self.members if decay_of[id(p)]]
            values["decay_norm"] = self._norms("decay", decayed, decayed, [decay_of[id(p)] for p in decayed])
        if "learning_rate" in needs:
            values["learning_rate"] = self._learning_rates(groups)
        return Statistics(**values)

    def _gradient_norms(self, grad_scale: Tensor | None) -> Tensor:
        owners = self.members
        gradients: list[Any] = [p.grad for p in owners]
        if any(map(is_, gradients, repeat(None))):
            owners = [p for p in owners if p.grad is not None]
            gradients = [p.grad for p in owners]
        norms = self._norms("gradient", gradients, owners)
        return norms if grad_scale is None else norms / moved(grad_scale, self.device).to(self.dtype)

    def _norms(
        self, kind: str, tensors: Sequence[Any], owners: list[Tensor], scales: Sequence[float] | None = None
    ) -> Tensor:
        """Return each layer's norm over the tensors that its parameters own; 0 where there is none."""
        if not tensors:
            return self._zeros.clone()
        norms, order = tensor_norms(tensors, self.device, self.dtype)
        if scales is not None:
            norms = norms * self._on_device("scales", [scales[i] for i in order or range(len(scales))])
        return self._zeros.index_add(0, self._index(kind, owners, order), norms.square_()).sqrt_()

    def _index(self, kind: str, owners: list[Tensor], order: list[int] | None) -> Tensor:
        """Return the layer of each owner, on the device; the copy there happens once per pattern of owners."""
        cached = self._indices.get(kind)
        if cached is None or cached[1] != order or not same_objects(cached[0], owners):
            index = torch.tensor(
                [self.layer_of[id(owners[i])] for i in order or range(len(owners))], device=self.device
            )
            cached = self._indices[kind] = (owners, order, index)
        return cached[2]

    def _normalisation_gains(self) -> Tensor:
        one = torch.ones((), dtype=self.dtype, device=self.device)
        gains: list[Tensor] = []
        for layer in self.layers:
            module: Any = layer.module
            weight: Any = getattr(module, "weight", None)
            variance: Any = getattr(module, "running_var", None)
            # A normalisation has an eps; under layers="parameter" its gain is that of the layer with the weight.
            if not hasattr(module, "eps") or all(weight is not p for p in layer.parameters):
                gains.append(one)
                continue
            square = moved(weight.detach(), self.device).to(self.dtype).square()
            if variance is not None:
                square = square / (moved(variance, self.device).to(self.dtype) + module.eps)
            gains.append(square.mean())
        return torch.stack(gains)

    def _learning_rates(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        rates: list[list[Any]] = [[] for _ in range(self.count)]
        for group in groups:
            for p in group["params"]:
                if id(p) in self.layer_of:
                    rates[self.layer_of[id(p)]].append(group["lr"])
        if any(isinstance(rate, Tensor) for layer in rates for rate in layer):
            vectors = [[torch.as_tensor(r, dtype=self.dtype, device=self.device).reshape(()) for r in q] for q in rates]
            return torch.stack([torch.stack(vector).amax() for vector in vectors])
        largest = [max(layer) for layer in rates]
        return self._on_device("rates", largest)

    def _on_device(self, kind: str, values: list[float]) -> Tensor:
        """Return numbers as a tensor; the copy to the device happens once for as long as they stay the same."""
        cached = self._numbers.get(kind)
        if cached is None or cached[0] != values:
            cached = self._numbers[kind] = (values, torch.tensor(values, dtype=self.dtype, device=self.device))
        return cached[1]


def check_needs(needs: Collection[str]) -> None:
    """Raise unless `needs` is a collection of names of statistics.

    Raises:
        TypeError: It is one string.
        ValueError: A name is unknown.
    """
    if isinstance(needs, str):
        raise TypeError(f"needs={needs!r} is one string; write needs = ({needs!r},)")
    if not isinstance(needs, Collection):
        raise TypeError(f"needs={needs!r} must be a tuple of names, such as ('gradient_norm',)")
    for name in needs:
        if name not in NEEDS:
            raise ValueError(f"needs holds {name!r}; allowed: {', '.join(map(repr, NEEDS))}")


def common_device(layers: Sequence[Layer]) -> tuple[torch.device, torch.dtype]:
    """Return the device of the first parameter and the widest floating type for statistics there."""
    device = layers[0].parameters[0].device
    return device, torch.float32 if device.type == "mps" else torch.float64


def tensor_norms(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[int] | None]:
    """Return the 2-norm of each tensor, kind by kind.

    One `_foreach_norm` for each kind (device, type) of tensor. Half precision is accumulated in float32, because the
    square of 300 overflows float16; a sparse tensor is coalesced first, because the norm of repeated entries is not
    the norm of their sum; a complex one is seen as pairs of reals.

    Args:
        tensors: Dense, sparse or complex tensors.
        device: Where the result goes.
        dtype: Its type.

    Returns:
        The norms, shape `[len(tensors)]`, and the position of each one's tensor; None if they are in order.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)], torch.device("cpu"), torch.float64)
        (tensor([5., 0.], dtype=torch.float64), None)
    """
    dense = list(tensors)
    kinds = {(tensor.device, tensor.dtype, tensor.layout) for tensor in dense}
    if any(layout is not torch.strided or dtype.is_complex for _, dtype, layout in kinds):
        dense = [as_dense_real(tensor) for tensor in tensors]
        kinds = {(tensor.device, tensor.dtype, tensor.layout) for tensor in dense}
    if len(kinds) == 1:
        return _norms_of_one_kind(dense, device, dtype), None
    parts: list[Tensor] = []
    order: list[int] = []
    for kind in sorted(kinds, key=str):
        positions = [i for i, tensor in enumerate(dense) if (tensor.device, tensor.dtype, tensor.layout) == kind]
        parts.append(_norms_of_one_kind([dense[i] for i in positions], device, dtype))
        order += positions
    return torch.cat(parts), order


def _norms_of_one_kind(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    wide = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else None
    return moved(torch.stack(torch._foreach_norm(tensors, 2, wide)), device).to(dtype)


def as_dense_real(tensor: Tensor) -> Tensor:
    """Return a tensor's values so that their 2-norm is the tensor's."""
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the very same objects."""
    return first is second or (len(first) == len(second) and all(map(is_, first, second)))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; only a copy to the CPU waits, lest its values be read before they arrive."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")
