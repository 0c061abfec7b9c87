"""Rows of parameters that have a factor each: `layers="unit"`.

A layer stays one parameter, since names and Python numbers for each row would cost more than the step: ResNet-50 has
27,560 rows. The statistics of all rows are one tensor, and so are the factors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .._norms import row_norms, tensor_norms
from .._tensors import FLOAT8, is_quantised, local, moved
from .._writes import HALF, Factor
from ..apply import Factors, Step
from ..layers import Layer, inputs_first
from ..rules.base import Rule, finite_or_one
from ..rules.state import described
from ..statistics import OF_ROWS, Groups, LayerStatistics, Statistics


def check_units(rule: Rule, split: object) -> None:
    """Raise unless a rule's factors may be those of rows.

    Raises:
        ValueError: The message says why and what to use.
    """
    if split is not None:
        raise ValueError("layers='unit' gives each row a factor, and split= joins rows; leave one of them out")
    if not rule.takes_units():
        raise ValueError(
            f"layers='unit' needs a rule whose factor is one formula of the {', '.join(OF_ROWS)} of the same unit, and "
            f"{described(rule)} is none; use layers='parameter', or a rule such as AGC, LayerAdaptive or UpdateFloor, "
            "also in chain and bounds"
        )


def with_units(layer: Layer) -> Layer:
    """Return the layer of one parameter with `dimension` set to that of its output rows.

    Excluded layers and parameters of fewer than two dimensions are returned as they are.

    Raises:
        ValueError: The rows of this parameter cannot be measured.
    """
    (parameter,), module = layer.parameters, layer.module
    if not layer.included:
        return layer
    reason = None
    if module is None and parameter.ndim > 1:
        raise ValueError(
            f"layers='unit': only its module says which dimension of {layer.name!r} its outputs are; pass the model"
        )
    if any(layer.shards) or local(parameter) is not parameter:
        reason = "is sharded, and its rows are not measured across processes"
    elif is_quantised(parameter) or parameter.dtype in FLOAT8:
        reason = f"is a quantised {type(parameter).__name__} of {parameter.dtype}, whose rows are not measured"
    elif parameter.ndim > 1 and inputs_first(module) and getattr(module, "groups", 1) > 1:
        reason = f"belongs to a transposed convolution of {cast(Any, module).groups} groups, whose outputs are not rows"
    if reason is not None:
        raise ValueError(
            f"layers='unit': {layer.name!r} {reason}; pass layers='parameter', or exclude=[{layer.name!r}]"
        )
    return replace(layer, dimension=int(inputs_first(module))) if parameter.ndim > 1 else layer


class UnitStatistics(LayerStatistics):
    """Computes the statistics of units: of the rows of layers with a `dimension`, and of other layers as wholes.

    Excluded layers have no units. Tensors have shape `[n_units]`, layer by layer. Rows take one operation for each
    parameter and norm.
    """

    def __init__(self, layers: Sequence[Layer], needs: Collection[str]) -> None:
        super().__init__(layers, needs)
        included = [i for i, layer in enumerate(layers) if layer.included]
        self._wholes = [i for i in included if layers[i].dimension is None]
        self._rows = {i: dimension for i in included if (dimension := layers[i].dimension) is not None}
        self.counts = [int(layer.included) for layer in layers]
        for i, dimension in self._rows.items():
            self.counts[i] = self.members[i].shape[dimension]
        self.count = sum(self.counts)
        self._zeros = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        self._count_of = torch.tensor(self.counts, device=self.device)
        self._owner_of = self._spread(torch.arange(len(layers), device=self.device))

    def _spread(self, of_members: Tensor) -> Tensor:
        return of_members.repeat_interleave(self._count_of, output_size=self.count)

    def check_dense(self) -> None:
        """Raise if a gradient has no rows."""
        for i in self._rows:
            gradient = self.members[i].grad
            if gradient is not None and gradient.layout is not torch.strided:
                name = self.layers[i].name
                raise ValueError(
                    f"layers='unit': the gradient of {name!r} is sparse, and units are rows of a dense one; use "
                    f"sparse=False in its module, or exclude=[{name!r}]"
                )

    @torch.no_grad()
    def compute(self, groups: Groups, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Statistics:
        """Return this step's statistics before it is taken."""
        values: dict[str, Any] = {}
        if "gradient_norm" in self.needs:
            norms = self._unit_norms([p.grad for p in self.members])
            values["gradient_norm"] = norms if grad_scale is None else norms / moved(grad_scale, self.device)
        if "weight_norm" in self.needs:
            values["weight_norm"] = self._unit_norms(self.members)
        return Statistics(**values)

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the squared norms of the units of tensors, one for each of `members` or None."""
        return self._unit_norms(tensors).square() if tensors else self._zeros

    def norms(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the norms of units, one row for each result of `squares`."""
        return torch.stack(list(squares)).sqrt()

    def _unit_norms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        parts = _split(self._zeros, self.counts)
        wholes = [i for i in self._wholes if tensors[i] is not None]
        if wholes:
            norms, order = tensor_norms([cast(Tensor, tensors[i]) for i in wholes], self.device)
            for at, norm in zip(order, _split(norms, 1), strict=True):
                parts[wholes[at]] = norm
        for i, dimension in self._rows.items():
            tensor = tensors[i]
            if tensor is not None:
                parts[i] = moved(row_norms(tensor, dimension), self.device)
        return torch.cat(parts).to(self.dtype)

    def means(self, of_units: Tensor) -> Tensor:
        """Return the mean of each layer's units; 1 for a layer without any."""
        sums = of_units.new_zeros(len(self.counts)).index_add_(0, self._owner_of, of_units)
        return torch.where(self._count_of > 0, sums / self._count_of, 1.0)

    def owners(self, chosen: Tensor) -> list[int]:
        """Return the numbers of the layers of which units are chosen; waits for the device."""
        owner_of: Any = self._owner_of
        return owner_of[chosen].unique_consecutive().tolist()


