"""What happens to a rule's state when it is saved, loaded, or meets new layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from .._arguments import has_type
from .._tensors import moved
from .base import State

logger = logging.getLogger("layerwise")


def is_state(value: object) -> TypeGuard[State]:
    """Tell whether this may be a state, or a part of one."""
    return isinstance(value, dict)


def carried_over(fresh: State, old: State, names: Sequence[str], old_names: Sequence[str]) -> State:
    """Return the fresh state of a rule with what is still true of the old one, when layers have come or gone.

    A tensor with a row a layer keeps the rows of the layers that are still there; numbers and scalars are kept; what
    has changed its form otherwise starts anew.

    Args:
        fresh: What the rule's `init` returned for the new layers.
        old: The state so far.
        names: The new layers.
        old_names: The layers so far.
    """
    result = dict(fresh)
    for name, value in fresh.items():
        before = old.get(name)
        if name not in old or is_derived(name):
            continue
        if value == {} and is_state(before):  # one that fills as training goes on, by names of its own
            result[name] = before
        elif is_state(value) and is_state(before):
            result[name] = carried_over(value, before, names, old_names)
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
    for row, name in enumerate(names):
        if name in old_names:
            result[row] = moved(old[list(old_names).index(name)], fresh.device)
    return result


def copied(state: Any) -> Any:
    """Return a state with its tensors copied, so that later steps do not change what was saved."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if is_state(state):
        return {name: copied(value) for name, value in state.items() if not is_derived(name)}
    return state


def is_derived(name: str) -> bool:
    """Tell whether an entry follows from the rule's arguments, so that it is neither saved nor loaded."""
    return name.startswith("_")


def check_saved(saved: Any, rule: Any, layers: Sequence[str]) -> None:
    """Raise unless this is the saved state of an adapter with this kind of rule and these layers.

    A rule with other arguments is told of in the log: a run that goes on with another threshold does so on purpose.

    Args:
        saved: What `state_dict()` returned.
        rule: The rule that is to go on.
        layers: Names of the layers.

    Raises:
        TypeError: It is no mapping.
        ValueError: It is incomplete, or of another version, rule or layers.
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
    name, arguments = kind_of(rule), described(rule)
    if saved["rule"] != name:
        raise ValueError(
            f"the state was saved for the rule {saved['rule']}, this adapter has {name}; attach the same rule"
        )
    if not isinstance(saved["epoch"], int) or saved["epoch"] < 1:
        raise ValueError(f"epoch={saved['epoch']!r} of the state must be a whole number of at least 1")
    if saved.get("arguments") and saved["arguments"] != arguments:
        logger.warning("the state was saved for %s; it goes on with %s", saved["arguments"], arguments)


def kind_of(rule: Any) -> str:
    """Return what a rule is but for its arguments: the name of its class, and of those that it is made of."""
    return getattr(rule, "rule_kind", type(rule).__name__)


def described(rule: Any) -> str:
    """Return a rule with its arguments in words, to compare and to tell: without places in memory."""
    return re.sub(
        r" at 0x[0-9a-fA-F]+", "", re.sub(r"<(?:[\w<>]+\.)*(\w+) object at 0x[0-9a-fA-F]+>", r"\1", repr(rule))
    )


def loaded(saved: Any, current: Any, where: str) -> Any:
    """Return the saved state, on the device of the current one, if it has its form."""
    if is_state(saved) != is_state(current) or isinstance(saved, Tensor) != isinstance(current, Tensor):
        raise ValueError(f"{where} is {type(saved).__name__} in the file, {type(current).__name__} here; same rule?")
    if is_state(current):
        wanted = sorted(name for name in current if not is_derived(name))
        if sorted(saved) != wanted:
            raise ValueError(
                f"{where} holds {sorted(saved)} in the file, {wanted} here; attach the same rule (a rule of your own "
                "returns every entry of its state from init(layers, device) already)"
            )
        return {**current, **{name: loaded(saved[name], current[name], f"{where}[{name!r}]") for name in wanted}}
    if isinstance(current, Tensor):
        if saved.shape != current.shape:
            raise ValueError(f"{where} has shape {tuple(saved.shape)} in the file, {tuple(current.shape)} here")
        # As saved: training may have made it wider than `init` did. Apple's devices have no float64.
        dtype = current.dtype if current.device.type == "mps" else saved.dtype
        return saved.to(current.device, dtype, copy=True)
    return saved
