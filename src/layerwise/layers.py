"""From parameters to layers: models, names, patterns, permanent groups."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, Literal, NamedTuple, TypeGuard, cast

from torch import Tensor, nn

from ._arguments import has_type
from ._rows import Rows, is_rows
from ._tensors import can_be_measured, holds_weights, warn_without_values
from .sharding import Shard, stand_in

Model = nn.Module | Sequence[Any] | Mapping[str, Any]
"""A module, or a list or dictionary of modules."""


class SeveralModules(nn.Module):
    """A container of modules whose names `nn.ModuleDict` might refuse."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        super().__init__()
        self.parts = dict(modules)
        self._modules.update(modules)  # `add_module` refuses the names of methods


def as_module(model: Any, where: str = "model") -> nn.Module | None:
    """Return the module, or a container of the modules of a (nested) list or dictionary, named by index or key."""
    if isinstance(model, nn.Module) or (model is None and where == "model"):
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
    return SeveralModules({key: as_module(part, f"{where}[{key!r}]") for key, part in parts.items()})


# --- Names -----------------------------------------------------------------------------------------------------------

# Components that wrappers insert into names, anywhere. `module`, of DDP and AveragedModel, only comes first.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_module"
    r"|(?:_functional\.)?_torch_params)(?:\.|$)"
)
_LEADING = re.compile(r"^(?:module(?:\.|$))+")
_PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.original(\d*)$")
_ATTENTION = re.compile(r"^(?:(.*)\.)?(?:in_proj|q_proj|k_proj|v_proj)_weight$")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of the model once, with its clean name."""
    for name, parameter in model.named_parameters():
        yield _clean_in(model, name), parameter


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by clean name. A wrapper and its inner module share one; the inner module is kept."""
    found: Iterable[tuple[str, nn.Module]] = cast(Any, model).named_modules()
    return {_clean_in(model, name): module for name, module in found}


def _clean_in(model: nn.Module, name: str) -> str:
    if not isinstance(model, SeveralModules) or not name:
        return clean_name(name)
    key, _, rest = name.partition(".")
    return f"{key}.{_clean_in(model.parts[key], rest)}".rstrip(".")


def clean_name(name: str) -> str:
    """Return a parameter's or module's name in the bare model, without what wrappers and parametrizations add."""
    return _PARAMETRIZED.sub(r"\1\2", _LEADING.sub("", _WRAPPER.sub("", name))).rstrip(".")


def owner_name(parameter_name: str) -> str:
    """Return the name of the module that directly owns a parameter: "encoder.0" of "encoder.0.weight"."""
    owner = parameter_name[: max(parameter_name.rfind("."), parameter_name.rfind("/"), 0)]  # Keras has paths
    return re.split(r"(?:^|\.)parametrizations(?:\.|$)", owner, maxsplit=1)[0]


