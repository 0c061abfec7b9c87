"""What rules need that remember older gradients or weights: copies by parameter, and norms of layers of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._norms import JointNorms, subtract, tensor_norms
from .._tensors import as_dense_real, has_values, moved
from ..layers import Layer
from ..statistics import Gradients, Statistics, common_device
from .base import Rule
from .state import State, described

COPIES = "copies"
"""The entry of the state with a tensor for each parameter."""
MOST_ORDERS = 4
"""Most orders of tensors for which `NormsOfLayers` keeps indices."""


def refuse_shards(layers: Sequence[Layer], rule: Rule, remedy: str) -> None:
    """Raise a ValueError if parameters are sharded, whose statistic would be that of this process's part alone."""
    if any(shard is not None for layer in layers for shard in layer.shards):
        raise ValueError(f"{described(rule)} measures whole tensors, and the parameters are sharded: {remedy}")


def keys_of(layers: Sequence[Layer]) -> list[str]:
    """Return a name for each parameter's copy; it does not begin with an underscore, as a parameter's name may."""
    return [
        f"/{name}"
        for layer in layers
        for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
    ]


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which a tensor's copy is kept: float32, or float64 as it is."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def no_copies(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return zeros for the gradient of each parameter."""
    zeros: list[Tensor] = []
    for p in (p for layer in layers for p in layer.parameters):
        shape = (*p.shape, 2) if p.is_complex() else p.shape
        zeros.append(torch.zeros(shape, dtype=wide(p), device=p.device))
    return dict(zip(keys_of(layers), zeros, strict=True))


def weights_copied(layers: Sequence[Layer], keys: Sequence[str]) -> dict[str, Tensor]:
    """Return a copy of each parameter."""
    return dict(zip(keys, [p.detach().clone() for layer in layers for p in layer.parameters], strict=True))


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient with its zeros if it is sparse, and as real numbers.

    Example:
        >>> dense(torch.tensor([0.0, 2.0]).to_sparse())
        tensor([0., 2.])
    """
    own = gradient.detach()
    return as_dense_real(own if own.layout is torch.strided else own.to_dense())


def gradients_copied(gradients: Gradients, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of each gradient without the factor of a gradient scaler; zeros for a missing one.

    Args:
        gradients: This step's gradients.
        before: The copies of the step before, whose names and types are kept.
    """
    copies: list[Tensor] = []
    for gradient, old in zip(gradients.tensors, before.values(), strict=True):
        if gradient is None:
            copies.append(torch.zeros_like(old))
        else:
            copies.append(dense(gradient).to(old.dtype))
    scale: Any = 1.0 if gradients.scale is None else gradients.scale.to(torch.float64).reciprocal()
    if isinstance(scale, Tensor) and any(one.device != scale.device for one in copies):
        scaled = [one * moved(scale, one.device) for one in copies]
    else:
        scaled = list(torch._foreach_mul(copies, scale))
    return dict(zip(before, scaled, strict=True))


