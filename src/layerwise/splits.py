"""A parameter group, the parts that `step` sees in its place, and what `step` wrote into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .tensors import same_objects


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


def write_back(splits: Sequence[Split], optimizer: str) -> None:
    """Carry what `step` wrote into the parts of a group over to the group.

    Some optimizers count their steps in their parameter groups. Parts that agree are carried over.

    Args:
        splits: The groups and their parts.
        optimizer: Its name, for the message.

    Raises:
        RuntimeError: The parts of one group disagree, so that the group's value is not known; nothing is carried over.
    """
    written = [(split.source, _agreed(split, optimizer)) for split in splits if not split.unchanged()]
    for source, values in written:
        source.update(values)


def _agreed(split: Split, optimizer: str) -> dict[str, Any]:
    """Return what all parts of a group hold in place of the group's values."""
    if len(split.parts) > 1 and split.written_in_place():  # once for each part, instead of once
        raise RuntimeError(_disagreement(optimizer, split.written_in_place()[0]))
    found: dict[str, list[Any]] = {}
    for part, own in zip(split.parts, split.overrides, strict=True):
        for name, value in part.items():
            if name in ("params", "param_names") or value is (own if name in own else split.source).get(name):
                continue
            if name in own:
                raise RuntimeError(_disagreement(optimizer, name))
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        if len(values) != len(split.parts) or not all(_same(values[0], value) for value in values):
            raise RuntimeError(_disagreement(optimizer, name))
    return {name: values[0] for name, values in found.items()}


def _disagreement(optimizer: str, name: str) -> str:
    return (
        f"{optimizer} keeps state of its own in param_groups[...][{name!r}], and it came out differently for different "
        "layers; attach with apply='update', which leaves the groups whole (this step was taken with per-layer groups)"
    )


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False  # comparing would wait for the device
    return bool(first == second)