def _owners(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return by parameter name the name of the module that is its layer.

    Usually this module directly owns the parameter. A module that `is_one_layer` takes all parameters below it, except
    those of adapters that PEFT inserts. Without modules, a `MultiheadAttention` is recognised by its parameters' names.
    """
    whole = {name for name, module in modules.items() if is_one_layer(module)}
    adapters = {
        f"{name}.{child}".lstrip(".")
        for name, module in modules.items()
        for child in getattr(module, "adapter_layer_names", ())
    }
    attentions = [found[1] or "" for name in names if not modules and (found := _ATTENTION.match(name))]
    projections = {f"{name}.out_proj".lstrip("."): name for name in attentions}
    owners: dict[str, str] = {}
    for name in names:
        above = owner_name(name)
        owners[name] = projections.get(above, above)
        while above not in adapters:  # the outermost module counts
            if above in whole:
                owners[name] = above
            if not above:
                break
            above = above.rpartition(".")[0]
    return owners


def is_one_layer(module: nn.Module) -> bool:
    """Return whether a module is one layer with all modules below it.

    `MultiheadAttention` keeps its output projection in a child. Convolutions of PyTorch Geometric keep weight and bias
    in different modules.
    """
    return isinstance(module, nn.MultiheadAttention) or is_message_passing(module)


def is_message_passing(module: nn.Module | None) -> bool:
    """Return whether a module is a convolution of PyTorch Geometric, which is not imported for it."""
    return any(
        one.__name__ == "MessagePassing" and one.__module__.partition(".")[0] == "torch_geometric"
        for one in type(module).__mro__
    )


# --- Layers ----------------------------------------------------------------------------------------------------------

LayerName = Callable[[str, Tensor], "str | None"]
"""A function of a parameter's name and the parameter that names its layer, or None for no layer."""

Exclusion = Sequence[str] | Callable[[str, Tensor], bool] | None
"""Layers left at factor 1: patterns of layer names, or a function of a parameter's name and the parameter."""

LayerSpecification = Literal["module", "parameter", "unit"] | Sequence[str] | LayerName | Mapping[str, Iterable[Tensor]]


def names_tensors(layers: object) -> TypeGuard[Mapping[str, Sequence[Tensor]]]:
    """Return whether a specification, which `as_specification` has returned, is a dictionary of tensors."""
    return isinstance(layers, Mapping)


def as_specification(layers: Any) -> Any:
    """Return the argument `layers`; a dictionary of tensors is checked, and its values become tuples."""
    if not isinstance(layers, Mapping):
        return layers
    if not layers:
        raise ValueError("layers={} names no layer; pass a name and its tensors: {'name': [tensor]}")
    result: dict[str, tuple[Tensor, ...]] = {}
    seen: dict[int, str] = {}
    for layer, tensors in cast("Mapping[Any, Any]", layers).items():
        if not isinstance(layer, str):
            raise TypeError(f"layers holds the key {layer!r} ({type(layer).__name__}); names of layers are strings")
        if isinstance(tensors, Tensor) or not has_type(tensors, Iterable):
            raise TypeError(f"layers[{layer!r}] is a {type(tensors).__name__}; pass a list of tensors: [tensor]")
        result[layer] = tuple(tensors)
        if not result[layer]:
            raise ValueError(f"layers[{layer!r}] holds no tensor; leave the layer out")
        for p in result[layer]:
            if not has_type(p, Tensor):
                raise TypeError(f"layers[{layer!r}] holds {type(p).__name__}, not tensors; parameters() gives these")
            if id(p) in seen:
                raise ValueError(
                    f"a tensor of shape {tuple(p.shape)} is in layers[{seen[id(p)]!r}] and layers[{layer!r}]; each "
                    "tensor belongs to one layer, once"
                )
            seen[id(p)] = layer
    return result


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters that share one factor.

    Args:
        name: The layer's name; `""` is the root module, as in `torch.nn.Module.named_modules`.
        parameters: The layer's parameters that the optimizer holds, in the model's order.
        parameter_names: Their names, without the prefixes of wrappers.
        module: The module that owns them, when there is one such module and the model is known.
        included: Whether the layer is not excluded; the factor of an excluded one is 1.
        shards: This process's shard of each parameter; None, also in place of all of them, for one that is not sharded.
        dimension: Of the rows that have a factor each, in its only parameter; None where it has one factor.
    """

    name: str
    parameters: tuple[Tensor, ...]
    parameter_names: tuple[str, ...] = ()
    module: nn.Module | None = field(default=None, repr=False)
    included: bool = True
    shards: tuple[Shard | None, ...] = field(default=(), repr=False)
    dimension: int | None = None

    def __post_init__(self) -> None:
        if not self.shards:
            object.__setattr__(self, "shards", (None,) * len(self.parameters))

    def whole(self) -> list[Tensor]:
        """Return for each parameter a tensor of its whole shape: the parameter itself, unless FSDP1 has sharded it."""
        return list(map(stand_in, self.parameters, self.shards) if any(self.shards) else self.parameters)


_LITERAL = str.maketrans("[]", "()")


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern of `fnmatch` matches a name, in which a part of a parameter stands as it is written.

    Example:
        >>> matches("qkv.weight[q]", "*.weight[q]"), matches("qkv.weight", "qkv.[vw]eight")
        (True, True)
    """
    found = fnmatchcase(name, pattern)
    return found or (name.endswith("]") and fnmatchcase(name.translate(_LITERAL), pattern.translate(_LITERAL)))


def check_patterns(patterns: Iterable[object], names: Iterable[str], argument: str) -> None:
    """Raise unless each pattern of an argument, such as `"exclude"`, is a string that matches one of the names."""
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} holds {pattern!r} ({type(pattern).__name__}); each pattern must be a string")
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches none of {some(names)}.{hint}")


