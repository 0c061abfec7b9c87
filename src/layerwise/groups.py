"""Permanent parameter groups, one a layer."""

from __future__ import annotations

import warnings
from typing import Any

from .advice import flattened
from .layers import LayerSpecification, TensorLayers, as_specification, make_layers, unique_names
from .model import Model, as_module, named_parameters


def param_groups(model: Model, layers: LayerSpecification = "module") -> list[dict[str, Any]]:
    """Return named parameter groups, one a layer, to build an optimizer from.

    For rates that are set by hand and kept; `LayerwiseLR` needs no such groups. Every parameter of the model
    that requires a gradient must be in a layer, so that none is forgotten.

    Args:
        model: The network, or a list or dictionary of networks, whose names then begin with their index or key.
        layers: As in `LayerwiseLR`: `"module"`, `"parameter"`, a list of patterns, a callable or a dictionary
            of tensors.

    Returns:
        Groups `{"params": [...], "param_names": [...], "name": layer}` in the model's order; a parameter that does not
        require a gradient is left out.

    Raises:
        TypeError: `model` is no module, nor a list or dictionary of modules, or `layers` has the wrong type.
        ValueError: `layers` is unknown, matches nothing, or leaves a parameter out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> groups = param_groups(model)
        >>> groups[0]["lr"] = 0.01
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('0', 0.01), ('2', 0.1)]
    """
    module = as_module(model)
    if module is None:
        raise TypeError("model must be a torch.nn.Module, or a list or dict of them, not None")
    named = unique_names((name, p) for name, p in named_parameters(module) if p.requires_grad)
    if not named:
        raise ValueError(f"model={type(model).__name__} has no parameter that requires a gradient")
    specification = as_specification(layers)
    if isinstance(specification, TensorLayers):
        specification.named({id(p) for p in named.values()}, module, "the model's parameters that require a gradient")
    found = make_layers(named, specification, module)
    for message in flattened(found, specification):
        warnings.warn(message, UserWarning, stacklevel=2)
    missing = named.keys() - {name for layer in found for name in layer.parameter_names}
    if missing:
        raise ValueError(f"layers={layers!r} leaves out {sorted(missing)}; add a pattern such as '*' for the rest")
    return [
        {"params": list(layer.parameters), "param_names": list(layer.parameter_names), "name": layer.name}
        for layer in found
    ]
