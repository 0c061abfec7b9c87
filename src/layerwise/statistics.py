"""What a rule may ask for, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ._arguments import has_type
from ._norms import JointNorms, tensor_norm_numbers, tensor_norms
from ._tensors import as_dense_real, has_values, local, moved, same_objects
from .layers import Layer
from .sharding import Sharing, find_shards, is_absent, settled_gradient, sharing_of


@dataclass(frozen=True)
class Gradients:
    """The mini-batch gradients themselves, as they arrived.

    Args:
        tensors: Of each parameter of each layer, in order; None where there is none. Of a sharded
            parameter, this process's shard.
        scale: The factor by which a gradient scaler left them multiplied, if it did.
        skipped: Above zero when the gradient scaler lets the optimizer skip this step, if it has one.
    """

    tensors: Sequence[Tensor | None]
    scale: Tensor | None = None
    skipped: Tensor | None = None


class Statistics:
    """The statistics of the layers that a rule gets at one step: those in its `needs`, and no others.

    Every tensor but `counts` and the gradients has shape `[n_layers]`, lives on the parameters' device and is float64
    (float32 on devices without float64). Norms are 2-norms over all parameters of the layer together.

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
        gradients: The gradients, which a rule must not change.

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
    gradients: Gradients

    def __init__(self, **statistics: Any) -> None:
        vars(self).update(statistics)

    def __getattr__(self, name: str) -> Any:  # only called for what is not there
        if name in NEEDS:
            raise AttributeError(f"the rule reads statistics.{name} without asking for it; add {name!r} to its needs")
        raise AttributeError(f"there is no statistic {name!r}; there are {', '.join(NEEDS)}")


NEEDS = tuple(Statistics.__annotations__)
NOTHING = Statistics()
"""The statistics for a rule that needs none at this step."""


def check_needs(needs: Collection[str]) -> None:
    """Raise unless `needs` is a collection of names of statistics.

    Raises:
        TypeError: It is one string.
        ValueError: A name is unknown.
    """
    if isinstance(needs, str):
        raise TypeError(f"needs={needs!r} is one string; write needs = ({needs!r},)")
    if not has_type(needs, Collection):
        raise TypeError(f"needs={needs!r} must be a tuple of names, such as ('gradient_norm',)")
    for name in needs:
        if name not in NEEDS:
            raise ValueError(f"needs holds {name!r}; allowed: {', '.join(map(repr, NEEDS))}")


def common_device(layers: Sequence[Layer]) -> tuple[torch.device, torch.dtype]:
    """Return the device of the first parameter and the widest floating type for statistics there."""
    device = layers[0].parameters[0].device
    return device, torch.float32 if device.type == "mps" else torch.float64


# --- Gains of normalisation layers -----------------------------------------------------------------------------------


def check_alike(layers: Sequence[Layer], needs: Collection[str]) -> None:
    """Raise if processes would find other gains each, from running variances of their own batches.

    Raises:
        ValueError: A rule asks for gains, several processes train, and a batch normalisation is not synchronised.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if "normalisation_gain" not in needs or not several or torch.distributed.get_world_size() == 1:
        return
    for layer in layers:
        module: Any = layer.module
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        if batch and module.running_var is not None and not any(layer.shards):
            raise ValueError(
                f"layer {layer.name!r} keeps a running variance of its own in each process, so the processes would "
                "find other factors each and drift apart; use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
            )


def gain_shares(layers: Sequence[Layer], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each parameter adds to the mean of γ²/σ² over its layer's channels, and which layers have one.

    Args:
        layers: The layers. Those whose module is a normalisation (it has an eps) and that hold its weight γ have a
            gain; σ² is the running variance plus eps, and 1 for normalisations that keep none.
        like: A tensor of the type and on the device of the result.

    Returns:
        The shares, one for each parameter of each layer in order (of γ only this process's channels count), and a Bool
        tensor, one for each layer.
    """
    shares = like.new_zeros(sum(len(layer.parameters) for layer in layers))
    has_gain = torch.zeros(len(layers), dtype=torch.bool, device=like.device)
    position = 0
    for number, layer in enumerate(layers):
        module: Any = layer.module
        weight: Any = getattr(module, "weight", None)
        for i, parameter in enumerate(layer.parameters):
            # Under layers="parameter" the gain is that of the layer with the weight.
            if hasattr(module, "eps") and parameter is weight:
                shares[position + i] = _gain_share(layer, i, like.dtype)
                has_gain[number] = True
        position += len(layer.parameters)
    return shares, has_gain