def named_parameters_of(
    optimizer: Any, model: nn.Module | None, specification: LayerSpecification = "module"
) -> dict[str, Tensor]:
    """Return the optimizer's parameters by clean name, in the model's order.

    Tied parameters appear once, under their first owner. Without a model the names are the `param_names` of an
    optimizer built from `named_parameters()`; a dictionary of tensors needs neither.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(map(id, parameters))
    if names_tensors(specification):
        return tensors_by_name(specification, held, model, f"the {len(held)} parameters of this optimizer")
    if not held:
        raise ValueError("this optimizer holds no parameters: attach when its parameter groups have been filled")
    if model is None:
        names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        if len(names) != len(parameters):
            raise ValueError(
                "model=None, and the optimizer's parameters have no names: pass model=, or build the optimizer from "
                "model.named_parameters(), or name tensors with layers={'name': [tensor]}"
            )
        return unique_names(zip(map(clean_name, names), parameters, strict=True))
    named = unique_names((name, p) for name, p in named_parameters(model) if id(p) in held)
    if not named:
        raise ValueError(
            f"model={type(model).__name__} owns none of the {len(held)} parameters of this optimizer: "
            + _why_none(list(model.parameters()), parameters)
        )
    return named


def tensors_by_name(
    layers: Mapping[str, Sequence[Tensor]], held: Collection[int], model: nn.Module | None, whose: str
) -> dict[str, Tensor]:
    """Return the tensors of layers by their names in the model, or by the layer's name if the model lacks them.

    Raises a ValueError for a tensor whose id is not in `held`.
    """
    known = {} if model is None else {id(p): name for name, p in named_parameters(model)}
    named: list[tuple[str, Tensor]] = []
    for layer, tensors in layers.items():
        for i, p in enumerate(tensors):
            if id(p) not in held:
                raise ValueError(
                    f"layers[{layer!r}] holds a tensor of shape {tuple(p.shape)} that is not among {whose}: pass the "
                    "tensors themselves, not copies"
                )
            named.append((known.get(id(p), layer if len(tensors) == 1 else f"{layer}.{i}"), p))
    return unique_names(named)


def _why_none(own: Sequence[Tensor], held: Sequence[Tensor]) -> str:
    """Return what the optimizer's tensors may be if none is the model's, and the remedy, for an error message."""
    if any(hasattr(p, "device_mesh") or hasattr(p, "_fsdp_flattened") for p in (*own, *held)):
        return (
            "pass the model that the optimizer was built from. After fully_shard, build the optimizer again. Attach "
            "before the first forward pass, which replaces a module's parameters until the backward pass"
        )
    if all(p.numel() <= 1 for p in held) and any(p.numel() > 1 for p in own):
        return (
            "they hold at most one number each, so they are placeholders, and another optimizer takes the step: "
            "attach to the one that was built from the model's parameters"
        )
    if Counter(p.shape for p in own) >= Counter(p.shape for p in held):
        return (
            "they have the shapes of the model's, so they may be copies, such as float32 master weights, or belong to "
            "a copy of the model. Pass the model that the optimizer was built from. For copies, build the optimizer "
            "with names, [(name, copy), …] as named_parameters() does, and pass no model"
        )
    return (
        "pass the model that the optimizer was built from. If they are tensors that belong to no module, name them "
        "with layers={'name': [tensor]} and pass no model"
    )


def make_layers(
    named_parameters: Mapping[str, Tensor],
    specification: LayerSpecification,
    model: nn.Module | None = None,
    shards: Mapping[int, Shard] | None = None,
    split: SplitSpecification | None = None,
) -> list[Layer]:
    """Group named parameters into layers, in the order of their first parameter.

    Each part of a parameter that is split is a layer. Integer parameters, such as quantised weights, are in no layer.
    Nor are those on the meta device if others are not.
    """
    modules = {} if model is None else named_modules(model)
    parts = {} if split is None else _parts(named_parameters, split, modules)
    owners = _owners(named_parameters, modules)
    name_of = _layer_name_function(named_parameters, specification, owners)
    shards = shards or {}
    members: dict[str, dict[str, Tensor]] = {}
    part_of: dict[str, str] = {}  # the name of a part to that of its parameter
    some_measured = any(map(can_be_measured, named_parameters.values()))
    for name, parameter in named_parameters.items():
        if not holds_weights(parameter) or (some_measured and not can_be_measured(parameter)):
            continue
        if name in parts:
            for rows in parts[name]:
                part = f"{name}[{rows.label}]"
                members[part], part_of[part] = {part: rows}, name
            continue
        layer = name_of(name, stand_in(parameter, shards.get(id(parameter))))
        if layer is None:
            continue
        if not has_type(layer, str):
            raise TypeError(f"layers({name!r}, parameter) returned {layer!r}; it must return a string or None")
        members.setdefault(layer, {})[name] = parameter
    if not members:
        raise ValueError(f"layers={specification!r} puts no parameter into a layer; names: {some(named_parameters)}")
    layers: list[Layer] = []
    for layer, held in members.items():
        own = {owner_name(part_of.get(name, name)) for name in held}
        if len(own) > 1:
            own = {owners[name] for name in held}
        module = modules.get(own.pop()) if len(own) == 1 else None
        own_shards = tuple(shards.get(id(p)) for p in held.values())
        layers.append(Layer(layer, tuple(held.values()), tuple(held), module, shards=own_shards))
    return layers


# --- Parts of parameters ---------------------------------------------------------------------------------------------

SplitSpecification = Mapping[str, int | Sequence[int] | Sequence[str]]
"""Patterns of parameters' names to how many parts of equal size, to the sizes of the parts, or to their names."""


