"""The models that are accepted, and the clean names of their parameters and modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

Model = nn.Module | Sequence[Any] | Mapping[str, Any]
"""A module, or a list or dictionary of modules."""

# Components that wrappers insert into names, anywhere. `module`, of DDP and AveragedModel, only comes first.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_module"
    r"|(?:_functional\.)?_torch_params)(?:\.|$)"
)
_LEADING = re.compile(r"^(?:module(?:\.|$))+")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original(\d*)$")
ATTENTION = re.compile(r"^(?:(.*)\.)?(?:in_proj|q_proj|k_proj|v_proj)_weight$")


class SeveralModules(nn.Module):
    """A container of modules whose names `nn.ModuleDict` might refuse."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = dict(modules)
        self._modules.update(modules)  # `add_module` refuses the names of methods


def as_module(model: Any) -> nn.Module | None:
    """Return the module, or a container of the modules of a list or dictionary, named by index or key.

    Args:
        model: A module, a list or dictionary of modules (or of such lists and dictionaries), or None.

    Raises:
        TypeError: The model is, or holds, anything else.
        ValueError: The list or dictionary is empty.

    Example:
        >>> critics = as_module([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
        >>> [name for name, _ in critics.named_parameters()]
        ['0.weight', '1.weight']
    """
    return None if model is None else _as_module(model, "model")


def _as_module(model: Any, where: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Tensor):
        raise TypeError(
            f"{where} is a tensor, not a torch.nn.Module: name bare tensors with layers={{'name': [tensor]}}"
        )
    if isinstance(model, Mapping):
        parts = cast("Mapping[Any, Any]", model)
    elif isinstance(model, list | tuple):
        parts = {str(i): part for i, part in enumerate(cast("Sequence[Any]", model))}
    else:
        raise TypeError(
            f"{where} must be a torch.nn.Module{' or None' * (where == 'model')}, or a list or dict of modules, as "
            f"torch.nn.ModuleList and ModuleDict take them, not {type(model).__name__}"
        )
    if not parts:
        raise ValueError(f"{where}={model!r} holds no module")
    for key in parts:
        if not isinstance(key, str) or not key or "." in key:
            raise TypeError(f"{where} has the key {key!r}; keys must be strings without dots, and not empty")
    return SeveralModules({key: _as_module(part, f"{where}[{key!r}]") for key, part in parts.items()})


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of the model once, with its clean name."""
    for name, parameter in model.named_parameters():
        yield _clean_in(model, name), parameter


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by clean name. A wrapper and its inner module share one; the inner module is kept."""
    found: Iterable[tuple[str, nn.Module]] = cast(Any, model).named_modules()
    return {_clean_in(model, name).rstrip("."): module for name, module in found}


def _clean_in(model: nn.Module, name: str) -> str:
    if isinstance(model, SeveralModules) and name:
        key, _, rest = name.partition(".")
        part = model.parts[key]
        return f"{key}.{_clean_in(part, rest)}".rstrip(".")
    return clean_name(name)


def clean_name(name: str) -> str:
    """Return a parameter's or module's name without the prefixes that wrappers add.

    DDP, `torch.compile`, FSDP, activation checkpointing, Fabric, Opacus and Keras insert a component into names.
    `torch.nn.utils.parametrize` moves `weight` to `parametrizations.weight.original`.

    Args:
        name: A name as `named_parameters()` gives it.

    Returns:
        The name of the same parameter in the bare model.

    Example:
        >>> clean_name("module._orig_mod.encoder.parametrizations.weight.original0")
        'encoder.weight0'
    """
    return _PARAMETRIZED.sub(r"\1\2", _LEADING.sub("", _WRAPPER.sub("", name)))


def owner_name(parameter_name: str) -> str:
    """Return the clean name of the module that directly owns a parameter.

    Parameters of a parametrization belong to the parametrized module. Keras keeps all parameters of a model
    in one dictionary whose keys are paths; the owner is then the path without its last part.

    Example:
        >>> owner_name("encoder.0.weight"), owner_name("weight"), owner_name("encoder/dense/kernel")
        ('encoder.0', '', 'encoder/dense')
    """
    owner = parameter_name[: max(parameter_name.rfind("."), parameter_name.rfind("/"), 0)]
    return re.split(r"(?:^|\.)parametrizations(?:\.|$)", owner, maxsplit=1)[0]


class Owners:
    """Maps a parameter's name to the name of the module that is its layer.

    Usually this is the module that directly owns the parameter. Some classes are one layer with all modules below
    them. `MultiheadAttention` keeps its output projection in a child. Convolutions of PyTorch Geometric keep weight and
    bias in different modules. Adapters that PEFT inserts into them stay separate layers.

    Args:
        names: Clean names of parameters. Without a model they identify a `MultiheadAttention`.
        model: The model, or None.
    """

    def __init__(self, names: Iterable[str], model: nn.Module | None) -> None:
        self.modules = {} if model is None else named_modules(model)
        self._whole = {name for name, module in self.modules.items() if is_one_layer(module)}
        self._adapters = {
            f"{name}.{child}".lstrip(".")
            for name, module in self.modules.items()
            for child in getattr(module, "adapter_layer_names", ())
        }
        attentions = [found[1] or "" for name in names if model is None and (found := ATTENTION.match(name))]
        self._projections = {f"{name}.out_proj".lstrip("."): name for name in attentions}

    def __call__(self, parameter_name: str) -> str:
        """Return the clean name of the module whose layer a parameter belongs to."""
        owner = owner_name(parameter_name)
        if not self._whole:
            return self._projections.get(owner, owner)
        result = owner
        # Walk up from the owner. The outermost such module counts; an adapter ends the walk.
        while True:
            if owner in self._whole:
                result = owner
            if not owner or owner in self._adapters:
                return result
            owner = owner.rpartition(".")[0]


def is_one_layer(module: nn.Module) -> bool:
    """Tell whether a module of this class is one layer with all modules below it."""
    return isinstance(module, nn.MultiheadAttention) or any(
        one.__name__ == "MessagePassing" and one.__module__.partition(".")[0] == "torch_geometric"
        for one in type(module).__mro__
    )
