"""Fused kernels, called once for each factor, without a parameter group for each.

With a parameter group for each layer an optimizer gathers, sorts and checks the tensors of each group anew. A fused
kernel takes all of them at once, and its rate may be a tensor. Here that tensor is a `DealtRate`, which receives the
kernel's call through PyTorch's `__torch_function__` and makes one call of it for each factor.

Between two such calls the factors of the next layers can be measured, while their gradients are in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import unwrap
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import _disable_current_modes

from ._tensors import shards_of
from ._writes import FUSED
from .apply import Factors, Item, Overrides, Split, Step
from .layers import Layer
from .rules.elementwise import ElementwiseRule
from .statistics import Groups, LayerStatistics

Deal = Callable[[Sequence[Tensor]], Iterable[tuple[Sequence[int], Mapping[str, Any]]]]
"""The parameters of a kernel's call, to parts of them: their positions, and the options in which their call differs."""


class DealtRate(Tensor):
    """A rate that deals the tensors of a fused kernel's call out to several calls."""

    rate: float
    deal: Deal

    @classmethod
    def of(cls, rate: float, deal: Deal) -> DealtRate:
        """Return a rate that deals the tensors out.

        Args:
            rate: The rate of the parts whose options name no other.
            deal: See `Deal`.
        """
        made = torch.tensor(rate, dtype=torch.float64, device="cpu").as_subclass(cls)
        made.rate, made.deal = rate, deal
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call for each part, where the function is a fused kernel; else do what any tensor does."""
        options = kwargs or {}
        dealt = options.get("lr")
        if func not in FUSED or not isinstance(dealt, cls):
            plain: Any = super()
            return plain.__torch_function__(func, types, args, options)
        shards = shards_of(args)
        for positions, own in dealt.deal(args[0]):
            # A list that these options do not use is empty.
            lists = [[tensors[i] for i in positions] if tensors else [] for tensors in shards]
            func(*lists, **{**options, "lr": dealt.rate, **own})
        return None


def can_be_dealt(optimizer: optim.Optimizer) -> bool:
    """Tell whether a fused kernel steps each group of an optimizer, and is given the rate as it stands there."""
    every = all(group.get("fused") and isinstance(group["lr"], int | float) for group in optimizer.param_groups)
    kind: Any = type(optimizer)
    return every and _hands_on_the_rate(kind.step)


@cache
def _hands_on_the_rate(step: Callable[..., Any]) -> bool:
    """Tell whether this is a step of PyTorch's that hands the rate on to the kernel untouched, by trying it once."""
    inner = unwrap(step)  # without hooks, which belong to one optimizer
    kinds: tuple[Any, ...] = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
    kind = next((kind for kind in kinds if unwrap(kind.step) is inner), None)
    if kind is None:
        return False
    with _disable_current_modes():  # under fake tensors no value could be read, and the answer is kept
        return _hands_on_the_rate_of(kind, inner)


def _hands_on_the_rate_of(kind: Any, inner: Callable[..., Any]) -> bool:
    parameters = [torch.nn.Parameter(torch.zeros(1, device="cpu")) for _ in range(2)]
    for p in parameters:
        p.grad = torch.ones(1, device="cpu")
    try:
        optimizer = kind(parameters, lr=1.0, fused=True)
        optimizer.param_groups[0]["lr"] = DealtRate.of(1.0, lambda _: [((0,), {"lr": 0.5}), ((1,), {})])
        with torch.no_grad():
            inner(optimizer)
    except (RuntimeError, TypeError, ValueError):  # another PyTorch: groups give the same numbers
        return False
    return [round(p.item(), 3) for p in parameters] == [-0.5, -1.0]


