"""A parameter group, the parts that `step` sees in its place, and what `step` wrote into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

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
