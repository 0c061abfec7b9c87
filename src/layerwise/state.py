"""What happens to a rule's state when it is saved, loaded, or meets new layers."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from .rules.base import State


def carried_over(fresh: State, old: State) -> State:
    """Return the fresh state of a rule, with what the old one has in the same form: counters survive new layers."""
    kept = dict(fresh)
    for name, value in fresh.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            kept[name] = carried_over(cast(State, value), cast(State, before))
        elif isinstance(value, Tensor):
            if isinstance(before, Tensor) and value.ndim == 0 == before.ndim:
                kept[name] = before
        elif name in old:
            kept[name] = before
    return kept


def copied(state: Any) -> Any:
    """Return a state with its tensors copied, so that later steps do not change what was saved."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items() if not derived(name)}
    return state


def derived(name: str) -> bool:
    """Tell whether an entry follows from the rule's arguments, so that it is neither saved nor loaded."""
    return name.startswith("_")


def loaded(saved: Any, current: Any, where: str) -> Any:
    """Return the saved state in the form, and on the device, of the current one."""
    if type(saved) is not type(current):
        raise ValueError(f"{where} is {type(saved).__name__} in the file, {type(current).__name__} here; same rule?")
    if isinstance(current, dict):
        wanted = sorted(name for name in current if not derived(name))
        if sorted(saved) != wanted:
            raise ValueError(f"{where} holds {sorted(saved)} in the file, {wanted} here; attach the same rule")
        return {**current, **{name: loaded(saved[name], current[name], f"{where}[{name!r}]") for name in wanted}}
    if isinstance(current, Tensor):
        if saved.shape != current.shape:
            raise ValueError(f"{where} has shape {tuple(saved.shape)} in the file, {tuple(current.shape)} here")
        return saved.to(current.device, current.dtype, copy=True)
    return saved