def as_split(split: Any) -> SplitSpecification | None:
    """Return the argument `split` after a check of its form."""
    if split is None:
        return None
    if not has_type(split, Mapping):
        raise TypeError(
            f"split={split!r} ({type(split).__name__}) must be a mapping of patterns to parts: {{'*.qkv.weight': 3}}"
        )
    if not split:
        raise ValueError("split={} names no parameter; pass None, or {'*.qkv.weight': 3}")
    for pattern, parts in cast("Mapping[Any, Any]", split).items():
        _check_parts(f"split[{pattern!r}]={parts!r}", parts)
    return dict(cast("SplitSpecification", split))


def _check_parts(given: str, parts: Any) -> None:
    allowed = "a number of parts from 2, two or more sizes from 1, or two or more names: 3, (768, 256, 256), ('q', 'k')"
    if isinstance(parts, int) and not isinstance(parts, bool):
        if parts < 2:
            raise ValueError(f"{given} must be {allowed}; leave out what is not to be split")
        return
    if isinstance(parts, str) or not has_type(parts, Sequence):
        raise TypeError(f"{given} must be {allowed}")
    held = list(cast("Sequence[Any]", parts))
    sizes = [one for one in held if isinstance(one, int) and not isinstance(one, bool)]
    names = [one for one in held if isinstance(one, str)]
    if len(held) not in (len(sizes), len(names)):
        raise TypeError(f"{given} must be {allowed}")
    if len(held) < 2 or min(sizes, default=1) < 1:
        raise ValueError(f"{given} must be {allowed}")
    if len(set(names)) != len(names) or not all(map(str.isidentifier, names)):
        raise ValueError(f"{given} must hold different names of letters, digits and _, which begin with no digit")