class NormsOfLayers:
    """Measures norms of layers from tensors, one for each parameter.

    Example:
        >>> norms = NormsOfLayers([Layer("", (torch.zeros(1), torch.zeros(1)))])
        >>> norms.of([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([5.], dtype=torch.float64)]
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._device, dtype = common_device(layers)
        self._zeros = torch.zeros(len(layers), dtype=dtype, device=self._device)
        self._owners = [number for number, layer in enumerate(layers) for _ in layer.parameters]
        self._index = torch.tensor(self._owners, dtype=torch.long, device=self._device)
        self._joint: dict[tuple[int, ...], JointNorms] = {}

    def of(self, *rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the norms of the layers for each row of tensors, with one measurement for all of them."""
        norms, order = tensor_norms([tensor for row in rows for tensor in row], self._device)
        key = tuple(order)
        if key not in self._joint:
            if len(self._joint) >= MOST_ORDERS:
                self._joint.clear()
            position_of, count = {tensor: at for at, tensor in enumerate(order)}, len(self._owners)
            entries = [
                (position_of[row * count + i], row, owner, 1.0)
                for row in range(len(rows))
                for i, owner in enumerate(self._owners)
            ]
            self._joint[key] = JointNorms(entries, len(rows), self._zeros)
        return list(self._joint[key].of(norms))

    def inner(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Return the inner products of the layers in two rows of tensors, accurate to 1e-6 of the norms' product.

        In float32 that holds for numbers between 1e-19 and 1e19, whose products neither vanish nor overflow.
        """
        sums: list[Tensor] = []
        for one, other in zip(first, second, strict=True):
            product = as_dense_real(one) * as_dense_real(other)
            sums.append(moved(product.sum(dtype=torch.promote_types(product.dtype, torch.float32)), self._device))
        return self._zeros.index_add(0, self._index, torch.stack(sums).to(self._zeros.dtype))


class RemembersTensors(Rule):
    """A rule whose state holds a copy of each parameter or gradient under `COPIES`."""

    compares_layers = False

    def renewed(self, layers: Sequence[Layer], device: torch.device, state: State, old_names: Sequence[str]) -> State:
        """Return the state for new layers; copies are carried over by the parameters' names, not by layers."""
        kept: dict[str, Tensor] = state.get(COPIES, {})
        rest = {name: value for name, value in state.items() if name != COPIES}
        result = super().renewed(layers, device, rest, old_names)
        copies = {
            key: moved(kept[key], fresh.device)
            if key in kept and kept[key].shape == fresh.shape and has_values(kept[key])
            else fresh
            for key, fresh in result[COPIES].items()
        }
        return {**result, COPIES: copies}


class RemembersGradients(RemembersTensors):
    """A rule that compares the gradients with those of the step before, of which its state holds a copy.

    The copies are kept in float32, or float64. A rule with further entries in its state adds them to those of `init`.

    Example:
        >>> class Steady(RemembersGradients):
        ...     '''f_l = ‖g_l(t − 1)‖ / ‖g_l(t) − g_l(t − 1)‖.'''
        ...     def factors(self, statistics, state):
        ...         previous, difference, new = self.compared(statistics, state)
        ...         return previous / difference, new
        >>> rule, layers = Steady(), [Layer("", (torch.zeros(2),))]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> for g in ([3.0, 4.0], [3.0, 6.0]):
        ...     before, statistics = state, Statistics(gradients=Gradients([torch.tensor(g)]))
        ...     factors, state = rule.factors(statistics, before)
        >>> factors, rule.gradient_inner(before, state)
        (tensor([2.5000], dtype=torch.float64), tensor([33.], dtype=torch.float64))
    """

    needs = ("gradients",)

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return gradients of 0 for the step before the first.

        Raises:
            ValueError: The parameters are sharded.
        """
        refuse_shards(layers, self, "use a rule that needs norms only, such as LayerMoment")
        return {COPIES: no_copies(layers), "_norms": NormsOfLayers(layers)}

    def compared(self, statistics: Statistics, state: State) -> tuple[Tensor, Tensor, State]:
        """Return `previous_norm` and `difference_norm`, and the state with the gradients of this step.

        They are ‖g_l(t − 1)‖, 0 at the first step, and ‖g_l(t) − g_l(t − 1)‖. A missing gradient counts as 0. At a step
        that a gradient scaler skips, `difference_norm` is NaN and the copies stay as they are.
        """
        before, skipped = state[COPIES], statistics.gradients.skipped
        now = gradients_copied(statistics.gradients, before)
        apart = subtract(list(before.values()), list(now.values()))
        previous, difference = state["_norms"].of(list(before.values()), apart)
        if skipped is not None:
            difference = torch.where(moved(skipped, difference.device) > 0, math.nan, difference)
            kept = {device: moved(skipped, device) > 0 for device in {one.device for one in now.values()}}
            now = {name: torch.where(kept[one.device], before[name], one) for name, one in now.items()}
        return previous, difference, {**state, COPIES: now}

    def gradient_inner(self, before: State, after: State) -> Tensor:
        """Return ⟨g_l(t), g_l(t − 1)⟩ of the states before and after `compared`: one pass, some operations a tensor.

        At a step that a gradient scaler skips both are the last gradients, so it is ‖g_l(t − 1)‖².
        """
        return after["_norms"].inner(list(before[COPIES].values()), list(after[COPIES].values()))


class RemembersWeights(RemembersTensors):
    """A rule that compares the weights with those at its first step, of which its state holds a copy.

    Example:
        >>> class Still(RemembersWeights):
        ...     '''f_l = 1 + ‖w_l − w_l(0)‖.'''
        ...     needs = ()
        ...     def factors(self, statistics, state):
        ...         state = self.begun(state)
        ...         return 1 + self.distance(state), state
        >>> weight = torch.tensor([3.0, 4.0])
        >>> rule, layers = Still(), [Layer("", (weight,))]
        >>> _, state = rule.factors(Statistics(), rule.init(layers, torch.device("cpu")))
        >>> _ = weight.copy_(torch.tensor([-4.0, 3.0]))
        >>> rule.factors(Statistics(), state)[0], rule.rotation(state)
        (tensor([8.0711], dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return a copy of the weights, which `begun` makes again at the first step.

        Raises:
            ValueError: The parameters are sharded.
        """
        refuse_shards(layers, self, "use a rule that needs norms only, such as LARS")
        copies = weights_copied(layers, keys_of(layers))
        return {COPIES: copies, "started": False, "_layers": tuple(layers), "_norms": NormsOfLayers(layers)}

    def begun(self, state: State) -> State:
        """Return the state with w_l(0): the weights at the first step, which may have been loaded since `init`."""
        if state["started"]:
            return state
        return {**state, COPIES: weights_copied(state["_layers"], list(state[COPIES])), "started": True}

    def distance(self, state: State) -> Tensor:
        """Return ‖w_l − w_l(0)‖."""
        (far,) = state["_norms"].of(subtract(list(state[COPIES].values()), self._weights(state)))
        return far

    def rotation(self, state: State) -> Tensor:
        """Return 1 − cos(w_l, w_l(0)); NaN where one of them is zero.

        1 − cos = (‖w − w(0)‖² − (‖w‖ − ‖w(0)‖)²) / (2 ‖w‖ ‖w(0)‖), which keeps the digits of a small turn
        """
        first, now = list(state[COPIES].values()), self._weights(state)
        before, after, far = state["_norms"].of(first, now, subtract(first, now))
        across = (far - (after - before).abs()) * (far + (after - before).abs())
        return across.clamp(min=0) / (2 * before * after)

    def _weights(self, state: State) -> list[Tensor]:
        return [p.detach() for layer in state["_layers"] for p in layer.parameters]