def _split(tensor: Any, sizes: Any) -> list[Tensor]:
    return list(tensor.split(sizes))


class UnitFactors(Factors):
    """One step's factors of units; the factor of a layer is the mean of those of its units.

    On the CPU, where reading waits for nothing, only layers with another factor than 1 are multiplied.

    Args:
        raw: What the rule returned, shape `[n_units]`.
        statistics: Says which layer each unit belongs to.
    """

    def __init__(self, raw: Tensor, statistics: UnitStatistics) -> None:
        self._units, self._statistics = finite_or_one(raw), statistics
        self._included, self._mask, self.numbers = (), None, None
        self._changed: Sequence[int] = [i for i, count in enumerate(statistics.counts) if count]
        if raw.device.type == "cpu":
            self._changed = statistics.owners(self._units != 1)
        self.neutral = not self._changed

    @property
    def tensor(self) -> Tensor:
        """The factors of layers, on the parameters' device."""
        return self._statistics.means(self._units)

    def read(self) -> list[float]:
        """Return the factors of layers; waits for the device."""
        self._raw = self.tensor  # anew each time: a replayed CUDA graph writes other factors into the same tensor
        return self._read()

    def of_layers(self) -> dict[int, Tensor]:
        """Return the factors by layer's number, shaped to broadcast over the parameter.

        On the CPU, layers whose factors are all 1 are left out.
        """
        statistics, pieces = self._statistics, dict[torch.dtype, list[Tensor]]()
        result: dict[int, Tensor] = {}
        for i in self._changed:
            p, dimension = statistics.members[i], statistics.layers[i].dimension
            # Half precision would round the factor.
            dtype = torch.float32 if p.dtype in HALF else p.dtype.to_real()
            if dtype not in pieces:
                pieces[dtype] = _split(self._units.to(dtype), statistics.counts)
            shape = [-1 if axis == dimension else 1 for axis in range(p.ndim)]
            result[i] = moved(pieces[dtype][i].view(shape), p.device)
        return result

    def of_members(self) -> list[Factor]:
        """Return the factors of each member; for one that `of_layers` leaves out 1, on accelerators as a tensor."""
        by_layer, one = self.of_layers(), 1.0 if self._units.is_cpu else self._units.new_ones(())
        return [by_layer.get(i, one) for i in range(len(self._statistics.members))]


class UnitStep(Step):
    """A step in which the rows of parameters have factors of their own."""

    def scaled(self) -> list[tuple[Tensor, Factor]]:
        """Return the parameters of which a row may have another factor than 1, with these factors."""
        by_layer, layer_of = cast(UnitFactors, self.factors).of_layers(), self.partition.layer_of
        every: list[Tensor] = [p for group in self.view.param_groups for p in group["params"]]
        return [(p, by_layer[layer_of[id(p)]]) for p in every if layer_of.get(id(p)) in by_layer]