def inputs_first(module: nn.Module | None) -> bool:
    """Return whether the first dimension of a module's weight is that of the inputs."""
    transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return isinstance(module, transposed) or type(module).__name__ == "Conv1D"


def _parts(
    named: Mapping[str, Tensor], split: SplitSpecification, modules: Mapping[str, nn.Module]
) -> dict[str, list[Rows]]:
    """Return the parts of each parameter that a pattern matches."""
    check_patterns(split, named, "split")
    found: dict[str, list[Rows]] = {}
    for name, parameter in named.items():
        patterns = [pattern for pattern in split if fnmatchcase(name, pattern)]
        if len(patterns) > 1:
            raise ValueError(f"split: {some(patterns)} all match {name!r}; let one of them match it")
        if patterns:
            found[name] = _rows(name, parameter, split[patterns[0]], modules.get(owner_name(name)))
    return found


def _rows(name: str, parameter: Tensor, parts: Any, module: nn.Module | None) -> list[Rows]:
    if type(parameter) not in (Tensor, nn.Parameter) or getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"split: {name!r} is a {type(parameter).__name__} that is sharded, quantised or without values, and parts "
            "are rows of an ordinary parameter; leave it out of split, or keep its parts as separate modules"
        )
    if not parameter.ndim or not holds_weights(parameter):
        raise ValueError(
            f"split: {name!r} of shape {tuple(parameter.shape)} and type {parameter.dtype} has no rows of weights; "
            "leave it out of split"
        )
    by_input = parameter.ndim > 1 and inputs_first(module)
    if by_input and getattr(module, "groups", 1) > 1:
        raise ValueError(
            f"split: {name!r} belongs to a transposed convolution of {cast(Any, module).groups} groups, whose outputs "
            "are not rows; leave it out of split"
        )
    dimension = int(by_input)
    rows = parameter.shape[dimension]
    number = parts if isinstance(parts, int) else len(parts)
    given = [] if isinstance(parts, int) else list(parts)
    sizes: list[int] = given if given and isinstance(given[0], int) else [rows // number] * number
    if sum(sizes) != rows or not all(sizes):
        raise ValueError(
            f"split: {parts!r} does not divide the {rows} rows of {name!r}; pass a number of parts that does, or sizes "
            f"that add up to {rows}"
        )
    labels = given if given and isinstance(given[0], str) else list(map(str, range(number)))
    firsts = [sum(sizes[:i]) for i in range(number)]
    return [Rows(parameter, dimension, *one) for one in zip(firsts, sizes, labels, strict=True)]


def rows_of(layers: Iterable[Layer]) -> list[Rows]:
    """Return the parts of parameters among the layers."""
    return [p for layer in layers for p in layer.parameters if is_rows(p)]


def warn_of_unmeasured(named_parameters: Mapping[str, Tensor], nothing_measured: str) -> None:
    """Warn about parameters that cannot be measured; `nothing_measured` is the message if none can.

    The warning points at the caller of the constructor that calls this.
    """
    absent = [name for name, p in named_parameters.items() if not can_be_measured(p)]
    if absent:
        beside_others = f"{some(absent, 5, str)} are in no layer, and their factor is 1"
        warn_without_values(nothing_measured if len(absent) == len(named_parameters) else beside_others, 3)
    names = [f"{name} ({p.dtype})" for name, p in named_parameters.items() if not holds_weights(p)]
    if names:
        warnings.warn(
            f"{len(names)} of the optimizer's parameters hold no floating-point numbers: {some(names, 5, str)}. "
            "Quantised weights have no norm here, so these parameters are in no layer, and their factor is 1",
            stacklevel=3,
        )


def included_layers(layers: Sequence[Layer], exclude: Exclusion) -> list[bool]:
    """Return for each layer whether it is not excluded; a callable must exclude all of the layer's parameters."""
    if exclude is None:
        return [True] * len(layers)
    if callable(exclude):
        return [not all(map(exclude, layer.parameter_names, layer.whole())) for layer in layers]
    if isinstance(exclude, str) or not has_type(exclude, Sequence):
        allowed = "'auto', None, a list of patterns or a callable (name, parameter) -> bool"
        raise TypeError(f"exclude={exclude!r} must be {allowed}")
    check_patterns(exclude, [layer.name for layer in layers], "exclude")
    return [not any(matches(layer.name, pattern) for pattern in exclude) for layer in layers]


def _layer_name_function(
    named_parameters: Mapping[str, Tensor], specification: LayerSpecification, owners: Mapping[str, str]
) -> LayerName:
    allowed = (
        "'module', 'parameter', in LayerwiseLR 'unit', a list of patterns, a callable (name, parameter) -> layer name "
        "or None, or a dict of layer names and lists of tensors"
    )
    if isinstance(specification, str):
        if specification == "module":
            return lambda name, parameter: owners[name]
        if specification == "parameter":
            return lambda name, parameter: name
        raise ValueError(f"layers={specification!r} is unknown; allowed: {allowed}. For one pattern, pass a list")
    if names_tensors(specification):
        layer_of = {id(p): layer for layer, tensors in specification.items() for p in tensors}
        return lambda name, parameter: layer_of.get(id(named_parameters[name]))
    if callable(specification):
        return specification
    if not has_type(specification, Sequence):
        raise TypeError(f"layers={specification!r} ({type(specification).__name__}) is not {allowed}")
    if not specification:
        raise ValueError(f"layers=[] names no layer; allowed: {allowed}")
    patterns = list(specification)
    names = [n for name in named_parameters for n in (name, owner_name(name), owners[name])]
    check_patterns(patterns, names, "layers")

    def first_match(name: str, parameter: Tensor) -> str | None:
        hits = (p for p in patterns if fnmatchcase(name, p) or fnmatchcase(owner_name(name), p))
        # The layer under "module" comes last, so that patterns can divide it.
        return next(hits, None) or next((p for p in patterns if fnmatchcase(owners[name], p)), None)

    return first_match


def unique_names(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters by name; raise if two parameters have the same clean name."""
    result: dict[str, Tensor] = {}
    for name, parameter in named:
        if result.setdefault(name, parameter) is not parameter:
            raise ValueError(
                f"two parameters are called {name!r} after the prefixes of wrappers are removed: rename one, or pass "
                "the model that holds both"
            )
    return result


def some(names: Iterable[str], most: int = 8, form: Callable[[str], str] = repr) -> str:
    """Return the first names as text, with the total number if there are more."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(form(name) for name in names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")


# --- Advice ----------------------------------------------------------------------------------------------------------

DOUBTS = r"(?:LayerDecay|Unfreezing) takes the depths|all \d+ parameters"
"""Matches the beginnings of warnings about layers, which `diagnose` reports in its own text instead."""

_FLAT = re.compile(r"^(.*?[^\W_].*?(?:__|[_\-:|]))(?:weight|bias|kernel|gamma|beta|scale)(?:_[gv])?$")
_RECURRENT = re.compile(r"^(?:weight|bias)_(?:ih|hh|hr)_l\d+(?:_reverse)?$")


class Divided(NamedTuple):
    """A module that owns parameters and has submodules that own others, so that they are several layers."""

    layer: Layer  # of its own parameters
    below: list[Layer]  # of its submodules

    def __str__(self) -> str:
        own = some([name.rpartition(".")[2] for name in self.layer.parameter_names], 3, str)
        below = some([layer.name for layer in self.below], 3, str)
        return f"{self.layer.name or '(root)'!r} owns {own}, beside {below}: several layers"


def divided(layers: Sequence[Layer]) -> list[Divided]:
    """Return the modules that own parameters and have submodules that own others, of layers of `"module"`."""
    found: list[Divided] = []
    for layer in layers:
        prefix = f"{layer.name}." if layer.name else ""
        below = [other for other in layers if other is not layer and other.name.startswith(prefix)]
        found += [Divided(layer, below)] if below else []
    return found


def joining(layers: Sequence[Layer], modules: Sequence[Divided]) -> str:
    """Return, as Python source, the value of `layers` that makes each of these modules one layer.

    Other layers stay as they are. Of nested modules the inner one is a layer, and the rest of the outer one another.
    `modules` is the root alone, or does not hold it.
    """
    joined = {id(layer) for one in modules for layer in (one.layer, *one.below)}
    patterns = {one.layer.name: f"{escape(one.layer.name)}.*".lstrip(".") for one in modules}
    patterns |= {layer.name: _pattern(layer) for layer in layers if id(layer) not in joined}
    deepest = _deepest_first(patterns)
    if len(deepest) <= 40 or any("/" in name for name in deepest):  # of more, a function is shorter
        return repr([patterns[name] for name in deepest])
    whole = tuple(name for name in deepest if patterns[name].endswith(".*"))
    return f"lambda name, parameter: next((m for m in {whole!r} if name.startswith(m + '.')), name.rpartition('.')[0])"


def _pattern(layer: Layer) -> str:
    """Return the pattern that makes the same layer."""
    return escape(layer.name) + ".*" * (len(set(map(owner_name, layer.parameter_names))) > 1)


def _deepest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: -name.count("."))  # a pattern for an outer module may match deeper layers


