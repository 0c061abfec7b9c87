"""Parameter groups -> parts of one layer, or of layers with equal factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .splits import Split
from .tensors import same_objects

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
