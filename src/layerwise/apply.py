"""The places where a factor acts: on the gradient, on the rate, on the update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import isfinite
from operator import is_
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn, optim

from ._fused import DealtRate, can_be_dealt
from ._tensors import has_values, local, moved, same_objects, warn_without_values
from ._writes import Factor
from .layers import Layer
from .optimizers import (
    PlaceName,
    decay_is_coupled,
    has_decay,
    is_capturing,
    takes_tensor_rate,
)
from .rules.base import ElementwiseRule, finite_or_one
from .sharding import settled_gradient
from .statistics import Groups, LayerStatistics

NOT_STATE = ("params", "param_names", "lr")
MOST_NUMBERS = 1024
"""The largest tensor in a group of which each part gets its own copy; smaller ones are counters and the like."""


class Split:
    """The parts that `step` sees in place of a parameter group.

    Args:
        source: The group.
        parts: Groups like it, each with some of its parameters.
        overrides: For each part the values that differ by design.
    """

    __slots__ = ("given", "marks", "overrides", "parts", "source")

    def __init__(
        self, source: dict[str, Any], parts: list[dict[str, Any]], overrides: Sequence[Mapping[str, Any]]
    ) -> None:
        self.source, self.parts, self.overrides = source, parts, overrides

    def remember(self) -> None:
        """Give each part its own copy of what `step` may change in place, and record what the parts hold."""
        changeable = [name for name, value in self.source.items() if name != "params" and can_change(value)]
        if changeable and len(self.parts) > 1:
            for part, own in zip(self.parts, self.overrides, strict=True):
                part.update(
                    {name: own_copy(part[name]) for name in changeable if name not in NOT_STATE and name not in own}
                )
        self.given = [dict(part) for part in self.parts]
        names = {*changeable, *(name for own in self.overrides for name, value in own.items() if can_change(value))}
        self.marks = [[(name, mark(part[name])) for name in names if name in part] for part in self.parts]

    def written(self) -> list[dict[str, Any]]:
        """Return for each part the values that have changed since `remember`."""
        found: list[dict[str, Any]] = []
        for part, given, marks in zip(self.parts, self.given, self.marks, strict=True):
            written = {name: value for name, value in part.items() if value is not given.get(name)}
            written |= {name: part[name] for name, before in marks if name in part and mark(part[name]) != before}
            found.append({name: value for name, value in written.items() if name not in ("params", "param_names")})
        return found


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
    agreed = [_agreed(split, optimizer) for split in splits]
    if any(agreed) and len(splits) > 1:
        # A default value is one object in all groups, which the bare step would change once for each group.
        held = Counter(id(value) for split in splits for value in split.source.values() if can_change(value))
        for split, values in zip(splits, agreed, strict=True):
            for name in values:
                if held[id(split.source.get(name))] > 1 and any(len(split.parts) > 1 for split in splits):
                    raise RuntimeError(_disagreement(optimizer, name))
    for split, values in zip(splits, agreed, strict=True):
        for name, value in values.items():
            _carry(split, name, value)


def _carry(split: Split, name: str, value: Any) -> None:
    """Set a value of the group; in place where `step` changed a part's copy in place."""
    kept: Any = split.source.get(name)
    if value is kept:
        return
    in_place = any(value is given.get(name) for given in split.given) and type(value) is type(kept)
    if in_place and isinstance(value, Tensor):
        with torch.no_grad():
            kept.copy_(value)
    elif in_place and isinstance(value, list):
        kept[:] = value
    elif in_place and isinstance(value, (dict, set)):
        kept.clear()
        kept.update(value)
    else:
        split.source[name] = value


def _agreed(split: Split, optimizer: str) -> dict[str, Any]:
    """Return the changed values on which all parts of a group agree."""
    written = split.written()
    names = dict.fromkeys(name for values in written for name in values)
    for name in names:
        # The bare step handles the group as a whole, so a part without gradients may be unchanged.
        at_work = [values for part, values in zip(split.parts, written, strict=True) if name in values or _moves(part)]
        values = [values[name] for values in at_work if name in values]
        # An object that all parts share was changed once for each part instead of once.
        shared = len(split.parts) > 1 and values[0] is split.source.get(name)
        own = any(name in override for override in split.overrides)
        if shared or own or len(values) != len(at_work) or not all(_same(values[0], other) for other in values[1:]):
            raise RuntimeError(_disagreement(optimizer, name))
    return {name: next(values[name] for values in written if name in values) for name in names}