def flattened(layers: Sequence[Layer], specification: LayerSpecification) -> list[str]:
    """Return warnings about layers of `"module"` that seem to hold the parameters of several modules.

    These are networks that are one layer in all, and dictionaries of parameters with keys such as `conv1_weight`.
    """
    if specification != "module":
        return []
    return [_warning(layer, layers) for layer in layers if _looks_flattened(layer, alone=len(layers) == 1)]


def _looks_flattened(layer: Layer, *, alone: bool) -> bool:
    if any("/" in name for name in layer.parameter_names):
        return False  # names of Keras are paths, which give the modules
    last = [name.rpartition(".")[2] for name in layer.parameter_names]
    if isinstance(layer.module, nn.ParameterDict | nn.ParameterList):
        if _stems(layer):
            return True
    elif layer.module is None:
        normalised = set(last) <= {"weight0", "weight1", "bias"}  # parametrized, such as by weight_norm
        if normalised or any(map(_ATTENTION.match, layer.parameter_names)) or all(map(_RECURRENT.match, last)):
            return False
    elif is_one_layer(layer.module) or any(
        one.__module__.startswith("torch.nn.modules.") and one is not nn.Module for one in type(layer.module).__mro__
    ):
        return False
    return alone and (len(last) > 2 or sum(p.ndim > 1 for p in layer.whole()) > 1)


