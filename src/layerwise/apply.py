"""The places where a factor acts: on the gradient, on the rate, on the update.

A place is handed a *view* of the optimizer, a shallow copy on which `step` will run, and may replace the view's
parameter groups; the optimizer's own are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Protocol, cast

import torch
from torch import Tensor, optim

from ._writes import ScaledWrites
from .factors import Factors
from .fused import DealtRate, can_be_dealt
from .optimizers import (
    PlaceName,
    damps_history,
    decay_is_coupled,
    has_decay,
    is_capturing,
    takes_tensor_rate,
    writes_are_scaled,
)
from .partition import OUTSIDE, Overrides, Partition
from .sharding import settled_gradient
from .splits import Split
from .tensors import local, moved

HALF = (torch.float16, torch.bfloat16)


class Place(Protocol):
    """Where a factor acts."""

    reads: bool = True
    """Whether factors are read from a device, once a step. If not, they cost a launch for each tensor."""

    def act(self, view: Any, partition: Partition, factors: Factors, *, private: bool = False) -> list[Split]:
        """Act before the step; return how the view's groups were split.

        Args:
            view: The view.
            partition: Which parameters belong to which layer.
            factors: This step's factors.
            private: Whether only PyTorch's own `step` sees the view's groups.
        """
        ...

    def finish(self) -> None:
        """Act after the step."""
        ...


def strided_gradients(view: Any) -> list[Tensor] | None:
    """Return the parameters that have a gradient, in a layer or not; None if one of the gradients is sparse."""
    present: list[Tensor] = []
    for group in view.param_groups:
        for p in group["params"]:
            gradient = p.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    return None
                present.append(p)
    return present


def scale_in_place(gradients: Sequence[Any], factors: Sequence[float]) -> None:
    """Multiply gradients by numbers.

    The grouped kernel takes dense gradients only, and on the CPU it rounds the factor to the gradient's type, which for
    half precision loses digits and can make zero or infinity of it: sparse and half ones are multiplied one by one.
    """
    gradients = list(map(local, gradients))
    grouped = [g.layout is torch.strided and not (g.is_cpu and g.dtype in HALF) for g in gradients]
    if any(grouped):
        torch._foreach_mul_(list(compress(gradients, grouped)), list(compress(factors, grouped)))
    for gradient, factor, done in zip(gradients, factors, grouped, strict=True):
        if not done:
            gradient.mul_(factor)


def divide(view: Any, partition: Partition, factors: Factors, overrides: Overrides, *, private: bool) -> list[Split]:
    """Let parameters of different factors be stepped with different options; return how the view's groups were split.

    Either in groups of their own, or in calls of their own of a fused kernel, which costs less.
    """
    if not private:
        return partition.split(view, factors.buckets, overrides, steady=True)
    if not can_be_dealt(view):
        return partition.split(view, factors.buckets, lambda group, f: {**foreseen_form(group), **overrides(group, f)})
    view.param_groups = [dealt(group, partition, factors, overrides) for group in view.param_groups]
    return []


def dealt(group: dict[str, Any], partition: Partition, factors: Factors, overrides: Overrides) -> dict[str, Any]:
    """Return a group of which a fused kernel's call is dealt out by factor."""

    def deal(parameters: Sequence[Tensor]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for factor, positions in factors.buckets(partition.positions(parameters)):
            yield positions, overrides(group, factor)

    return {**group, "lr": DealtRate.of(group["lr"], deal)}


def foreseen_form(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what torch's own optimizers would find out anew for each part of a group: on the CPU none is for each."""
    open_question = group.get("foreach", False) is None and not group.get("fused") and group["params"]
    return {"foreach": False} if open_question and group["params"][0].is_cpu else {}


def begin_scaling(view: Any, partition: Partition, factors: Factors) -> ScaledWrites:
    """Begin to scale what the step writes."""
    mode = ScaledWrites((p for group in view.param_groups for p in group["params"]), view.state)
    members = partition.members(view)
    if is_capturing(view):
        mode.scale((p, factors.each(p)[layer]) for p, layer in members)
    else:
        numbers = factors.read()
        mode.scale((p, numbers[layer]) for p, layer in members if numbers[layer] != 1)
    mode.begin()
    return mode


class LearningRate(Place):
    """`lr_l = lr · f_l`, for this step.

    On accelerators what the step writes is scaled, which gives the same numbers. Elsewhere, and where other hooks or
    adapters take part in the step, groups are divided: with tensors as rates where the optimizer takes them.
    """

    def __init__(self) -> None:
        self._mode: ScaledWrites | None = None

    def act(self, view: Any, partition: Partition, factors: Factors, *, private: bool = False) -> list[Split]:
        """Scale what the step writes, or divide the view's groups by rate."""
        self._mode = None  # of a step that failed
        # Adafactor takes the smaller one of its rate and another.
        if private and factors.on_device and not isinstance(view, optim.Adafactor) and writes_are_scaled(view):
            self._mode = begin_scaling(view, partition, factors)
            return []
        on_device = (
            factors.on_device
            and all(takes_tensor_rate(view, group) for group in view.param_groups)
            and len({p.device for group in view.param_groups for p in group["params"]}) == 1
        )
        if not on_device:
            return divide(view, partition, factors, self._scaled, private=private)
        rates: dict[int, tuple[Tensor, ...]] = {}

        @torch.no_grad()
        def tensor_rate(group: Mapping[str, Any], layer: int) -> dict[str, Any]:
            if layer == OUTSIDE:
                return {}
            if id(group) not in rates:
                # The fused kernels read float32; the others promote with the parameters.
                wide = not group.get("fused") and any(p.dtype is torch.float64 for p in group["params"])
                rates[id(group)] = (factors.tensor * group["lr"]).to(torch.float64 if wide else torch.float32).unbind()
            return {"lr": rates[id(group)][layer]}

        return partition.split(view, lambda of_layer: of_layer.items(), tensor_rate)

    @staticmethod
    def _scaled(group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        if factor == 1:
            return {}
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            return {"lr": rate * factor}
        with torch.set_grad_enabled(bool(group.get("differentiable"))):  # a rate may be learned through the step
            return {"lr": rate * factor}

    def finish(self) -> None:
        """Let the step write as it does alone."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.end()


SMALLEST_DIVISOR = 1e-3
"""Factors below this are applied to the gradient itself where the decay is to stay plain: λ/f would lose digits."""


class Gradient(Place):
    """`g_l ← f_l g_l` before the optimizer sees it, and `f_l λ w` of coupled weight decay when it is scaled.

    Args:
        decay: `"scaled"` multiplies coupled weight decay too, `"plain"` leaves it.
        in_place: Whether the gradient itself is to be multiplied. If not, torch's SGD with momentum gets the factor
            through its dampening, `v ← μv + (1 − dampening)(g + λw)`: the same numbers without a pass over memory.
    """

    def __init__(self, decay: str, *, in_place: bool) -> None:
        self.decay, self.in_place = decay, in_place
        self._started: tuple[Any, Any, list[Tensor]] | None = None

    def act(self, view: Any, partition: Partition, factors: Factors, *, private: bool = False) -> list[Split]:
        """Scale the gradients, or what the optimizer multiplies them by."""
        self._started = None  # of a step that failed
        if not self.in_place and not factors.on_device and damps_history(view):
            # The dampening multiplies g + λw, so to leave the decay plain λ is divided by f, which must not be small.
            possible = self.decay == "scaled" or not has_decay(view) or min(factors.read()) >= SMALLEST_DIVISOR
            present = strided_gradients(view) if possible else None
            if present is not None:
                self._begin_history(view, present)
                return divide(view, partition, factors, self._dampening, private=private)
        return self._in_gradients(view, partition, factors, private=private)

    @torch.no_grad()
    def _in_gradients(self, view: Any, partition: Partition, factors: Factors, *, private: bool) -> list[Split]:
        scaled = self.decay == "scaled" and any(
            group.get("weight_decay") and decay_is_coupled(view, group) is not False for group in view.param_groups
        )
        members = partition.members(view)
        numbers = factors.numbers
        if numbers is None:
            return self._on_device(view, members, factors, scaled)
        changed = [(p.grad, numbers[layer]) for p, layer in members if numbers[layer] != 1]
        scale_in_place([gradient for gradient, _ in changed], [factor for _, factor in changed])
        if not scaled:
            return []
        return divide(view, partition, factors, lambda g, f: self._decay(view, g, f), private=private)

    def finish(self) -> None:
        """Hand the momentum that the step has begun to the optimizer."""
        if self._started is not None:
            view, state, fresh = self._started
            for p in fresh:
                state[p] = view.state[p]
            view.state, self._started = state, None

    @staticmethod
    def _decay(view: Any, group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        if factor == 1 or not group.get("weight_decay") or decay_is_coupled(view, group) is False:
            return {}
        return {"weight_decay": group["weight_decay"] * factor}

    def _on_device(
        self, view: Any, members: Sequence[tuple[Tensor, int]], factors: Factors, scaled: bool
    ) -> list[Split]:
        """Form f (g + λw) in the gradients, because f λ in the groups would divide them by layer."""
        splits: list[Split] = []
        if scaled:
            scale = getattr(view, "grad_scale", None)
            if scale is not None:  # the fused kernel would unscale the decay with the gradient
                gradients = [
                    local(p.grad) for group in view.param_groups for p in group["params"] if p.grad is not None
                ]
                torch._foreach_mul_(gradients, scale.reciprocal())
                view.grad_scale = None
            groups: list[dict[str, Any]] = []
            for group in view.param_groups:
                inside = [p for p in group["params"] if p.grad is not None]
                if inside and group.get("weight_decay") and decay_is_coupled(view, group) is not False:
                    sign = -1 if group.get("maximize") else 1  # with maximize, step() takes -g before it adds λw
                    alpha = sign * group["weight_decay"]
                    gradients: list[Any] = list(map(settled_gradient, inside))
                    weights: list[Any] = list(map(local, inside))
                    torch._foreach_add_(gradients, weights, alpha=alpha)
                    splits.append(Split(group, [{**group, "weight_decay": 0.0}], [{"weight_decay": 0.0}]))
                    groups += splits[-1].parts
                else:
                    groups.append(group)
            view.param_groups = groups
        if self.reads and not is_capturing(view):
            numbers = factors.read()
            members = [(p, layer) for p, layer in members if numbers[layer] != 1]
            scales: list[Any] = [numbers[layer] for _, layer in members]
        else:  # no kernel takes several factors from the device
            scales = [factors.each(p)[layer] for p, layer in members]
        of_kind: dict[Any, list[int]] = {}
        for position, (p, _) in enumerate(members):  # a kernel takes tensors of one type
            of_kind.setdefault((p.dtype, p.device), []).append(position)
        for positions in of_kind.values():
            gradients = [local(cast(Tensor, members[i][0].grad)) for i in positions]
            torch._foreach_mul_(gradients, [scales[i] for i in positions])
        return splits

    def _begin_history(self, view: Any, present: Sequence[Tensor]) -> None:
        """Let the momentum begin from zero, in a copy of the state."""
        state = view.state
        # Parameters in no layer too: while the view has a state of its own, what step() begins there is begun for all.
        fresh = [p for p in present if state.get(p, {}).get("momentum_buffer") is None]
        if fresh:  # step() would start from a copy of g + λw; from zero it starts from f (g + λw)
            view.state = state.copy()  # the optimizer's own changes only when the step has been taken
            for p in fresh:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                view.state[p] = {**state.get(p, {}), "momentum_buffer": zeros}
            self._started = (view, state, fresh)

    def _dampening(self, group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        """Return the options under which `1 − dampening` is f."""
        if factor == 1:
            return {}
        if self.decay == "scaled" or not group["weight_decay"]:
            return {"dampening": 1 - factor}
        return {"dampening": 1 - factor, "weight_decay": group["weight_decay"] / factor}


class Update(Place):
    """`w ← w_old + f_l (w_new − w_old)`.

    On accelerators what the step writes is scaled. Elsewhere, and where other hooks or adapters take part in the step,
    a copy of the parameters is kept during it.
    """

    def __init__(self) -> None:
        self._mode: ScaledWrites | None = None
        self._kept: tuple[list[Tensor], list[Tensor], list[Any]] | None = None

    @torch.no_grad()
    def act(self, view: Any, partition: Partition, factors: Factors, *, private: bool = False) -> list[Split]:
        """Scale what the step writes, or copy the parameters whose update will be scaled."""
        self._mode = self._kept = None  # of a step that failed
        if private and factors.on_device and writes_are_scaled(view):
            self._mode = begin_scaling(view, partition, factors)
            return []
        members = partition.members(view)
        numbers = factors.numbers
        if numbers is not None:
            members = [(p, layer) for p, layer in members if numbers[layer] != 1]
            weights: list[Any] = [numbers[layer] for _, layer in members]
        else:  # the kernel wants tensors of the parameters' type, to which half precision rounds the factor
            kinds = {(p.device, p.dtype) for p, _ in members}
            each = {(at, kind): moved(factors.tensor.to(kind), at).unbind() for at, kind in kinds}
            weights = [each[p.device, p.dtype][layer] for p, layer in members]
        parameters = [local(p) for p, _ in members]
        self._kept = (parameters, [p.clone() for p in parameters], weights)
        return []

    @torch.no_grad()
    def finish(self) -> None:
        """Move from the old values towards the new ones, or past them."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.end()
        if self._kept is not None and self._kept[0]:
            parameters, old, weights = self._kept
            # From the old values, because 1 - f of a small f would be 1 in half precision.
            torch._foreach_lerp_(old, parameters, weights)
            torch._foreach_copy_(parameters, old)
        self._kept = None


def make_place(name: PlaceName, decay: str, *, automatic: bool) -> Place:
    """Return the place of this name.

    Args:
        name: One of `layerwise.optimizers.PLACES`.
        decay: `"scaled"` or `"plain"`, for `"gradient"`.
        automatic: Whether `"auto"` chose it, which may then carry the factor in another way with the same numbers.
    """
    if name == "gradient":
        return Gradient(decay, in_place=not automatic)
    return LearningRate() if name == "lr" else Update()