def _moves(part: Mapping[str, Any]) -> bool:
    return any(p.grad is not None for p in part["params"])


def _disagreement(optimizer: str, name: str) -> str:
    return (
        f"{optimizer} keeps state of its own in param_groups[...][{name!r}], and this step, with per-layer groups, "
        "gave it different values for different layers. The step has moved the weights: go on from a checkpoint, and "
        "attach with apply='update', which leaves the groups whole"
    )


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


# --- Partition -------------------------------------------------------------------------------------------------------

Buckets = Callable[[Mapping[int, list[Tensor]]], Iterable[tuple[Any, list[Tensor]]]]
Overrides = Callable[[Mapping[str, Any], Any], dict[str, Any]]
"""(group, key) to the options that differ under this key."""
OUTSIDE = -1
"""The layer number of a parameter that belongs to no layer; its factor is 1."""
MOST_SHARINGS = 2
"""With `steady`, the most different ways of sharing groups; after that each layer gets its own group."""


class Partition:
    """Which parameters of which group belong to which layer.

    Args:
        layer_of: id of parameter to layer number.
    """

    def __init__(self, layer_of: Mapping[int, int]) -> None:
        self.layer_of = layer_of
        self._cached: dict[int, tuple[list[Tensor], dict[int, list[int]], dict[int, list[Tensor]]]] = {}
        self._sharings: set[tuple[tuple[int, ...], ...]] = set()

    def positions(self, parameters: Sequence[Tensor]) -> dict[int, list[int]]:
        """Return the positions of each layer's parameters in a list; `OUTSIDE` for those in no layer.

        Args:
            parameters: The list, for which the answer is kept for the next step.
        """
        return self._of(parameters)[1]

    def members_of_layers(self, parameters: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return each layer's parameters in a list, under the same numbers."""
        cached = self._cached.get(id(parameters[0]) if parameters else 0)
        if cached is not None and len(cached[0]) == len(parameters) and all(map(is_, cached[0], parameters)):
            return cached[2]
        return self._of(parameters)[2]

    def _of(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, list[int]], dict[int, list[Tensor]]]:
        key = id(parameters[0]) if parameters else 0
        cached = self._cached.get(key)
        if cached is None or not same_objects(cached[0], parameters):
            kept, positions = list(parameters), dict[int, list[int]]()
            for position, p in enumerate(kept):
                positions.setdefault(self.layer_of.get(id(p), OUTSIDE), []).append(position)
            members = {layer: [kept[i] for i in found] for layer, found in positions.items()}
            cached = self._cached[key] = (kept, positions, members)
        return cached

    def members(self, view: Any) -> list[tuple[Tensor, int]]:
        """Return the parameters that have a gradient and a layer, each with its layer's number."""
        layer_of = self.layer_of
        every = [p for group in view.param_groups for p in group["params"]]
        return [(p, layer_of[id(p)]) for p in every if p.grad is not None and id(p) in layer_of]

    def split(self, view: Any, buckets: Buckets, overrides: Overrides, *, steady: bool = False) -> list[Split]:
        """Replace the view's groups by one group for each distinct key, and return how each was split.

        Layers with equal keys share a group, because each group costs an unfused optimizer a round of kernels.

        Args:
            view: The view.
            buckets: Layer number (or `OUTSIDE`) to parameters, to pairs of a key and parameters.
            overrides: (group, key) to the values that the new group has of its own.
            steady: Whether the groups should be the same from step to step where layers share keys in other ways each
                time: `step` may have compiled a function for tensors of just this shape, and fail at the ninth.
        """
        splits: list[Split] = []
        shared = [list(buckets(self.members_of_layers(group["params"]))) for group in view.param_groups]
        if steady and self._varies(shared):
            of_groups = [self.members_of_layers(group["params"]) for group in view.param_groups]
            shared = [[pair for item in group.items() for pair in buckets(dict([item]))] for group in of_groups]
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

    def _varies(self, shared: Sequence[Sequence[tuple[Any, list[Tensor]]]]) -> bool:
        """Tell whether there have been more than a few ways in which layers share groups."""
        if len(self._sharings) <= MOST_SHARINGS:
            self._sharings.add(tuple(tuple(len(parameters) for _, parameters in found) for found in shared))
        return len(self._sharings) > MOST_SHARINGS


