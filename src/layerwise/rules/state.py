"""What happens to a rule's state when it is saved, loaded, or meets new layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from .._arguments import has_type
from .._tensors import moved

logger = logging.getLogger("layerwise")

State = dict[str, Any]
"""A rule's memory: a dictionary of tensors and plain numbers, so that `torch.load(weights_only=True)` reads it.

An entry whose name begins with an underscore follows from the rule's arguments; it is neither saved nor loaded.
"""


def is_state(value: object) -> TypeGuard[State]:
    """Return whether a value may be a state, or a part of one."""
    return isinstance(value, dict)


def saved_names(state: State) -> list[str]:
    """Return the names of the entries that are saved and loaded."""
    return [name for name in state if not name.startswith("_")]


def copied(state: Any) -> Any:
    """Return the saved entries of a state with their tensors copied, so that later steps do not change them."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return {name: copied(state[name]) for name in saved_names(state)} if is_state(state) else state


def loaded(saved: Any, current: Any, where: str) -> Any:
    """Return the saved state, on the device of the current one; raise a ValueError if their forms differ."""
    if is_state(saved) != is_state(current) or isinstance(saved, Tensor) != isinstance(current, Tensor):
        raise ValueError(f"{where} is {type(saved).__name__} in the file, {type(current).__name__} here; same rule?")
    if is_state(current):
        wanted = saved_names(current)
        if set(saved) != set(wanted):
            raise ValueError(
                f"{where} holds {sorted(saved)} in the file, {sorted(wanted)} here; attach the same rule (a rule of "
                "your own returns every entry of its state from init(layers, device) already)"
            )
        return {**current, **{name: loaded(saved[name], current[name], f"{where}[{name!r}]") for name in wanted}}
    if isinstance(current, Tensor):
        if saved.shape != current.shape:
            raise ValueError(f"{where} has shape {tuple(saved.shape)} in the file, {tuple(current.shape)} here")
        # As saved: training may have made it wider than `init` did. Apple's devices have no float64.
        dtype = current.dtype if current.device.type == "mps" else saved.dtype
        return saved.to(current.device, dtype, copy=True)
    return saved


def carried_over(fresh: State, old: State, names: Sequence[str], old_names: Sequence[str]) -> State:
    """Return the fresh state of a rule with what is still true of the old one, when layers have come or gone.

    A tensor with one row per layer keeps the rows of the layers that are still there. Numbers and scalars are kept.
    Entries that have changed their form otherwise start anew.
    """
    result = dict(fresh)
    for name in saved_names(fresh):
        if name not in old:
            continue
        value, before = fresh[name], old[name]
        if is_state(value) and is_state(before):
            # An empty entry fills as training goes on, by names of its own.
            result[name] = carried_over(value, before, names, old_names) if value else before
        elif isinstance(value, Tensor) and isinstance(before, Tensor):
            result[name] = _rows(value, before, names, old_names)
        elif not isinstance(value, dict | Tensor):
            result[name] = before
    return result


def _rows(fresh: Tensor, old: Tensor, names: Sequence[str], old_names: Sequence[str]) -> Tensor:
    if fresh.shape == old.shape and (fresh.ndim == 0 or list(names) == list(old_names)):
        return moved(old, fresh.device)
    by_layer = fresh.ndim > 0 and len(fresh) == len(names) and old.ndim > 0 and len(old) == len(old_names)
    if not by_layer or fresh.shape[1:] != old.shape[1:]:
        return fresh
    result = fresh.clone()
    row_of = {name: row for row, name in enumerate(old_names)}
    for row, name in enumerate(names):
        if name in row_of:
            result[row] = moved(old[row_of[name]], fresh.device)
    return result


def changed_tensors(old: State, new: State) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of a state that has another value in the new one, with that value.

    Raises:
        ValueError: Something else than values of tensors has changed; the message names it.

    Example:
        >>> changed_tensors({"epoch": 1}, {"epoch": 1})
        []
        >>> changed_tensors({"step": 3}, {"step": 4})
        Traceback (most recent call last):
        ValueError: 'step' goes from 3 to 4
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if before is after:
            continue
        if is_state(before) and is_state(after):
            pairs += changed_tensors(before, after)
        elif isinstance(before, Tensor) and isinstance(after, Tensor) and _form(before) == _form(after):
            pairs.append((before, after))
        elif isinstance(before, (Tensor, list, tuple)) or isinstance(after, Tensor) or before != after:
            raise ValueError(f"{name!r} goes from {_in_words(before)} to {_in_words(after)}")
    return pairs


def _form(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return "a dictionary" if is_state(value) else repr(value)


def copy_into(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write values into tensors, each of which keeps its memory, so that a replay of a CUDA graph goes on from there.

    Example:
        >>> import torch
        >>> first, second = torch.zeros(1), torch.ones(1)
        >>> copy_into([(first, second), (second, first)])
        >>> first, second
        (tensor([1.]), tensor([0.]))
    """
    # A value that is a view of another entry's tensor would be overwritten before it is read.
    for target, value in [(target, value.clone()) for target, value in pairs]:
        target.copy_(value)


def check_saved(saved: Any, rule: Any, layers: Sequence[str]) -> None:
    """Raise unless this is the saved state of an adapter with this kind of rule and these layers.

    If the rule's arguments differ, the log names both: a run may continue with another threshold on purpose.
    """
    if not has_type(saved, Mapping):
        raise TypeError(f"state_dict must be what state_dict() returned, not {type(saved).__name__}")
    missing = sorted({"version", "rule", "layers", "epoch", "state"} - set(saved))
    if missing:
        raise ValueError(f"this is no state of a LayerwiseLR: it lacks {missing}")
    if saved["version"] != 1:
        raise ValueError(f"version={saved['version']!r} of the state is unknown; this layerwise reads version 1")
    if list(saved["layers"]) != list(layers):
        raise ValueError(
            f"the state was saved for the layers {list(saved['layers'])}, this adapter has {list(layers)}; attach with "
            "the same model and the same layers="
        )
    if saved["rule"] != rule.rule_kind:
        raise ValueError(
            f"the state was saved for the rule {saved['rule']}, this adapter has {rule.rule_kind}; attach the same rule"
        )
    if not isinstance(saved["epoch"], int) or saved["epoch"] < 1:
        raise ValueError(f"epoch={saved['epoch']!r} of the state must be a whole number of at least 1")
    if saved.get("arguments") and saved["arguments"] != described(rule):
        logger.warning("the state was saved for %s; it goes on with %s", saved["arguments"], described(rule))


def described(rule: object) -> str:
    """Return the `repr` of a rule without addresses in memory."""
    without_class = re.sub(r"<(?:[\w<>]+\.)*(\w+) object at 0x[0-9a-fA-F]+>", r"\1", repr(rule))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", without_class)
