"""Permanent parameter groups: one a layer, or those of a rule whose factors never change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._arguments import chosen, has_type
from ..layers import (
    LayerSpecification,
    Model,
    as_module,
    as_specification,
    check_patterns,
    flattened,
    make_layers,
    named_parameters,
    names_tensors,
    tensors_by_name,
    unique_names,
)
from ..statistics import NOTHING
from .base import Rule, finite_or_one, is_number
from .state import State, described, is_state, saved_names

NoDecay = Literal["auto"] | Sequence[str] | Callable[[str, Tensor], bool] | None


def param_groups(
    model: Model,
    rule: Rule | LayerSpecification | None = None,
    *,
    layers: LayerSpecification | Literal["auto"] = "auto",
    lr: float | None = None,
    weight_decay: float = 0.0,
    no_decay: NoDecay = "auto",
) -> list[dict[str, Any]]:
    """Return named parameter groups to build an optimizer from: one a layer, or those of a rule.

    Without a rule there is one group a layer, for rates that are set by hand; `LayerwiseLR` needs no such groups. A
    rule whose factors never change (`Constant`, `LayerDecay`, `ByRole`, `LoRAPlus`, `WidthDepth`, their `chain`) gives
    each group its own rate, `lr · f_l`, and parameters of equal settings share one. Such groups need no hook, cost
    nothing in a step, and serve what makes or owns its optimizer itself, such as DeepSpeed. Schedulers multiply each
    group's own rate.

    Every parameter of the model that requires a gradient must be in a layer.

    Args:
        model: The network, or a list or dictionary of networks, whose names then begin with their index or key.
        rule: A rule whose factors never change; None for a group a layer.
        layers: As in `LayerwiseLR`: `"module"`, `"parameter"`, a list of patterns, a callable or a dictionary
            of tensors. `"auto"`: what the rule's paper took, `"module"` without a rule. Without a rule, this may also
            be the second argument.
        lr: The rate of a layer with factor 1, which a rule needs.
        weight_decay: The weight decay, with a rule.
        no_decay: What has no weight decay, with a rule: `"auto"` (parameters of at most one dimension: biases and
            gains of normalisations), patterns of parameter names, a callable `(name, parameter) -> bool`, or None.

    Returns:
        Groups `{"params": [...], "param_names": [...], "name": ...}` in the model's order, with `"lr"` and
        `"weight_decay"` under a rule; a parameter that does not require a gradient is left out.

    Raises:
        TypeError: `model` is neither a module nor a list or dictionary of modules, or an argument has the wrong type.
        ValueError: An argument is out of its range, the layers leave a parameter out, or the rule's factors change:
            attach that with `LayerwiseLR`.

    Example:
        >>> from torch import nn
        >>> from layerwise.rules import LayerDecay
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [group["name"] for group in param_groups(model)]
        ['0', '2']
        >>> optimizer = torch.optim.AdamW(param_groups(model, LayerDecay(0.5), lr=0.01, weight_decay=0.1))
        >>> for group in optimizer.param_groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], group["param_names"])
        lr x 0.5 0.005 0.1 ['0.weight']
        lr x 0.5, no decay 0.005 0.0 ['0.bias']
        lr x 1 0.01 0.1 ['2.weight']
        lr x 1, no decay 0.01 0.0 ['2.bias']
    """
    if rule is not None and not isinstance(rule, Rule):
        rule, layers = None, rule
    module = as_module(model)
    if module is None:
        raise TypeError("model must be a torch.nn.Module, or a list or dict of them, not None")
    named = unique_names((name, p) for name, p in named_parameters(module) if p.requires_grad)
    if not named:
        raise ValueError(f"model={type(model).__name__} has no parameter that requires a gradient")
    specification = as_specification(chosen(layers, None if rule is None else rule.default_layers, "module"))
    if names_tensors(specification):
        held = {id(p) for p in named.values()}
        tensors_by_name(specification, held, module, "the model's parameters that require a gradient")
    found = make_layers(named, specification, module)
    doubts = flattened(found, specification) + ([] if rule is None else rule.doubts(found))
    for message in doubts:
        warnings.warn(message, stacklevel=2)
    missing = named.keys() - {name for layer in found for name in layer.parameter_names}
    if missing:
        raise ValueError(f"layers={layers!r} leaves out {sorted(missing)}; add a pattern such as '*' for the rest")
    if rule is None:
        if lr is not None or weight_decay or no_decay != "auto":
            raise ValueError("lr, weight_decay and no_decay are for the groups of a rule: pass one as second argument")
        return [
            {"params": list(layer.parameters), "param_names": list(layer.parameter_names), "name": layer.name}
            for layer in found
        ]
    if lr is None or not (is_number(lr) and 0 <= lr < math.inf):
        raise ValueError(f"lr={lr!r} must be the rate of a layer with factor 1, a finite number of at least 0")
    if not (is_number(weight_decay) and 0 <= weight_decay < math.inf):
        raise ValueError(f"weight_decay={weight_decay!r} must be a finite number of at least 0")
    state = rule.init(found, torch.device("cpu"))
    if rule.needs or not _is_constant(state):
        raise ValueError(f"the factors of {described(rule)} change from step to step: attach it with LayerwiseLR")
    factors: list[float] = cast(Any, finite_or_one(rule.factors(NOTHING, state)[0])).tolist()
    is_bare = _without_decay(no_decay, list(named))
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for layer, factor in zip(found, factors, strict=True):
        for name, p in zip(layer.parameter_names, layer.parameters, strict=True):
            bare = bool(weight_decay) and is_bare(name, p)
            group = groups.setdefault(
                (factor, bare),
                {
                    "params": [],
                    "param_names": [],
                    "name": f"lr x {factor:.6g}{', no decay' if bare else ''}",
                    "lr": lr * factor,
                    "weight_decay": 0.0 if bare else float(weight_decay),
                },
            )
            group["params"].append(p)
            group["param_names"].append(name)
    return list(groups.values())


def _is_constant(state: State) -> bool:
    """Return whether a rule remembers nothing, so that its factors are the same at every step."""
    return all(is_state(state[name]) and _is_constant(state[name]) for name in saved_names(state))


def _without_decay(no_decay: Any, names: Sequence[str]) -> Callable[[str, Tensor], bool]:
    if no_decay is None:
        return lambda name, p: False
    if no_decay == "auto":
        return lambda name, p: p.ndim <= 1
    if callable(no_decay):
        return cast("Callable[[str, Tensor], bool]", no_decay)
    if isinstance(no_decay, str) or not has_type(no_decay, Sequence):
        raise TypeError(f"no_decay={no_decay!r} must be 'auto', None, patterns, or a callable (name, parameter)")
    check_patterns(no_decay, names, "no_decay")
    return lambda name, p: any(fnmatchcase(name, pattern) for pattern in no_decay)