# --- Factors ---------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")


class Factors:
    """One step's factors: numbers where reading them waits for nothing, else a tensor on the parameters' device.

    A factor that is not finite is 1.

    Args:
        raw: What the rule returned, shape `[n_layers]`, or plain numbers on the CPU.
        included: Which layers are not excluded; the factor of the others is 1.
        mask: The same as a tensor beside `raw`; None if all are included.
    """

    def __init__(self, raw: Tensor | list[float], included: Sequence[bool], mask: Tensor | None) -> None:
        self._raw, self._included, self._mask = raw, included, mask
        self._tensor: Tensor | None = None
        self._each: dict[torch.device, tuple[Tensor, ...]] = {}
        if isinstance(raw, Tensor):
            self._numbers = self._read() if raw.device.type == "cpu" else None
        else:
            self._numbers = raw if mask is None and all(map(isfinite, raw)) else self._read()
        # Nothing has to act then, and the optimizer steps as it is.
        self.neutral = self._numbers is not None and self._numbers.count(1.0) == len(self._numbers)

    @property
    def on_device(self) -> bool:
        """Whether reading the factors would wait for the device."""
        return self._numbers is None

    @property
    def numbers(self) -> list[float] | None:
        """The factors as plain numbers; None where reading them would wait for the device."""
        return None if self._numbers is None else self.read()

    def buckets(self, of_layer: Mapping[int, list[Item]]) -> Iterator[tuple[float, list[Item]]]:
        """Yield each distinct factor with what belongs to its layers.

        Args:
            of_layer: Layer's number to what belongs to it; the factor of `OUTSIDE` is 1.
        """
        numbers = self.read() if self._numbers is None else self._numbers
        found: dict[float, list[Item]] = {}
        for layer, items in of_layer.items():
            factor = 1.0 if layer == OUTSIDE else numbers[layer]
            found[factor] = found[factor] + items if factor in found else items
        return iter(found.items())

    @property
    def tensor(self) -> Tensor:
        """The factors on the parameters' device."""
        if self._tensor is None:
            if isinstance(self._raw, Tensor) and self._numbers is None:
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
        self.complete()
        if self._numbers is None:
            self._numbers = self._read()
        return self._numbers

    def last(self) -> list[float]:
        """Return the numbers after the step and keep none: a replayed CUDA graph writes others into the same tensor."""
        kept, numbers = self._numbers, self.read()
        self._numbers = kept
        return numbers

    def complete(self) -> None:
        """Compute what has not been asked for yet."""

    def _read(self) -> list[float]:
        raw: Any = self._raw
        if isinstance(self._raw, Tensor) and not has_values(self._raw):
            warn_without_values("factors that have to be read are 1", 2)
            return [1.0] * len(raw)
        numbers: list[float] = raw.tolist() if isinstance(self._raw, Tensor) else list(raw)
        if self._mask is None and all(map(isfinite, numbers)):
            return numbers
        return [x if inside and isfinite(x) else 1.0 for x, inside in zip(numbers, self._included, strict=True)]


def gathered(
    numbers: Sequence[float], of_layer: Iterable[tuple[int, list[Item]]]
) -> Iterator[tuple[float, list[Item]]]:
    """Return each distinct factor with what belongs to its layers.

    Args:
        numbers: The factor of each layer.
        of_layer: Numbers of layers, each with what belongs to it.
    """
    found: dict[float, list[Item]] = {}
    for layer, items in of_layer:
        factor = 1.0 if layer == OUTSIDE else numbers[layer]
        found[factor] = found[factor] + items if factor in found else items
    return iter(found.items())


# --- Factors measured between calls of a fused kernel ----------------------------------------------------------------

# Where the numbers of a step are larger than the caches, the norm and the update each read every gradient from memory.
# Here a few megabytes of layers are measured, updated, and only then the next ones: the same numbers, read once.

PIECE = 2**19
"""Numbers from which on layers make up a piece: 2 MB of float32."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Layers in pieces that are measured together, and the rule that is asked for their factors.

    Args:
        rule: The rule.
        count: The number of layers.
        members: For each piece the numbers of its layers, and what measures them.
        piece_of: Number of a layer to that of its piece; the factor of a layer that has none is 1.
    """

    rule: ElementwiseRule
    count: int
    members: list[tuple[list[int], LayerStatistics]]
    piece_of: dict[int, int]