def _gain_share(layer: Layer, i: int, dtype: torch.dtype) -> Tensor:
    module: Any = layer.module
    weight, shard = layer.parameters[i], layer.shards[i]
    variance: Tensor | None = getattr(module, "running_var", None)
    gains = local(weight.detach()).to(dtype).square()
    if variance is not None:
        own = variance if shard is None else local(shard.of(variance, weight))
        variance = moved(own, gains.device)
        gains = gains / (variance.to(dtype) + module.eps)
    return gains.sum() / (weight.numel() if shard is None else shard.shape.numel())


# --- Measuring -------------------------------------------------------------------------------------------------------

WEIGHT_NORMS = frozenset({"weight_norm", "matrix_norm", "decay_norm"})
NORMS = WEIGHT_NORMS | {"gradient_norm"}
AS_NUMBERS = NORMS | {"learning_rate"}
"""What `LayerStatistics.numbers` can return."""
MOST_INDICES = 64
"""Patterns of missing gradients that are kept; a mixture of experts has another one at almost every step."""
Groups = Sequence[Mapping[str, Any]]
_Norms = TypeVar("_Norms", Tensor, list[float])
_requires_grad = attrgetter("requires_grad")


class LayerStatistics:
    """Computes `Statistics` for fixed layers.

    Where parameters are shared among processes, each computes its share and one collective a step joins them. `paused`
    then says of each layer whether a process that holds a part of it took no part in the step.

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
        self.shards = [shard for layer in layers for shard in layer.shards]
        self.sharing = sharing_of(self.shards)
        self.paused: Tensor | None = None
        self._zeros = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._scales: dict[str, tuple[list[float], Tensor]] = {}
        self._joint: dict[str, tuple[list[Tensor], list[int] | None, list[float] | None, JointNorms]] = {}
        self._rates: tuple[list[float], Tensor] | None = None
        self._grouped: tuple[list[int], list[int]] = ([], [])

    def moved_away(self) -> bool:
        """Tell whether the parameters have left the device on which the statistics are kept."""
        return self.members[0].device != self.device

    @torch.no_grad()
    def compute(self, groups: Groups, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Statistics:
        """Return this step's statistics.

        Args:
            groups: The optimizer's parameter groups.
            grad_scale: The factor by which a gradient scaler left the gradients multiplied, if it did.
            found_inf: Above zero when a gradient scaler found them not finite.

        Returns:
            The statistics in `needs`.
        """
        needs = self.needs
        # BackMatching's gains are no norms; so few rules ask for them that they go the way of the shared ones.
        alone = self.sharing is None and "normalisation_gain" not in needs
        values: dict[str, Any] = self._norms(groups) if alone else self._sums(groups)
        if "gradients" in needs:
            gradients = [p.grad if self.sharing is None else settled_gradient(p) for p in self.members]
            values["gradients"] = Gradients(gradients, grad_scale, found_inf)
        if "gradient_norm" in values and grad_scale is not None:
            values["gradient_norm"] = values["gradient_norm"] / moved(grad_scale, self.device).to(self.dtype)
        if "counts" in needs:
            total = values["gradient_norm"].sum()  # not finite if any of them is not
            values["counts"] = (total > 0) & (total < torch.inf)
            if found_inf is not None:  # clipping by value makes numbers of infinities
                values["counts"] &= moved(found_inf, self.device) == 0
            if "gradient_norm" not in needs:
                del values["gradient_norm"]
        if "learning_rate" in needs:
            values["learning_rate"] = self._learning_rates(groups)
        return Statistics(**values)

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return this process's share of the squared norms of tensors that belong to the parameters, for `norms`.

        Args:
            tensors: One for each of `members`, such as its gradient; None where there is none.
        """
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        result = torch.zeros(len(self.members), dtype=self.dtype, device=self.device)
        if not present or is_absent():
            return result
        norms, order = tensor_norms([local(t) for t in tensors if t is not None], self.device)
        positions = present if order is None else [present[i] for i in order]
        squares = norms.to(self.dtype).square()
        return result.index_copy_(0, self._index(positions), squares)

    def norms(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the norms of layers, shape `[len(squares), n_layers]`, with one collective for all of them.

        Args:
            squares: What `squares` returned.
        """
        return self._layer_sums(squares).sqrt_()

    def _layer_sums(self, rows: Sequence[Tensor]) -> Tensor:
        shares = torch.stack(list(rows))
        if self.sharing is not None:
            shares = self.sharing.sum(shares)
        layers = self._index([self.layer_of[id(p)] for p in self.members])
        return self._zeros.repeat(len(rows), 1).index_add_(1, layers, shares)

    def _index(self, positions: Sequence[int]) -> Tensor:
        """Return positions on the device; copied there once, because that waits for it."""
        key = tuple(positions)
        if key not in self._indices:
            if len(self._indices) >= MOST_INDICES:
                self._indices.clear()
            self._indices[key] = torch.tensor(key, dtype=torch.long, device=self.device)
        return self._indices[key]

    def _norms(self, groups: Groups) -> dict[str, Tensor]:
        """Return the norms in `needs` when this process holds all of every parameter."""
        needs = self.needs
        values: dict[str, Tensor] = {}
        if "gradient_norm" in needs or "counts" in needs:
            parts = self._gradient_parts(partial(tensor_norms, device=self.device))
            values["gradient_norm"] = self._zeros.clone() if parts is None else parts[1].of(parts[0])
        if needs & WEIGHT_NORMS:
            norms, order = tensor_norms(self.members, self.device)
            for name in needs & WEIGHT_NORMS:
                values[name] = self._weights_joint(name, order, groups).of(norms)
        return values

    def _sums(self, groups: Groups) -> dict[str, Tensor]:
        """Return the norms and gains in `needs`, out of sums over processes: one collective for all of them."""
        needs = self.needs
        rows: dict[str, Tensor] = {}
        has_gain: Tensor | None = None
        if "gradient_norm" in needs or "counts" in needs:
            rows["gradient_norm"] = self.squares(list(map(settled_gradient, self.members)))
        if needs & WEIGHT_NORMS:
            weights = self.squares(self.members)
            for name in sorted(needs & WEIGHT_NORMS):
                scales = self._weight_scales(name, groups)
                rows[name] = weights
                if scales is not None:  # what is left out may hold what is not finite
                    squares = self._scale_tensor(name, scales).square()
                    rows[name] = torch.where(squares > 0, weights * squares, 0)
        if "normalisation_gain" in needs:
            rows["normalisation_gain"], has_gain = gain_shares(self.layers, self._zeros)
        if not rows:
            return {}
        sums = self._layer_sums([*rows.values(), self._zeros.new_zeros(len(self.members))])
        self.paused = None if self.sharing is None else sums[-1].isnan()
        values = dict(zip(rows, sums, strict=False))
        for name in values.keys() & NORMS:
            values[name] = values[name].sqrt()
        if has_gain is not None:
            values["normalisation_gain"] = torch.where(has_gain, values["normalisation_gain"], 1.0)
        return values

    def numbers(self, groups: Groups, grad_scale: Tensor | None = None) -> dict[str, list[float]]:
        """Return the statistics in `needs` as plain numbers, one a layer; only those in `AS_NUMBERS`, and unshared.

        On the CPU, where reading a value waits for nothing, a few operations on Python's numbers cost less than the
        small tensor operations of `compute`.

        Args:
            groups: As for `compute`.
            grad_scale: As for `compute`.
        """
        needs = self.needs
        values: dict[str, list[float]] = {}
        if "gradient_norm" in needs:
            parts = self._gradient_parts(tensor_norm_numbers)
            norms = [0.0] * self.count if parts is None else parts[1].of_numbers(parts[0])
            values["gradient_norm"] = norms if grad_scale is None else [norm / float(grad_scale) for norm in norms]
        if needs & WEIGHT_NORMS:
            with torch.no_grad():
                numbers, order = tensor_norm_numbers(self.members)
            for name in needs & WEIGHT_NORMS:
                values[name] = self._weights_joint(name, order, groups).of_numbers(numbers)
        if "learning_rate" in needs:
            values["learning_rate"] = [max(map(_number, rates)) for rates in self._rates_of(groups)]
        return values

    def _gradient_parts(
        self, norms_of: Callable[[list[Tensor]], tuple[_Norms, list[int] | None]]
    ) -> tuple[_Norms, JointNorms] | None:
        """Return the norms of the gradients and the way to those of the layers; None if there is no gradient."""
        owners = self.members
        gradients: list[Any] = [p.grad for p in owners]
        if any(map(is_, gradients, repeat(None))):
            owners = [p for p in owners if p.grad is not None]
            gradients = [p.grad for p in owners]
        if not gradients:
            return None
        if any(map(_requires_grad, gradients)):  # of backward(create_graph=True)
            gradients = [gradient.detach() for gradient in gradients]
        norms, order = norms_of(gradients)
        return norms, self._joint_norms("gradient_norm", owners, order, None)

    def _weights_joint(self, name: str, order: list[int] | None, groups: Groups) -> JointNorms:
        return self._joint_norms(name, self.members, order, self._weight_scales(name, groups))

    def _weight_scales(self, name: str, groups: Groups) -> list[float] | None:
        """Return by what each parameter is multiplied in a norm over the weights; None for 1."""
        if name == "matrix_norm":
            return [float(p.ndim > 1) for layer in self.layers for p in layer.whole()]
        if name == "decay_norm":
            decays = [_number(group.get("weight_decay", 0)) for group in groups]
            return [decays[number] for number in self._group_numbers(groups)]
        return None

    def _group_numbers(self, groups: Groups) -> list[int]:
        """Return the number of each member's group; found anew when the groups hold other numbers of parameters."""
        sizes = [len(group["params"]) for group in groups]
        if self._grouped[0] != sizes:
            group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
            self._grouped = (sizes, [group_of[id(p)] for p in self.members])
        return self._grouped[1]

    def _scale_tensor(self, name: str, scales: list[float]) -> Tensor:
        known = self._scales.get(name)
        if known is None or known[0] != scales:
            known = (scales, torch.tensor(scales, dtype=self.dtype, device=self.device))
            self._scales[name] = known
        return known[1]

    def _joint_norms(
        self, name: str, owners: list[Tensor], order: list[int] | None, scales: list[float] | None
    ) -> JointNorms:
        """Return the way from the norms of the owners' tensors to those of the layers, kept for as long as it holds."""
        known = self._joint.get(name)
        if known is None or known[1] != order or known[2] != scales or not same_objects(known[0], owners):
            positions = order or range(len(owners))
            joint = JointNorms(
                [self.layer_of[id(owners[i])] for i in positions],
                [1.0 if scales is None else scales[i] for i in positions],
                self._zeros,
            )
            known = self._joint[name] = (owners, order, scales, joint)
        return known[3]

    def _rates_of(self, groups: Groups) -> list[list[Any]]:
        """Return the rates of each layer's parameters."""
        rates: list[list[Any]] = [[] for _ in range(self.count)]
        for p, number in zip(self.members, self._group_numbers(groups), strict=True):
            rates[self.layer_of[id(p)]].append(groups[number]["lr"])
        return rates

    def _learning_rates(self, groups: Groups) -> Tensor:
        rates = self._rates_of(groups)
        if any(isinstance(rate, Tensor) for layer in rates for rate in layer):
            vectors = [[torch.as_tensor(r, dtype=self.dtype, device=self.device).reshape(()) for r in q] for q in rates]
            return torch.stack([torch.stack(vector).amax() for vector in vectors])
        largest = [max(layer) for layer in rates]
        if self._rates is None or self._rates[0] != largest:  # copying them to the device waits for it
            self._rates = (largest, torch.tensor(largest, dtype=self.dtype, device=self.device))
        return self._rates[1]


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


# --- Non-finite gradients --------------------------------------------------------------------------------------------

OnNonfinite = Literal["ignore", "raise"]
MOST_NAMED = 5


class FiniteGradients:
    """Counts the steps of one adapter, and raises at one with a gradient that is NaN or infinite.

    It reads max |g| of each parameter, which is finite for any finite gradient, where a norm may overflow. That reads
    the gradients once more, waits for the device, and takes one collective where parameters are shared among processes,
    all of which raise then, also for a parameter that only one of them holds.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([1e38, 1e38])  # its norm is beyond float32, the gradient is not
        >>> finite = FiniteGradients()
        >>> finite.look_at([Layer("head", (weight,), ("head.weight",))])
        >>> finite.check()
        >>> weight.grad[1] = torch.nan
        >>> finite.check()
        Traceback (most recent call last):
        FloatingPointError: step 2: the gradient of layer 'head' is not finite (head.weight), so no step was taken...
    """

    def __init__(self) -> None:
        self.steps = 0
        self.look_at([])

    def look_at(self, layers: Sequence[Layer], others: Mapping[str, Tensor] | None = None, model: Any = None) -> None:
        """Look at other parameters from the next step on.

        Args:
            layers: The layers, excluded ones among them.
            others: The optimizer's parameters that are in no layer, by name.
            model: The model, which knows how FSDP1 has shared them among processes.
        """
        none = [Layer("(in no layer)", tuple(others.values()), tuple(others))] if others else []
        self._layers = [*layers, *none]
        self._parameters = [p for layer in self._layers for p in layer.parameters]
        shards = find_shards(self._parameters, model)
        self._sharing = sharing_of([shards.get(id(p)) for p in self._parameters], flag=True)

    @torch.no_grad()
    def check(self, found_inf: Tensor | None = None) -> None:
        """Raise if a gradient is not finite, else count the step.

        Args:
            found_inf: There when a gradient scaler looks after this step, and lets the optimizer skip it where needed.

        Raises:
            FloatingPointError: A gradient is not finite; nothing has been changed.
        """
        if found_inf is None and self._parameters:
            broken, elsewhere = _broken(self._parameters, self._sharing)
            if broken or elsewhere:
                raise FloatingPointError(_message(self.steps + 1, self._layers, broken))
        self.steps += not is_absent()


def _broken(parameters: Sequence[Tensor], sharing: Sharing | None) -> tuple[list[int], bool]:
    """Return the positions of parameters with a non-finite gradient, and whether another process may hold one.

    Waits for the device.
    """
    held: list[tuple[int, Tensor]] = []
    for i, p in enumerate(parameters):
        gradient = settled_gradient(p)
        if gradient is not None:
            dense = as_dense_real(gradient.detach())
            if dense.numel() and has_values(dense):
                held.append((i, dense))
    if not held and sharing is None:
        return [], False
    device = held[0][1].device if sharing is None else local(parameters[0]).device
    flags = torch.zeros(len(parameters) + (sharing is not None), device=device)
    if held:
        largest: Any = torch._foreach_norm([gradient for _, gradient in held], torch.inf)
        positions = torch.tensor([i for i, _ in held], device=device)
        finite = torch.stack([moved(one.isfinite(), device) for one in largest])
        flags[positions] = torch.where(finite, 0.0, 1.0)
    if sharing is not None:
        flags[-1] = flags.max()
        flags = sharing.sum(flags[None])[0]
        if not flags[-1] > 0:  # none, or NaN: a process is paused, and then none raises
            return [], False
    broken: Any = (flags[: len(parameters)] > 0).nonzero().flatten()
    return broken.tolist(), sharing is not None


def _message(step: int, layers: Sequence[Layer], broken: Sequence[int]) -> str:
    if not broken:
        return (
            f"step {step}: the gradient of a parameter that another process holds is not finite, so no step was taken "
            "and nothing has changed; the error of that process names it"
        )
    owners = [(layer.name or "(root)", name) for layer in layers for name in layer.parameter_names]
    names = list(dict.fromkeys(repr(owners[i][0]) for i in broken))
    return (
        f"step {step}: the gradient of layer{'s' if len(names) > 1 else ''} {_some(names)} is not finite "
        f"({_some([owners[i][1] for i in broken])}), so no step was taken and nothing has changed. Causes: too "
        "large a rate, a logarithm or a division by zero in the loss, float16 without a gradient scaler. Lower the "
        "rate, clip, or zero the gradients and go on with the next batch; on_nonfinite='ignore' lets the optimizer step"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
