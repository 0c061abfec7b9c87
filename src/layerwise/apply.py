"""The places where a factor acts: on the gradient, on the rate, on the update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import is_
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn, optim

from ._rows import Rows
from ._tensors import has_values, local, moved, warn_without_values
from ._writes import HALF, Factor
from .optimizers import PlaceName, decay_is_coupled, has_capturable, has_decay, takes_tensor_rate
from .rules.base import finite_or_one
from .sharding import settled_gradient

NOT_STATE = ("params", "param_names", "lr")
MOST_NUMBERS = 1024
"""The largest tensor in a group of which each part gets its own copy; smaller ones are counters and the like."""


@dataclass(eq=False)
class Split:
    """The parts that `step` sees in place of a parameter group.

    Args:
        source: The group.
        parts: Groups like it, each with some of its parameters.
        overrides: For each part the values that differ by design.
    """

    source: dict[str, Any]
    parts: list[dict[str, Any]]
    overrides: Sequence[Mapping[str, Any]]

    def remember(self) -> None:
        """Give each part its own copy of what `step` may change in place, and record what the parts hold."""
        changeable = [name for name, value in self.source.items() if name != "params" and can_change(value)]
        if len(self.parts) > 1:
            for part, own in zip(self.parts, self.overrides, strict=True):
                part.update({name: own_copy(part[name]) for name in changeable if name not in (*NOT_STATE, *own)})
        self.given = [dict(part) for part in self.parts]
        names = {*changeable, *(name for own in self.overrides for name, value in own.items() if can_change(value))}
        self.marks = [{name: mark(part[name]) for name in names if name in part} for part in self.parts]

    def agreed(self, optimizer: str) -> dict[str, Any]:
        """Return the values that `step` has changed; raise where the parts disagree on one."""
        changed = [
            {
                name: value
                for name, value in part.items()
                if name not in ("params", "param_names")
                and (value is not given.get(name) or (name in marks and mark(value) != marks[name]))
            }
            for part, given, marks in zip(self.parts, self.given, self.marks, strict=True)
        ]
        found: dict[str, Any] = {}
        for name in dict.fromkeys(name for values in changed for name in values):
            # The bare step handles the group as a whole, so a part without gradients may be unchanged.
            values = [
                values.get(name, self)
                for part, values in zip(self.parts, changed, strict=True)
                if name in values or any(p.grad is not None for p in part["params"])
            ]
            found[name] = values[0]
            # An object that all parts share was changed once for each part instead of once.
            shared = len(self.parts) > 1 and values[0] is self.source.get(name)
            if shared or any(name in own for own in self.overrides) or not all(_same(values[0], x) for x in values):
                raise RuntimeError(_disagreement(optimizer, name))
        return found

    def carry(self, name: str, value: Any) -> None:
        """Set a value of the group; in place where `step` changed a part's copy in place."""
        kept: Any = self.source.get(name)
        if value is kept:
            return
        in_place = any(value is given.get(name) for given in self.given) and type(value) is type(kept)
        if in_place and isinstance(value, Tensor):
            with torch.no_grad():
                kept.copy_(value)
        elif in_place and isinstance(value, list):
            kept[:] = value
        elif in_place and isinstance(value, (dict, set)):
            kept.clear()
            kept.update(value)
        else:
            self.source[name] = value


def can_change(value: Any) -> bool:
    """Tell whether `step` could change a value in place."""
    return isinstance(value, (Tensor, list, dict, set)) or (
        isinstance(value, tuple) and any(isinstance(held, Tensor) for held in cast(tuple[Any, ...], value))
    )


def own_copy(value: Any) -> Any:
    """Return a copy of a small tensor or a container that `step` may change in place; anything else as it is."""
    if isinstance(value, Tensor):
        shared = isinstance(value, nn.Parameter) or value.requires_grad or value.numel() > MOST_NUMBERS
        return value if shared else value.clone()
    if type(value) in (list, set):
        return type(value)(map(own_copy, value))
    if type(value) is dict:
        return {key: own_copy(held) for key, held in cast(dict[Any, Any], value).items()}
    return value