def make_pieces(layers: Sequence[Layer], rule: ElementwiseRule) -> Pieces | None:
    """Return the layers that are not excluded in pieces; None where there is no gain in that, or no safety.

    A rule of somebody's own may raise, and is therefore asked for everything before anything has changed. Parameters
    that share memory would be measured after the update of one of them; of a class of their own (lazy, fake, quantised
    ones) they may have no memory to ask for.
    """
    parameters = [p for layer in layers for p in layer.parameters]
    if not type(rule).__module__.startswith(f"{__package__}.rules."):
        return None
    if not {Tensor, nn.Parameter}.issuperset(map(type, parameters)):
        return None
    if len({p.untyped_storage().data_ptr() for p in parameters}) < len(parameters):
        return None
    pieces: list[list[int]] = [[]]
    size = 0
    for number, layer in enumerate(layers):
        if not layer.included:
            continue
        if size >= PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(number)
        size += sum(p.numel() for p in layer.parameters)
    if len(pieces) == 1:
        return None
    members = [(piece, LayerStatistics([layers[number] for number in piece], rule.needs)) for piece in pieces]
    return Pieces(rule, len(layers), members, {layer: i for i, piece in enumerate(pieces) for layer in piece})


class LateFactors(Factors):
    """One step's factors, which come to be when they are asked for.

    Args:
        pieces: The layers in pieces.
        groups: The optimizer's parameter groups.
    """

    def __init__(self, pieces: Pieces, groups: Groups) -> None:
        self._known = [1.0] * pieces.count
        super().__init__(self._known, (), None)
        self._numbers, self.neutral = self._known, False
        self._pieces, self._groups = pieces, groups
        self._missing = set(range(len(pieces.members)))

    def complete(self) -> None:
        """Measure what is missing."""
        for number in sorted(self._missing):
            self._measure(number)

    def buckets(self, of_layer: Mapping[int, list[Item]]) -> Iterator[tuple[float, list[Item]]]:
        """Yield each distinct factor of a piece with what belongs to its layers; measure each piece in its turn."""
        by_piece: dict[int | None, list[tuple[int, list[Item]]]] = {}
        for layer, items in of_layer.items():
            by_piece.setdefault(self._pieces.piece_of.get(layer), []).append((layer, items))
        for number, members in by_piece.items():
            if number in self._missing:
                self._measure(number)
            yield from gathered(self._known, members)

    def _measure(self, number: int) -> None:
        layers, statistics = self._pieces.members[number]
        factors = self._pieces.rule.numbers(statistics.numbers(self._groups))
        for layer, factor in zip(layers, factors, strict=True):
            self._known[layer] = factor if isfinite(factor) else 1.0
        self._missing.remove(number)


# --- Places ----------------------------------------------------------------------------------------------------------

# A place is handed a *view* of the optimizer, a shallow copy on which `step` will run, and may replace the view's
# parameter groups; the optimizer's own are never touched.

HALF = (torch.float16, torch.bfloat16)


Writes = Callable[[Iterable[tuple[Tensor, Factor]]], None]
"""Takes factors of parameters, by which what the step writes into them is multiplied."""


class Place(Protocol):
    """Where a factor acts."""

    reads: bool = True
    """Whether factors are read from a device, once a step. If not, they cost a launch for each tensor."""

    def act(
        self,
        view: Any,
        partition: Partition,
        factors: Factors,
        *,
        private: bool = False,
        writes: Writes | None = None,
    ) -> list[Split]:
        """Act before the step; return how the view's groups were split.

        Args:
            view: The view.
            partition: Which parameters belong to which layer.
            factors: This step's factors.
            private: Whether only PyTorch's own `step` sees the view's groups.
            writes: Scales what the step writes; None where that is not possible.
        """
        ...

    def finish(self) -> None:
        """Act after the step."""
        ...


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
    groups: list[dict[str, Any]] = view.param_groups
    if groups[0].get("fused") and can_be_dealt(view):
        view.param_groups = [dealt(group, partition, factors, overrides) for group in groups]
        return []
    view.param_groups = parts = []
    for group in groups:
        parameters = group["params"]
        # Torch's own optimizers would find the form anew for each part: on the CPU it is foreach=False.
        unset = parameters and parameters[0].is_cpu and group.get("foreach", False) is None and not group.get("fused")
        form = {"foreach": False} if unset else {}
        for factor, part in factors.buckets(partition.members_of_layers(parameters)):
            parts.append({**group, **form, "params": part, **overrides(group, factor)})
    return []


