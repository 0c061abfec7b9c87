"""Factors that come to be piece by piece: each just before the update of its layers, so that both read a warm cache.

Where the numbers of a step are larger than the caches, the norm and the update each read every gradient from memory.
Here a few megabytes of layers are measured, updated, and only then the next ones measured: the same numbers, read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor, nn

from .factors import Factors, Item, gathered
from .layer_statistics import Groups, LayerStatistics
from .layers import Layer
from .rules.elementwise import ElementwiseRule

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
