"""What a rule may ask for, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ._arguments import has_type
from ._norms import JointNorms, Moments, subtract, tensor_moments, tensor_norm_numbers, tensor_norms
from ._rows import whole_of
from ._tensors import as_dense_real, has_values, local, moved, several_processes
from .layers import Layer, some
from .sharding import Shard, Sharing, find_shards, is_absent, number_count, settled_gradient, sharing_of


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
        gradient_mean: The mean over the numbers of the gradient that `gradient_norm` measures; a missing gradient
            counts as zeros, and of a complex one real and imaginary parts are numbers of their own.
        gradient_std: Their standard deviation, unbiased (ddof 1); NaN for a layer of one number, whose factor then acts
            as 1. Over several processes it is accurate to 2e-8 of the mean.
        direction_norm: ‖Δw_l‖ / lr of the finished step, each parameter's change divided by its own group's rate; 0
            where the rate is 0. It is known after the step only, so a rule that needs it acts on the update.
        direction_rms: direction_norm / √n_l, n_l the number of the layer's weights.
        counts: Bool scalar: whether this is a step to count. Steps that a gradient scaler skips, steps with a
            non-finite gradient and steps whose gradients are all zero are not.
        gradients: The gradients, which a rule must not change.

    Raises:
        AttributeError: A statistic is read that is not in the rule's `needs`.
    """

    gradient_norm: Tensor
    weight_norm: Tensor
    matrix_norm: Tensor
    normalisation_gain: Tensor
    decay_norm: Tensor
    learning_rate: Tensor
    gradient_mean: Tensor
    gradient_std: Tensor
    direction_norm: Tensor
    direction_rms: Tensor
    counts: Tensor
    gradients: Gradients

    def __init__(self, **statistics: Any) -> None:
        vars(self).update(statistics)

    def __getattr__(self, name: str) -> Any:  # only called for missing attributes
        if name in NEEDS:
            raise AttributeError(f"statistics.{name} is not in the rule's needs; add {name!r} to them")
        raise AttributeError(f"there is no statistic {name!r}; there are {', '.join(NEEDS)}")


NEEDS = tuple(Statistics.__annotations__)
NOTHING = Statistics()
"""The statistics for a rule that needs none at this step."""


def check_needs(needs: Collection[str]) -> None:
    """Raise unless `needs` is a collection of names of statistics."""
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
    """Raise if each process would find other gains, from the running variances of its own batches."""
    if "normalisation_gain" not in needs or not several_processes():
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
    """Return what each parameter adds to the mean of γ²/σ² over its layer's channels, and which layers have a gain.

    These are the layers that hold the weight γ of a normalisation (a module with an eps). σ² is the running variance
    plus eps, and 1 for a normalisation that keeps none. A shard of γ adds its own channels only.
    """
    shares = like.new_zeros(sum(len(layer.parameters) for layer in layers))
    has_gain = torch.zeros(len(layers), dtype=torch.bool, device=like.device)
    position = 0
    for number, layer in enumerate(layers):
        for weight, shard in zip(layer.parameters, layer.shards, strict=True):
            # Under layers="parameter" the gain is that of the layer with the weight.
            if hasattr(layer.module, "eps") and weight is getattr(layer.module, "weight", None):
                shares[position] = _gain_share(layer.module, weight, shard, like.dtype)
                has_gain[number] = True
            position += 1
    return shares, has_gain


def _gain_share(module: Any, weight: Tensor, shard: Shard | None, dtype: torch.dtype) -> Tensor:
    gains = local(weight.detach()).to(dtype).square()
    variance: Tensor | None = getattr(module, "running_var", None)
    if variance is not None:
        own = variance if shard is None else local(shard.of(variance, weight))
        gains = gains / (moved(own, gains.device).to(dtype) + module.eps)
    return gains.sum() / (weight.numel() if shard is None else shard.shape.numel())


# --- Measuring -------------------------------------------------------------------------------------------------------

WEIGHT_NORMS = frozenset({"weight_norm", "matrix_norm", "decay_norm"})
NORMS = WEIGHT_NORMS | {"gradient_norm"}
MOMENTS = frozenset({"gradient_mean", "gradient_std"})
OF_STEP = frozenset({"direction_norm", "direction_rms"})
"""What is known after the step only."""
OF_ROWS = ("gradient_norm", "weight_norm", "direction_norm")
"""What is measured of single rows."""
AS_NUMBERS = NORMS | {"learning_rate"}
"""What `LayerStatistics.numbers` can return."""
PIECE, PIECE_ON_DEVICE = 2**20, 2**24
"""The most numbers whose differences are made at once: 4 MB of float32, which fit into the caches, and 64 MiB."""
MOST_INDICES = 64
"""Patterns of missing gradients that are kept; a mixture of experts has another one at almost every step."""
Groups = Sequence[Mapping[str, Any]]
_Norms = TypeVar("_Norms", Tensor, list[float])
_gradient = attrgetter("grad")