def dealt(group: dict[str, Any], partition: Partition, factors: Factors, overrides: Overrides) -> dict[str, Any]:
    """Return a group of which a fused kernel's call is dealt out by factor."""

    def deal(parameters: Sequence[Tensor]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for factor, positions in factors.buckets(partition.positions(parameters)):
            yield positions, overrides(group, factor)

    return {**group, "lr": DealtRate.of(group["lr"], deal)}


def scale_writes(writes: Writes, view: Any, partition: Partition, factors: Factors) -> None:
    """Scale what the step writes, with numbers that are read once, or without a read where steps are captured."""
    layer_of = partition.layer_of
    members = [(p, layer_of[id(p)]) for group in view.param_groups for p in group["params"] if id(p) in layer_of]
    if factors.on_device and is_capturing(view):
        writes((p, factors.each(p)[layer]) for p, layer in members)
    else:
        numbers = factors.read()
        writes((p, numbers[layer]) for p, layer in members if numbers[layer] != 1)


class LearningRate(Place):
    """`lr_l = lr · f_l`, for this step.

    Groups are divided, with tensors as rates where the factors are on the device and the optimizer takes them. Or what
    the step writes is scaled, which gives the same numbers.
    """

    def act(
        self,
        view: Any,
        partition: Partition,
        factors: Factors,
        *,
        private: bool = False,
        writes: Writes | None = None,
    ) -> list[Split]:
        """Divide the view's groups by rate, or scale what the step writes."""
        if writes is not None:
            scale_writes(writes, view, partition, factors)
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
        """Nothing is left to do."""


SMALLEST_DIVISOR = 1e-3
"""Factors below this are applied to the gradient itself where the decay is to stay plain: λ/f would lose digits."""


def damps_history(optimizer: optim.Optimizer) -> bool:
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
        in_place: Whether the gradient itself is to be multiplied. If not, torch's SGD with momentum gets the factor
            through its dampening, `v ← μv + (1 − dampening)(g + λw)`: the same numbers without a pass over memory.
    """

    def __init__(self, decay: str, *, in_place: bool) -> None:
        self.decay, self.in_place = decay, in_place
        self._started: tuple[Any, Any, list[Tensor]] | None = None

    def act(
        self,
        view: Any,
        partition: Partition,
        factors: Factors,
        *,
        private: bool = False,
        writes: Writes | None = None,
    ) -> list[Split]:
        """Scale the gradients, or what the optimizer multiplies them by."""
        self._started = None  # of a step that failed
        if not self.in_place and not factors.on_device and damps_history(view):
            # The dampening multiplies g + λw, so to leave the decay plain λ is divided by f, which must not be small.
            possible = self.decay == "scaled" or not has_decay(view) or min(factors.read()) >= SMALLEST_DIVISOR
            if possible and self._begin_history(view):
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

    def _begin_history(self, view: Any) -> bool:
        """Let the momentum begin from zero, in a copy of the state; return False where a gradient is sparse."""
        state = view.state
        # Parameters in no layer too: while the view has a state of its own, what step() begins there is begun for all.
        fresh: list[Tensor] = []
        for group in view.param_groups:
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


class Update(Place):
    """`w ← w_old + f_l (w_new − w_old)`.

    What the step writes is scaled. Where its writes cannot be seen, a copy of the parameters is kept during the step:
    in compiled steps, and in those of other packages that communicate or could not be tried.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], list[Tensor], list[Any]] | None = None

    @torch.no_grad()
    def act(
        self,
        view: Any,
        partition: Partition,
        factors: Factors,
        *,
        private: bool = False,
        writes: Writes | None = None,
    ) -> list[Split]:
        """Scale what the step writes, or copy the parameters whose update will be scaled."""
        self._kept = None  # of a step that failed
        if writes is not None:
            scale_writes(writes, view, partition, factors)
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
