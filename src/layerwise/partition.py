"""Parameter groups -> parts of one layer, or of layers with equal factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .tensors import same_objects

OUTSIDE = -1
"""The layer number of a parameter that belongs to no layer; its factor is 1."""


class Split:
    """The parts that `step` sees in place of a parameter group.

    Args:
        source: The group.
        parts: Groups like it, each with some of its parameters.
        overrides: For each part the values that differ on purpose.
    """

    __slots__ = ("before", "overrides", "parts", "source", "tensors")

    def __init__(
        self, source: dict[str, Any], parts: list[dict[str, Any]], overrides: Sequence[Mapping[str, Any]]
    ) -> None:
        self.source, self.parts, self.overrides = source, parts, overrides

    def remember(self) -> None:
        """Take down what the parts hold, for `unchanged`."""
        self.before = [list(part.values()) for part in self.parts]
        # The parts share the group's tensors.
        own = [item for override in self.overrides for item in override.items()]
        self.tensors = [(name, x, x._version) for name, x in (*self.source.items(), *own) if isinstance(x, Tensor)]

    def unchanged(self) -> bool:
        """Tell whether nothing has been written into the parts since `remember`."""
        return not self.written_in_place() and all(
            same_objects(before, list(part.values())) for before, part in zip(self.before, self.parts, strict=True)
        )

    def written_in_place(self) -> list[str]:
        """Return the names of tensors that were written into."""
        return [name for name, tensor, version in self.tensors if tensor._version != version]


class Partition:
    """Which parameters of which group belong to which layer.

    Args:
        layer_of: id of parameter to layer number.
    """

    def __init__(self, layer_of: Mapping[int, int]) -> None:
        self.layer_of = layer_of
        self._cached: dict[int, tuple[list[Tensor], list[Tensor], list[tuple[int, list[Tensor]]]]] = {}
        self._dealt: tuple[list[Tensor], list[tuple[int, list[int]]]] = ([], [])

    def of(self, number: int, parameters: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """Return each layer of a group with its parameters there; `OUTSIDE` for those in no layer.

        Args:
            number: The group's number in the list of groups, under which the answer is kept for the next step.
            parameters: The group's parameters.
        """
        cached = self._cached.get(number)
        if cached is None or cached[0] is not parameters or not same_objects(cached[1], parameters):
            layers: dict[int, list[Tensor]] = {}
            for p in parameters:
                layers.setdefault(self.layer_of.get(id(p), OUTSIDE), []).append(p)
            cached = self._cached[number] = (parameters, list(parameters), list(layers.items()))
        return cached[2]

    def members(self, view: Any) -> list[tuple[Tensor, int]]:
        """Return the parameters that have a gradient and a layer, each with its layer's number."""
        layer_of = self.layer_of
        every = [p for group in view.param_groups for p in group["params"]]
        return [(p, layer_of[id(p)]) for p in every if p.grad is not None and id(p) in layer_of]

    def positions(self, parameters: Sequence[Tensor], key: Callable[[int], float]) -> dict[float, list[int]]:
        """Return for each distinct key the positions of its parameters.

        Args:
            parameters: The parameters.
            key: As for `split`.
        """
        if not same_objects(self._dealt[0], parameters):
            of_layer: dict[int, list[int]] = {}
            for position, p in enumerate(parameters):
                of_layer.setdefault(self.layer_of.get(id(p), OUTSIDE), []).append(position)
            self._dealt = (list(parameters), list(of_layer.items()))
        found: dict[float, list[int]] = {}
        for layer, positions in self._dealt[1]:
            bucket = key(layer)
            found[bucket] = found[bucket] + positions if bucket in found else positions
        return found

    def split(
        self, view: Any, key: Callable[[int], Any], overrides: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    ) -> list[Split]:
        """Replace the view's groups by one group for each distinct key, and return how each was split.

        Layers with equal keys share a group, because each group costs an unfused optimizer a round of kernels.

        Args:
            view: The view.
            key: Layer number (or `OUTSIDE`) to a hashable key.
            overrides: (group, key) to the values that the new group has of its own.
        """
        splits: list[Split] = []
        for number, group in enumerate(view.param_groups):
            buckets: dict[Any, list[Tensor]] = {}
            for layer, parameters in self.of(number, group["params"]):
                bucket = key(layer)
                buckets[bucket] = buckets[bucket] + parameters if bucket in buckets else parameters
            own = [overrides(group, bucket) for bucket in buckets]
            parts = [
                {**group, "params": [*parameters], **values}
                for parameters, values in zip(buckets.values(), own, strict=True)
            ]
            if "param_names" in group:
                # A group whose parameters were thinned out keeps all the names; torch does not look at them.
                name_of = dict(zip(map(id, group["params"]), group["param_names"], strict=False))
                for part in parts:
                    part["param_names"] = [name_of[id(p)] for p in part["params"] if id(p) in name_of]
            splits.append(Split(group, parts, own))
        view.param_groups = [part for split in splits for part in split.parts]
        return splits


def factor_of(numbers: Sequence[float]) -> Callable[[int], float]:
    """Return the function from a layer's number to its factor; 1 for parameters in no layer."""
    return lambda layer: 1.0 if layer == OUTSIDE else numbers[layer]