def _stems(layer: Layer) -> dict[str, None]:
    """Return the prefixes before `weight` or `bias` in the names, if there are several."""
    stems = dict.fromkeys(found[1] for name in layer.parameter_names if (found := _FLAT.match(name)))
    return stems if len(stems) > 1 else {}


def _warning(layer: Layer, layers: Sequence[Layer]) -> str:
    number, alone = len(layer.parameters), len(layers) == 1
    if stems := _stems(layer):
        # Longer stems first, since `layer1_` also matches `layer1_norm_weight`. A name without a stem is its own layer.
        patterns = [f"{escape(stem)}*" for stem in sorted(stems, key=lambda stem: -len(stem))]
        patterns += [escape(name) for name in layer.parameter_names if not any(map(name.startswith, stems))]
        others = {other.name: _pattern(other) for other in layers if other is not layer}
        patterns += [others[name] for name in _deepest_first(others)]
        remedy = f"layers={patterns!r}"
    else:
        remedy = "layers='parameter'"
    whose = "" if alone else f" of {layer.name!r}"
    keep = "layers=['*'] keeps them one layer" if alone else f"{layer.name + '.*'!r} among them keeps it one layer"
    return (
        f"all {number} parameters{whose} are one layer, because their names ({some(layer.parameter_names, 3)}) do not "
        f"show which module each belongs to. Pass {remedy}, or other patterns ({keep}, without this warning)"
    )


# --- Permanent groups ------------------------------------------------------------------------------------------------