class LayerStatistics:
    """Computes the `Statistics` in `needs` for fixed layers.

    If parameters are sharded, each process computes its share and one collective a step adds them. `paused` then holds,
    for each layer, whether a process with a shard of it was paused in the step.

    Norms take a few operations for all layers. Moments of gradients take one pass over them and operations for each
    parameter: on accelerators one launch, for narrow types two; on the CPU six for each 2 MB of a copy in float64, some
    five times what their norm takes.
    """

    def __init__(self, layers: Sequence[Layer], needs: Collection[str]) -> None:
        check_needs(needs)
        self.needs = frozenset(needs)
        self.layers = tuple(layers)
        self.count = len(layers)
        self.members = [p for layer in layers for p in layer.parameters]
        self._every = range(len(self.members))
        self._owners = [number for number, layer in enumerate(layers) for _ in layer.parameters]
        self.layer_of = dict(zip(map(id, self.members), self._owners, strict=True))
        self.device, self.dtype = common_device(layers)
        self.shards = [shard for layer in layers for shard in layer.shards]
        self.sharing = sharing_of(self.shards)
        self.paused: Tensor | None = None
        self._zeros = torch.zeros(self.count, dtype=self.dtype, device=self.device)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._copies: dict[str, tuple[list[float], Tensor]] = {}
        self._joint: tuple[Any, JointNorms] | None = None
        self._measures_gradients = not self.needs.isdisjoint({"gradient_norm", "counts"})
        self._measures_moments = not self.needs.isdisjoint(MOMENTS)
        self._weight_norms = sorted(self.needs & WEIGHT_NORMS)
        self._grouped: tuple[list[int], list[int]] = ([], [])

    def moved_away(self) -> bool:
        """Return whether the parameters have left the device on which the statistics are kept."""
        return self.members[0].device != self.device

    @torch.no_grad()
    def compute(self, groups: Groups, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Statistics:
        """Return this step's statistics; `grad_scale` and `found_inf` are those of a gradient scaler."""
        needs = self.needs
        values: dict[str, Any]
        # Gains and moments are no norms. Few rules need them, so they are summed as those of shards are.
        if self.sharing is not None or "normalisation_gain" in needs or self._measures_moments:
            values = self._sums(groups)
        else:
            values = self._joined(groups, partial(tensor_norms, device=self.device), JointNorms.of)
            if self._measures_gradients and "gradient_norm" not in values:
                values["gradient_norm"] = self._zeros.clone()
        if "gradients" in needs:
            gradients = [p.grad if self.sharing is None else settled_gradient(p) for p in self.members]
            values["gradients"] = Gradients(gradients, grad_scale, found_inf)
        if grad_scale is not None:
            for name in values.keys() & {"gradient_norm", *MOMENTS}:
                values[name] = values[name] / moved(grad_scale, self.device).to(self.dtype)
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

    @torch.no_grad()
    def changed_squares(self, old: Sequence[Tensor | None]) -> Tensor:
        """Return this process's share of the squared norms of what members have changed by, since they had `old`.

        The differences are made in pieces of at most `PIECE` numbers, or of one tensor.
        """
        result = self.squares([])
        largest = PIECE_ON_DEVICE if self.device.type != "cpu" else PIECE
        piece: list[int] = []
        size = 0
        for i, before in enumerate(old):
            if before is None:
                continue
            if piece and size + before.numel() > largest:
                result = result + self._squares_of_piece(old, piece)
                piece, size = [], 0
            piece.append(i)
            size += before.numel()
        return result + self._squares_of_piece(old, piece) if piece else result

    def _squares_of_piece(self, old: Sequence[Tensor | None], piece: Sequence[int]) -> Tensor:
        changes: list[Tensor | None] = [None] * len(self.members)
        before = cast(list[Tensor], [old[i] for i in piece])
        for i, change in zip(piece, subtract(before, [local(self.members[i]) for i in piece]), strict=True):
            changes[i] = change
        return self.squares(changes)

    @torch.no_grad()
    def after(self, before: Statistics, squares: Tensor, groups: Groups, rates: Sequence[Any]) -> Statistics:
        """Return the statistics with those of the finished step.

        Args:
            before: What `compute` returned before the step.
            squares: The squared norm of the change of each of `members`, of a sharded one this process's share.
            groups: The parameter groups.
            rates: Their rates before the step.
        """
        if any(isinstance(rate, Tensor) for rate in rates):
            vector = torch.stack([torch.as_tensor(r, dtype=self.dtype, device=self.device).reshape(()) for r in rates])
        else:
            vector = self._copied("rates", list(map(float, rates)))
        of_members = self._spread(vector.index_select(0, self._index(self._group_numbers(groups))))
        shares = (squares / of_members.square()).masked_fill_(of_members == 0, 0.0)
        (norm,) = self.norms([shares]).unbind()
        values = {**vars(before), "direction_norm": norm}
        if "direction_rms" in self.needs:
            sizes = [sum(p.numel() for p in layer.whole()) for layer in self.layers]
            values["direction_rms"] = norm / self._copied("sizes", list(map(float, sizes))).sqrt()
        return Statistics(**{name: value for name, value in values.items() if name in self.needs})

    def _spread(self, of_members: Tensor) -> Tensor:
        """Return for each square what belongs to its member."""
        return of_members

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return this process's share of the squared norms of tensors, one for each of `members` or None."""
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        result = torch.zeros(len(self.members), dtype=self.dtype, device=self.device)
        if not present or is_absent():
            return result
        norms, order = tensor_norms([local(t) for t in tensors if t is not None], self.device)
        squares = norms.to(self.dtype).square()
        return result.index_copy_(0, self._index([present[i] for i in order]), squares)

    def norms(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the norms of layers, one row for each result of `squares`, with one collective for all of them."""
        return self._layer_sums(squares).sqrt_()

    def _layer_sums(self, rows: Sequence[Tensor]) -> Tensor:
        return self._of_layers(self._summed(rows))

    def _summed(self, rows: Sequence[Tensor]) -> Tensor:
        shares = torch.stack(list(rows))
        return shares if self.sharing is None else self.sharing.sum(shares)

    def _of_layers(self, rows: Tensor) -> Tensor:
        return self._zeros.repeat(len(rows), 1).index_add_(1, self._index(self._owners), rows)

    def _index(self, positions: Sequence[int]) -> Tensor:
        """Return positions on the device; copied there once, because that waits for it."""
        key = tuple(positions)
        if key not in self._indices:
            if len(self._indices) >= MOST_INDICES:
                self._indices.clear()
            self._indices[key] = torch.tensor(key, dtype=torch.long, device=self.device)
        return self._indices[key]

    def _sums(self, groups: Groups) -> dict[str, Tensor]:
        """Return the norms and gains in `needs`, out of sums over processes: one collective for all of them."""
        rows: dict[str, Tensor] = {}
        has_gain: Tensor | None = None
        gradients: list[Tensor | None] = []
        if self._measures_gradients or self._measures_moments:
            gradients = list(map(settled_gradient, self.members))
        if self._measures_gradients:
            rows["gradient_norm"] = self.squares(gradients)
        if self._weight_norms:
            weights = self.squares(self.members)
            for name in self._weight_norms:
                scales = self._weight_scales(name, groups)
                rows[name] = weights
                if scales is not None:  # parameters of scale 0 may be non-finite
                    squares = self._copied(name, scales).square()
                    rows[name] = torch.where(squares > 0, weights * squares, 0)
        if "normalisation_gain" in self.needs:
            rows["normalisation_gain"], has_gain = gain_shares(self.layers, self._zeros)
        moments = self._moments(gradients) if self._measures_moments else None
        if not rows and moments is None:
            return {}
        own = [*rows.values(), self._zeros.new_zeros(len(self.members))]
        shares = self._summed(own if moments is None else own + moments.shares())
        sums = self._of_layers(shares.narrow(0, 0, len(own)))
        self.paused = None if self.sharing is None else sums[-1].isnan()
        values = dict(zip(rows, sums, strict=False))
        if moments is not None:
            if self.sharing is not None:
                moments = Moments.of_sums(*shares.narrow(0, len(own), len(shares) - len(own)).unbind())
            values |= self._of_moments(moments)
        for name in values.keys() & NORMS:
            values[name] = values[name].sqrt()
        if has_gain is not None:
            values["normalisation_gain"] = torch.where(has_gain, values["normalisation_gain"], 1.0)
        return values

    def _moments(self, gradients: Sequence[Tensor | None]) -> Moments:
        """Return this process's share of the moments of each member's gradient."""
        zeros = torch.zeros(len(self.members), dtype=self.dtype, device=self.device)
        present = [] if is_absent() else [i for i, gradient in enumerate(gradients) if gradient is not None]
        owners, counts, means, deviations = tensor_moments([local(cast(Tensor, gradients[i])) for i in present])
        if not owners:
            return Moments(zeros, zeros, zeros)
        count = self._copied("counts", list(map(float, counts)))
        mean, deviation = (
            torch.stack([moved(one, self.device) for one in part]).to(self.dtype) for part in (means, deviations)
        )
        parts = Moments(count, mean, count * deviation.square())
        return parts.joined(self._index([present[i] for i in owners]), zeros)

    def _of_moments(self, moments: Moments) -> dict[str, Tensor]:
        """Return mean and standard deviation of each layer from the moments of its gradients; what is missing is 0."""
        numbers = self._copied("numbers", [float(sum(map(number_count, layer.whole()))) for layer in self.layers])
        missing = numbers - self._zeros.index_add(0, self._index(self._owners), moments.count)
        none = torch.zeros_like(missing)
        parts = zip((moments.count, moments.mean, moments.squares), (missing, none, none), strict=True)
        found = Moments(*map(torch.cat, parts)).joined(self._index([*self._owners, *range(self.count)]), self._zeros)
        deviation = (found.squares / (numbers - 1).clamp(min=0)).sqrt()
        values = {"gradient_mean": found.mean, "gradient_std": deviation}
        return {name: values[name] for name in self.needs & MOMENTS}

    def numbers(self, groups: Groups, grad_scale: Tensor | None = None) -> dict[str, list[float]]:
        """Return the statistics in `needs`, all of them in `AS_NUMBERS`, as Python numbers; for unsharded parameters.

        On the CPU, where reading a value waits for nothing, a few operations on Python's numbers cost less than the
        small tensor operations of `compute`.
        """
        values = self._joined(groups, tensor_norm_numbers, JointNorms.of_numbers)
        if "gradient_norm" in self.needs:
            norms = values.get("gradient_norm", [0.0] * self.count)
            values["gradient_norm"] = norms if grad_scale is None else [norm / float(grad_scale) for norm in norms]
        if "learning_rate" in self.needs:
            values["learning_rate"] = [max(map(_number, rates)) for rates in self._rates_of(groups)]
        return values

    @torch.no_grad()
    def _joined(
        self,
        groups: Groups,
        norms_of: Callable[[list[Tensor]], tuple[_Norms, Sequence[int]]],
        join: Callable[[JointNorms, _Norms], Sequence[_Norms]],
    ) -> dict[str, _Norms]:
        """Return the norms in `needs`, all from one measurement; without "gradient_norm" if there is no gradient.

        `norms_of` measures tensors, `join` makes norms of layers from theirs.
        """
        present: Sequence[int] = ()
        tensors: list[Any] = []
        if self._measures_gradients:
            present, tensors = self._every, list(map(_gradient, self.members))
            if any(map(is_, tensors, repeat(None))):
                present = [i for i in present if tensors[i] is not None]
                tensors = [tensors[i] for i in present]
        scales = list(map(self._weight_scales, self._weight_norms, repeat(groups)))
        names = ["gradient_norm", *self._weight_norms] if tensors else self._weight_norms
        if not names:
            return {}
        norms, order = norms_of([*tensors, *self.members] if scales else tensors)
        arguments = (present, order, scales)
        if self._joint is None or self._joint[0] != arguments:
            self._joint = (arguments, self._joint_norms(*arguments))
        return dict(zip(names, join(self._joint[1], norms), strict=True))

    def _weight_scales(self, name: str, groups: Groups) -> list[float] | None:
        """Return the factor of each parameter in a norm over the weights; None for 1."""
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
            self._grouped = (sizes, [group_of[id(whole_of(p))] for p in self.members])
        return self._grouped[1]

    def _copied(self, name: str, numbers: list[float]) -> Tensor:
        """Return numbers on the device; copied again only when they change, because that waits for it."""
        known = self._copies.get(name)
        if known is None or known[0] != numbers:
            known = self._copies[name] = (numbers, torch.tensor(numbers, dtype=self.dtype, device=self.device))
        return known[1]

    def _joint_norms(
        self, present: Sequence[int], order: Sequence[int], scales: list[list[float] | None]
    ) -> JointNorms:
        """Return what joins norms of tensors to those of layers.

        `present` are the members whose gradients were measured, before the weights of all members; `order` is the
        position of each norm's tensor. `scales` are the factors of the members in each norm of weights; None for 1.
        """
        position_of = {tensor: at for at, tensor in enumerate(order)}
        entries = [(position_of[at], 0, self._owners[i], 1.0) for at, i in enumerate(present)]
        for row, own in enumerate(scales, start=int(bool(present))):
            for i, layer in enumerate(self._owners):
                scale = 1.0 if own is None else own[i]
                entries.append((position_of[len(present) + i], row, layer, scale))
        return JointNorms(entries, len(scales) + bool(present), self._zeros)

    def _rates_of(self, groups: Groups) -> list[list[Any]]:
        """Return the rates of each layer's parameters."""
        rates: list[list[Any]] = [[] for _ in range(self.count)]
        for layer, number in zip(self._owners, self._group_numbers(groups), strict=True):
            rates[layer].append(groups[number]["lr"])
        return rates

    def _learning_rates(self, groups: Groups) -> Tensor:
        rates = self._rates_of(groups)
        if any(isinstance(rate, Tensor) for layer in rates for rate in layer):
            vectors = [[torch.as_tensor(r, dtype=self.dtype, device=self.device).reshape(()) for r in q] for q in rates]
            return torch.stack([torch.stack(vector).amax() for vector in vectors])
        return self._copied("learning_rate", list(map(max, rates)))


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


# --- Non-finite gradients --------------------------------------------------------------------------------------------

OnNonfinite = Literal["ignore", "raise"]
MOST_NAMED = 5


class FiniteGradients:
    """Counts the steps of one adapter, and raises at one with a gradient that is NaN or infinite.

    It reads max |g| of each parameter, which cannot overflow as a norm can. This reads the gradients once more and
    waits for the device. If parameters are sharded, it takes one collective, and all processes raise together.

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
        """Look at these layers from the next step on, and at other parameters by name that are in no layer."""
        none = [Layer("(in no layer)", tuple(others.values()), tuple(others))] if others else []
        self._layers = [*layers, *none]
        self._parameters = [p for layer in self._layers for p in layer.parameters]
        shards = find_shards(self._parameters, model)
        self._sharing = sharing_of([shards.get(id(p)) for p in self._parameters], flag=True)

    @torch.no_grad()
    def check(self, found_inf: Tensor | None = None) -> None:
        """Raise a FloatingPointError if a gradient is non-finite, else count the step.

        A step with `found_inf` is not checked: a gradient scaler lets the optimizer skip it if needed.
        """
        if found_inf is None and self._parameters:
            broken = _broken(self._parameters, self._sharing)
            if broken is not None:
                raise FloatingPointError(_message(self.steps + 1, self._layers, broken))
        self.steps += not is_absent()


def _broken(parameters: Sequence[Tensor], sharing: Sharing | None) -> list[int] | None:
    """Return the positions of non-finite gradients, none if only other processes hold them; None if all are finite.

    Waits for the device.
    """
    dense = {i: as_dense_real(g.detach()) for i, g in enumerate(map(settled_gradient, parameters)) if g is not None}
    held = {i: gradient for i, gradient in dense.items() if gradient.numel() and has_values(gradient)}
    if not held and sharing is None:
        return None
    device = next(iter(held.values())).device if sharing is None else local(parameters[0]).device
    flags = torch.zeros(len(parameters) + (sharing is not None), device=device)
    if held:
        largest = torch._foreach_norm(list(held.values()), torch.inf)
        finite = torch.stack([moved(one.isfinite(), device) for one in largest])
        flags[torch.tensor(list(held), device=device)] = torch.where(finite, 0.0, 1.0)
    if sharing is not None:
        flags[-1] = flags.max()
        flags = sharing.sum(flags[None])[0]
        if not flags[-1] > 0:  # none, or NaN: a process is paused, and then none raises
            return None
    broken = cast("list[int]", (flags[: len(parameters)] > 0).nonzero().flatten().tolist())
    return broken if broken or sharing is not None else None


def _message(step: int, layers: Sequence[Layer], broken: Sequence[int]) -> str:
    if not broken:
        return (
            f"step {step}: the gradient of a parameter that another process holds is not finite, so no step was taken "
            "and nothing has changed; the error of that process names it"
        )
    owners = [(layer.name or "(root)", name) for layer in layers for name in layer.parameter_names]
    names = {owners[i][0]: None for i in broken}
    parameters = some([owners[i][1] for i in broken], MOST_NAMED, str)
    return (
        f"step {step}: the gradient of layer{'s' if len(names) > 1 else ''} {some(names, MOST_NAMED)} is not finite "
        f"({parameters}), so no step was taken and nothing has changed. Causes: too large a rate, a logarithm or a "
        "division by zero in the loss, float16 without a gradient scaler. Lower the rate, clip, or zero the gradients "
        "and go on with the next batch; on_nonfinite='ignore' lets the optimizer step"
    )