class DealtStep(Step):
    """A step by fused kernels, of which each call is dealt out by factor."""

    def divide(self, overrides: Overrides) -> list[Split]:
        """Let parameters of different factors be stepped with different options."""
        self.view.param_groups = [self._dealt(group, overrides) for group in self.view.param_groups]
        return []

    def _dealt(self, group: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
        def deal(parameters: Sequence[Tensor]) -> Iterator[tuple[list[int], dict[str, Any]]]:
            for factor, positions in self.factors.buckets(self.partition.of(parameters).positions):
                yield positions, overrides(group, factor)

        return {**group, "lr": DealtRate.of(group["lr"], deal)}


# --- Factors measured between calls of a fused kernel ----------------------------------------------------------------

# Where the numbers of a step are larger than the caches, the norm and the update each read every gradient from memory.
# Here a few megabytes of layers are measured, updated, and only then the next ones: the same numbers, read once.

CHUNK = 2**19
"""Numbers from which on layers make up a chunk: 2 MB of float32."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """Layers in chunks that are measured together, and the rule that computes their factors.

    Args:
        rule: The rule.
        count: The number of layers.
        members: For each chunk the numbers of its layers, and what measures them.
        chunk_of: Number of a layer to that of its chunk; the factor of a layer that has none is 1.
    """

    rule: ElementwiseRule
    count: int
    members: list[tuple[list[int], LayerStatistics]]
    chunk_of: dict[int, int]


def make_chunks(layers: Sequence[Layer], rule: ElementwiseRule) -> Chunks | None:
    """Return the layers that are not excluded in chunks; None where that saves nothing, or is not safe.

    A rule of the user may raise, so all its factors are computed before anything has changed. Parameters that share
    memory would be measured after the update of one of them. Other classes (lazy, fake, quantised) may have no memory.
    """
    parameters = [p for layer in layers for p in layer.parameters]
    if not type(rule).__module__.startswith(f"{__package__}.rules."):
        return None
    if not {Tensor, nn.Parameter}.issuperset(map(type, parameters)):
        return None
    if len({p.untyped_storage().data_ptr() for p in parameters}) < len(parameters):
        return None
    chunks: list[list[int]] = [[]]
    size = 0
    for number, layer in enumerate(layers):
        if not layer.included:
            continue
        if size >= CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(number)
        size += sum(p.numel() for p in layer.parameters)
    if len(chunks) == 1:
        return None
    members = [(chunk, LayerStatistics([layers[number] for number in chunk], rule.needs)) for chunk in chunks]
    return Chunks(rule, len(layers), members, {layer: i for i, chunk in enumerate(chunks) for layer in chunk})


class FactorsInChunks(Factors):
    """One step's factors, which are computed when a part of the step needs them.

    Args:
        chunks: The layers in chunks.
        groups: The optimizer's parameter groups.
    """

    def __init__(self, chunks: Chunks, groups: Groups) -> None:
        self._known = [1.0] * chunks.count
        super().__init__(self._known, (), None)
        self.neutral = False
        self._chunks, self._groups = chunks, groups
        self._missing = set(range(len(chunks.members)))

    def complete(self) -> None:
        """Measure what is missing."""
        for number in sorted(self._missing):
            self._measure(number)

    def buckets(self, of_layer: Mapping[int, list[Item]]) -> Iterator[tuple[float, list[Item]]]:
        """Yield each distinct factor of a chunk with what belongs to its layers; measure each chunk in its turn."""
        by_chunk: dict[int | None, dict[int, list[Item]]] = {}
        for layer, items in of_layer.items():
            by_chunk.setdefault(self._chunks.chunk_of.get(layer), {})[layer] = items
        for number, members in by_chunk.items():
            if number in self._missing:
                self._measure(number)
            yield from super().buckets(members)

    def _measure(self, number: int) -> None:
        layers, statistics = self._chunks.members[number]
        factors = self._chunks.rule.numbers(statistics.numbers(self._groups))
        for layer, factor in zip(layers, factors, strict=True):
            self._known[layer] = factor if isfinite(factor) else 1.0
        self._missing.remove(number)