def mark(value: Any) -> Any:
    """Return a value that differs after `step` has changed the given one in place."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (list, tuple)):
        return [mark(held) for held in cast(Sequence[Any], value)]
    if type(value) is dict:
        return {key: mark(held) for key, held in cast(dict[Any, Any], value).items()}
    if type(value) is set:
        return set(cast(set[Any], value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


def _same(first: Any, second: Any) -> bool:
    """Tell whether two values are equal; for tensors on an accelerator this waits for the device."""
    if first is second:
        return True
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        alike = isinstance(first, Tensor) and isinstance(second, Tensor) and first.dtype == second.dtype
        return alike and first.device == second.device and torch.equal(first, second)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        one, other = cast(Sequence[Any], first), cast(Sequence[Any], second)
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(first, dict) and isinstance(second, dict):
        held, wanted = cast(dict[Any, Any], first), cast(dict[Any, Any], second)
        return held.keys() == wanted.keys() and all(_same(held[key], wanted[key]) for key in held)
    try:
        return bool(first == second) or (first != first and second != second)
    except ValueError:  # the truth of an array is ambiguous
        return False


def write_back(splits: Sequence[Split], optimizer: str) -> None:
    """Carry over to each group what `step` wrote into its parts.

    Some optimizers count their steps in their parameter groups. A value is carried over if all parts agree on it. Where
    it is a tensor on an accelerator, the comparison waits for the device.

    Args:
        splits: The groups and their parts.
        optimizer: Its name, for the message.

    Raises:
        RuntimeError: The parts of a group disagree; nothing is carried over.
    """
    agreed = [split.agreed(optimizer) for split in splits]
    if any(agreed) and len(splits) > 1 and any(len(split.parts) > 1 for split in splits):
        # A default value is one object in all groups, which the bare step would change once for each group.
        held = Counter(id(value) for split in splits for value in split.source.values() if can_change(value))
        for split, values in zip(splits, agreed, strict=True):
            for name in values:
                if held[id(split.source.get(name))] > 1:
                    raise RuntimeError(_disagreement(optimizer, name))
    for split, values in zip(splits, agreed, strict=True):
        for name, value in values.items():
            split.carry(name, value)


def _disagreement(optimizer: str, name: str) -> str:
    return (
        f"{optimizer} keeps state of its own in param_groups[...][{name!r}], and this step, with per-layer groups, "
        "gave it different values for different layers. The step has moved the weights: go on from a checkpoint, and "
        "attach with apply='update', which leaves the groups whole"
    )


# --- Partition -------------------------------------------------------------------------------------------------------

Buckets = Callable[[Mapping[int, list[Tensor]]], Iterable[tuple[Any, list[Tensor]]]]
Overrides = Callable[[Mapping[str, Any], Any], dict[str, Any]]
"""(group, key) to the options that differ under this key."""
OUTSIDE = -1
"""The layer number of a parameter that belongs to no layer; its factor is 1."""
MOST_SHARINGS = 2
"""The most different ways of sharing groups; after that each layer gets its own group."""


class ByLayer(NamedTuple):
    """A list of parameters by layer; those in no layer are under `OUTSIDE`."""

    parameters: list[Tensor]
    positions: dict[int, list[int]]
    members: dict[int, list[Tensor]]


class Partition:
    """Which parameters of which group belong to which layer.

    Args:
        layer_of: id of parameter to layer number.
        rows: Rows of parameters that are layers of their own; such a parameter is in no layer.
    """

    def __init__(self, layer_of: Mapping[int, int], rows: Iterable[Rows] = ()) -> None:
        self.layer_of = layer_of
        self.rows_of: dict[int, list[Rows]] = {}
        for one in rows:
            self.rows_of.setdefault(id(one.whole), []).append(one)
        self._cached: dict[int, ByLayer] = {}
        self._sharings: set[tuple[tuple[int, ...], ...]] = set()

    def of(self, parameters: Sequence[Tensor]) -> ByLayer:
        """Return a list of parameters by layer, and keep the answer for the next step."""
        key = id(parameters[0]) if parameters else 0
        cached = self._cached.get(key)
        if cached is None or len(cached[0]) != len(parameters) or not all(map(is_, cached[0], parameters)):
            kept, positions = list(parameters), dict[int, list[int]]()
            for position, p in enumerate(kept):
                positions.setdefault(self.layer_of.get(id(p), OUTSIDE), []).append(position)
            members = {layer: [kept[i] for i in found] for layer, found in positions.items()}
            cached = self._cached[key] = ByLayer(kept, positions, members)
        return cached

    def split(self, view: Any, buckets: Buckets, overrides: Overrides) -> list[Split]:
        """Replace the view's groups by one group for each distinct key, and return how each was split.

        Layers with equal keys share a group, because each group costs an unfused optimizer a round of kernels. Where
        they share groups in other ways each time, each layer gets its own group: `step` may have compiled a function
        for tensors of just this shape, and fail at the ninth.

        Args:
            view: The view.
            buckets: Layer number (or `OUTSIDE`) to parameters, to pairs of a key and parameters.
            overrides: (group, key) to the values that the new group has of its own.
        """
        splits: list[Split] = []
        of_groups = [self.of(group["params"]).members for group in view.param_groups]
        shared = [list(buckets(members)) for members in of_groups]
        if len(self._sharings) <= MOST_SHARINGS:
            self._sharings.add(tuple(tuple(len(parameters) for _, parameters in found) for found in shared))
        if len(self._sharings) > MOST_SHARINGS:
            shared = [[pair for item in members.items() for pair in buckets(dict([item]))] for members in of_groups]
        for group, found in zip(view.param_groups, shared, strict=True):
            own = [overrides(group, key) for key, _ in found]
            parts = [{**group, "params": [*parameters], **new} for (_, parameters), new in zip(found, own, strict=True)]
            if "param_names" in group:
                # A group whose parameters were thinned out keeps all the names; torch does not look at them.
                name_of = dict(zip(map(id, group["params"]), group["param_names"], strict=False))
                for part in parts:
                    part["param_names"] = [name_of[id(p)] for p in part["params"] if id(p) in name_of]
            splits.append(Split(group, parts, own))
        view.param_groups = [part for split in splits for part in split.parts]
        return splits


# --- Factors ---------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")


class Factors:
    """One step's factors: numbers where reading them waits for nothing, else a tensor on the parameters' device.

    A factor that is not finite is 1. `numbers` is None where reading them would wait for the device.

    Args:
        raw: What the rule returned, shape `[n_layers]`, or plain numbers on the CPU.
        included: Which layers are not excluded; the factor of the others is 1.
        mask: The same as a tensor beside `raw`; None if all are included.
    """

    def __init__(self, raw: Tensor | list[float], included: Sequence[bool], mask: Tensor | None) -> None:
        self._raw, self._included, self._mask = raw, included, mask
        self._tensor: Tensor | None = None
        self._each: dict[torch.device, tuple[Tensor, ...]] = {}
        self.numbers: list[float] | None = None
        if not isinstance(raw, Tensor) and mask is None and all(map(isfinite, raw)):
            self.numbers = raw
        elif not isinstance(raw, Tensor) or raw.device.type == "cpu":
            self.numbers = self._read()
        # Nothing has to act then, and the optimizer steps as it is.
        self.neutral = self.numbers is not None and self.numbers.count(1.0) == len(self.numbers)

    def buckets(self, of_layer: Mapping[int, list[Item]]) -> Iterator[tuple[float, list[Item]]]:
        """Yield each distinct factor with what belongs to its layers.

        Args:
            of_layer: Layer's number to what belongs to it; the factor of `OUTSIDE` is 1.
        """
        numbers = self.read() if self.numbers is None else self.numbers
        found: dict[float, list[Item]] = {}
        for layer, items in of_layer.items():
            factor = 1.0 if layer == OUTSIDE else numbers[layer]
            found[factor] = found[factor] + items if factor in found else items
        return iter(found.items())

    @property
    def tensor(self) -> Tensor:
        """The factors on the parameters' device."""
        if self._tensor is None:
            if isinstance(self._raw, Tensor) and self.numbers is None:
                finite = finite_or_one(self._raw)
                self._tensor = finite if self._mask is None else torch.where(self._mask, finite, 1.0)
            else:
                self._tensor = torch.tensor(self.read(), dtype=torch.float64, device="cpu")
        return self._tensor

    def each(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the factors one by one, on the device of another tensor (a model may lie on several)."""
        if like.device not in self._each:
            self._each[like.device] = moved(self.tensor, like.device).unbind()
        return self._each[like.device]

    def read(self) -> list[float]:
        """Return the numbers; on an accelerator this waits for the device, once."""
        if self.numbers is None:
            self.numbers = self._read()
        return self.numbers

    def last(self) -> list[float]:
        """Return the numbers after the step and keep none: a replayed CUDA graph writes others into the same tensor."""
        kept, numbers = self.numbers, self.read()
        self.numbers = kept
        return numbers

    def _read(self) -> list[float]:
        raw: Any = self._raw
        if isinstance(self._raw, Tensor) and not has_values(self._raw):
            warn_without_values("factors that have to be read are 1", 2)
            return [1.0] * len(raw)
        numbers: list[float] = raw.tolist() if isinstance(self._raw, Tensor) else list(raw)
        if self._mask is None and all(map(isfinite, numbers)):
            return numbers
        return [x if inside and isfinite(x) else 1.0 for x, inside in zip(numbers, self._included, strict=True)]


# --- Places ----------------------------------------------------------------------------------------------------------

Writes = Callable[[Iterable[tuple[Tensor, Factor]]], None]
"""Takes factors of parameters, by which what the step writes into them is multiplied."""


@dataclass(eq=False, slots=True)
class Step:
    """One step, on which factors act.

    Args:
        view: A shallow copy of the optimizer, on which `step` will run. A place may replace its parameter groups; the
            optimizer's own are never touched.
        partition: Which parameters belong to which layer.
        factors: This step's factors.
        writes: Scales what the step writes; None where that is not possible.
        reads: Whether factors are read from a device, once a step. If not, they cost a launch for each tensor.
    """

    view: Any
    partition: Partition
    factors: Factors
    writes: Writes | None = None
    reads: bool = True

    def divide(self, overrides: Overrides) -> list[Split]:
        """Let parameters of different factors be stepped with different options; return how the groups were split."""
        return self.partition.split(self.view, self.factors.buckets, overrides)

    def scaled(self) -> list[tuple[Tensor, Factor]]:
        """Return parameters with their factors: numbers other than 1, or tensors where no number may be read.

        All rows of a parameter that is split are among them, in order.
        """
        layer_of, rows_of, factors = self.partition.layer_of, self.partition.rows_of, self.factors
        every: list[Tensor] = [p for group in self.view.param_groups for p in group["params"] if id(p) in layer_of]
        rows: list[Rows] = []
        if rows_of:
            for group in self.view.param_groups:
                for p in group["params"]:
                    rows += rows_of.get(id(p), ())
        if factors.numbers is None and (has_capturable(self.view) or not self.reads):
            return [(p, factors.each(p)[layer_of[id(p)]]) for p in every + rows]
        numbers = factors.read()
        scaled: list[tuple[Tensor, Factor]] = [
            (p, numbers[layer_of[id(p)]]) for p in every if numbers[layer_of[id(p)]] != 1
        ]
        return scaled + [(one, numbers[layer_of[id(one)]]) for one in rows]


class PrivateStep(Step):
    """A step whose groups only PyTorch's own `step` sees, so that nothing has to be carried over from them."""

    def divide(self, overrides: Overrides) -> list[Split]:
        """Let parameters of different factors be stepped with different options."""
        groups = self.view.param_groups
        self.view.param_groups = parts = []
        for group in groups:
            parameters = group["params"]
            # Torch's own optimizers would find the form anew for each part: on the CPU it is foreach=False.
            unset = parameters and parameters[0].is_cpu and group.get("foreach", False) is None
            form = {"foreach": False} if unset and not group.get("fused") else {}
            for factor, part in self.factors.buckets(self.partition.of(parameters).members):
                parts.append({**group, **form, "params": part, **overrides(group, factor)})
        return []


class Place(Protocol):
    """Where a factor acts."""

    def act(self, step: Step) -> list[Split]:
        """Act before the step; return how the view's groups were split."""
        ...

    def finish(self) -> None:
        """Act after the step."""


class LearningRate(Place):
    """`lr_l = lr · f_l`, for this step.

    Groups are divided, with tensors as rates where the factors are on the device and the optimizer takes them. Or what
    the step writes is scaled, which gives the same numbers.
    """

    def act(self, step: Step) -> list[Split]:
        """Divide the view's groups by rate, or scale what the step writes."""
        if step.writes is not None:
            step.writes(step.scaled())
            return []
        view, factors = step.view, step.factors
        if (
            factors.numbers is not None
            or not all(takes_tensor_rate(view, group) for group in view.param_groups)
            or len({p.device for group in view.param_groups for p in group["params"]}) > 1
        ):
            return step.divide(self._scaled)
        rates: dict[int, tuple[Tensor, ...]] = {}
        for group in view.param_groups:
            # The fused kernels read float32; the others promote with the parameters.
            wide = not group.get("fused") and any(p.dtype is torch.float64 for p in group["params"])
            with torch.no_grad():
                rates[id(group)] = (factors.tensor * group["lr"]).to(torch.float64 if wide else torch.float32).unbind()

        def tensor_rate(group: Mapping[str, Any], layer: int) -> dict[str, Any]:
            return {} if layer == OUTSIDE else {"lr": rates[id(group)][layer]}

        return step.partition.split(view, lambda of_layer: of_layer.items(), tensor_rate)

    @staticmethod
    def _scaled(group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        if factor == 1:
            return {}
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            return {"lr": rate * factor}
        with torch.set_grad_enabled(bool(group.get("differentiable"))):  # a rate may be learned through the step
            return {"lr": rate * factor}


SMALLEST_DIVISOR = 1e-3
"""Factors below this are applied to the gradient itself where the decay is to stay plain: λ/f would lose digits."""


def damps_history(optimizer: Any) -> bool:
    """Tell whether this is torch's SGD with momentum, not Nesterov's and without dampening, in every group.

    Its history is `v ← μv + (1 − dampening)(g + λw)`, so a factor inside the momentum can act through the dampening and
    leave the gradient alone.
    """
    if type(optimizer).step is not optim.SGD.step:
        return False
    for group in optimizer.param_groups:
        if not group["momentum"] or group["nesterov"] or group["dampening"] or group["differentiable"]:
            return False
    return True


class Gradient(Place):
    """`g_l ← f_l g_l` before the optimizer sees it, and `f_l λ w` of coupled weight decay when it is scaled.

    Args:
        decay: `"scaled"` multiplies coupled weight decay too, `"plain"` leaves it.
        in_place: Whether the gradient itself is to be multiplied. If not, the optimizer `damps_history` and gets the
            factor through its dampening, `v ← μv + (1 − dampening)(g + λw)`: the same numbers without a pass over
            memory. Where a gradient is sparse or the dampening in use, the gradient is multiplied.
    """

    def __init__(self, decay: str, *, in_place: bool) -> None:
        self.decay, self.in_place = decay, in_place
        self._started: tuple[Any, Any, list[Tensor]] | None = None

    def act(self, step: Step) -> list[Split]:
        """Scale the gradients, or what the optimizer multiplies them by."""
        self._started = None  # of a step that failed
        divides = step.factors.numbers is not None and not step.partition.rows_of
        if not self.in_place and divides:
            # The dampening multiplies g + λw, so to leave the decay plain λ is divided by f, which must not be small.
            possible = (
                self.decay == "scaled" or not has_decay(step.view) or min(step.factors.read()) >= SMALLEST_DIVISOR
            )
            if possible and self._begin_history(step.view):
                return step.divide(self._dampening)
        return self._in_gradients(step)

    @torch.no_grad()
    def _in_gradients(self, step: Step) -> list[Split]:
        view = step.view
        decayed = [group for group in view.param_groups if self.decay == "scaled" and _has_coupled_decay(view, group)]
        # On a device, f λ in the groups would divide them by layer, which costs launches. Rows are in no group alone.
        added = step.factors.numbers is None or bool(step.partition.rows_of)
        splits = self._add_decay(view, decayed) if decayed and added else []
        scale_in_place([(p.grad, factor) for p, factor in step.scaled() if p.grad is not None])
        if decayed and not added:
            return step.divide(lambda group, factor: self._decay(view, group, factor))
        return splits

    def finish(self) -> None:
        """Hand the momentum that the step has begun to the optimizer."""
        if self._started is not None:
            view, state, fresh = self._started
            for p in fresh:
                state[p] = view.state[p]
            view.state, self._started = state, None

    @staticmethod
    def _decay(view: Any, group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        if factor == 1 or not _has_coupled_decay(view, group):
            return {}
        return {"weight_decay": group["weight_decay"] * factor}

    @staticmethod
    def _add_decay(view: Any, decayed: Sequence[dict[str, Any]]) -> list[Split]:
        """Form g + λw in the gradients, and leave no decay to the step."""
        scale = getattr(view, "grad_scale", None)
        if scale is not None:  # the fused kernel would unscale the decay with the gradient
            gradients = [local(p.grad) for group in view.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, scale.reciprocal())
            view.grad_scale = None
        splits: list[Split] = []
        for group in decayed:
            inside = [p for p in group["params"] if p.grad is not None]
            if inside:
                sign = -1 if group.get("maximize") else 1  # with maximize, step() takes -g before it adds λw
                gradients: list[Any] = list(map(settled_gradient, inside))
                torch._foreach_add_(gradients, list(map(local, inside)), alpha=sign * group["weight_decay"])
                splits.append(Split(group, [{**group, "weight_decay": 0.0}], [{"weight_decay": 0.0}]))
        part_of = {id(split.source): split.parts[0] for split in splits}
        view.param_groups = [part_of.get(id(group), group) for group in view.param_groups]
        return splits

    def _begin_history(self, view: Any) -> bool:
        """Let the momentum begin from zero, in a copy of the state; return False where the dampening is not free."""
        state = view.state
        # Parameters in no layer too: while the view has a state of its own, what step() begins there is begun for all.
        fresh: list[Tensor] = []
        for group in view.param_groups:
            if group["dampening"]:  # of another adapter
                return False
            for p in group["params"]:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.layout is not torch.strided:
                    return False
                own = state.get(p)
                if own is None or own.get("momentum_buffer") is None:
                    fresh.append(p)
        if fresh:  # step() would start from a copy of g + λw; from zero it starts from f (g + λw)
            view.state = state.copy()  # the optimizer's own changes only when the step has been taken
            for p in fresh:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                view.state[p] = {**state.get(p, {}), "momentum_buffer": zeros}
            self._started = (view, state, fresh)
        return True

    def _dampening(self, group: Mapping[str, Any], factor: float) -> dict[str, Any]:
        """Return the options under which `1 − dampening` is f."""
        if factor == 1:
            return {}
        if self.decay == "scaled" or not group["weight_decay"]:
            return {"dampening": 1 - factor}
        return {"dampening": 1 - factor, "weight_decay": group["weight_decay"] / factor}


def _has_coupled_decay(view: Any, group: Mapping[str, Any]) -> bool:
    return bool(group.get("weight_decay")) and decay_is_coupled(view, group) is not False


def scale_in_place(tensors: Iterable[tuple[Tensor, Factor]]) -> None:
    """Multiply tensors, such as gradients, by their factors.

    The grouped kernel takes dense tensors of one type, and on the CPU it rounds the factor to the tensors' type.
    For half precision this loses digits and can give zero or infinity: sparse and half ones are multiplied one by one.
    """
    of_kind: dict[Any, tuple[list[Tensor], list[Any]]] = {}
    for tensor, factor in tensors:
        own = local(tensor)
        if own.layout is not torch.strided or (own.is_cpu and own.dtype in HALF):
            own.mul_(factor)
        else:
            alike, factors = of_kind.setdefault((own.dtype, own.device), ([], []))
            alike.append(own)
            factors.append(factor)
    for alike, factors in of_kind.values():
        torch._foreach_mul_(alike, factors)


class Update(Place):
    """`w ← w_old + f_l (w_new − w_old)`.

    What the step writes is scaled. Where its writes cannot be seen, a copy of the parameters is kept during the step:
    in compiled steps, and in those of other packages that communicate.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], list[Tensor], list[Any]] | None = None

    @torch.no_grad()
    def act(self, step: Step) -> list[Split]:
        """Scale what the step writes, or copy the parameters whose update will be scaled."""
        self._kept = None  # of a step that failed
        if step.writes is not None:
            step.writes(step.scaled())
            return []
        changed = [(local(p), factor) for p, factor in step.scaled() if p.grad is not None]
        parameters = [p for p, _ in changed]
        self._kept = (parameters, [p.clone() for p in parameters], [factor for _, factor in changed])
        return []

    @torch.no_grad()
    def finish(self) -> None:
        """Move from the old values towards the new ones, or past them."""
        if self._kept is not None:
            interpolate(*self._kept)
        self._kept = None


class FinishedStep:
    """`w ← w_old + f_l (w_new − w_old)`, with factors that follow from the finished step.

    It keeps a copy of the parameters during the step.

    Args:
        parameters: The parameters of all layers.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._old: dict[int, Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the parameters that the step may change."""
        held = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        # One launch for all of them on an accelerator, where clone() takes one each.
        copies: Any = torch._foreach_mul([local(self._parameters[i]) for i in held], 1) if held else ()
        self._old = dict(zip(held, copies, strict=True))

    def forget(self) -> None:
        """Drop the copies of a step that failed."""
        self._old = {}

    @property
    def old(self) -> list[Tensor | None]:
        """The values of each parameter before the step; None for one without a gradient."""
        return [self._old.get(i) for i in range(len(self._parameters))]

    @torch.no_grad()
    def scale(self, factors: Sequence[Factor]) -> None:
        """Move from the old values towards the new ones, or past them, by each parameter's factor."""
        old, self._old = self._old, {}
        together: list[int] = []
        for i, before in old.items():
            factor = factors[i]
            if isinstance(factor, Tensor) or not before.is_cpu:
                together.append(i)
            elif factor != 1:
                after = local(self._parameters[i])
                torch.lerp(before, after, factor, out=after)
        interpolate(
            [local(self._parameters[i]) for i in together], [old[i] for i in together], [factors[i] for i in together]
        )


def interpolate(parameters: Sequence[Tensor], old: Sequence[Tensor], factors: Sequence[Factor]) -> None:
    """Set parameters to `w_old + f (w − w_old)`; `old` is overwritten."""
    if not parameters:
        return
    # The kernel takes tensors of the parameters' type, to which half precision rounds the factor.
    weights = [f.to(p.dtype) if isinstance(f, Tensor) else f for p, f in zip(parameters, factors, strict=True)]
    # From the old values, because 1 - f of a small f would be 1 in half precision.
    torch._foreach_lerp_(list(old), list(parameters), cast(Any, weights))
    torch._foreach_copy_(list(parameters), list(old))


def make_place(name: PlaceName, decay: str, *, dampens: bool) -> Place:
    """Return the place of this name.

    Args:
        name: One of `layerwise.optimizers.PLACES`.
        decay: `"scaled"` or `"plain"`, for `"gradient"`.
        dampens: Whether the factor may act through the dampening, with the same numbers.
    """
    if name == "gradient":
        return Gradient(decay, in_place=not dampens)
    return LearningRate() if name == "lr" else Update()
