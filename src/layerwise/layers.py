"""Groups parameters into layers: parameters of one layer share a factor."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from torch import Tensor, nn

from .arguments import has_type
from .model import Owners, clean_name, named_parameters, owner_name
from .sharding import Piece, stand_in
from .tensors import can_be_measured, holds_weights, warn_without_values

LayerName = Callable[[str, Tensor], "str | None"]
"""A function of a parameter's name and the parameter that names its layer, or None for no layer."""

Exclusion = Sequence[str] | Callable[[str, Tensor], bool] | None
"""Layers left at factor 1: patterns of layer names, or a function of a parameter's name and the parameter."""


@dataclass(frozen=True)
class TensorLayers:
    """Layers given as lists of tensors.

    Args:
        tensors: The tensors of each layer.
    """

    tensors: Mapping[str, tuple[Tensor, ...]]

    def named(self, held: Collection[int], model: nn.Module | None, whose: str) -> dict[str, Tensor]:
        """Return the tensors by name: their name in the model, or the layer's name if the model does not own them.

        Args:
            held: The ids of the tensors that layers may hold.
            model: The model, or None.
            whose: What those tensors are, for the error message.

        Raises:
            ValueError: A layer holds another tensor.
        """
        known = {} if model is None else {id(p): name for name, p in named_parameters(model)}
        named: list[tuple[str, Tensor]] = []
        for layer, tensors in self.tensors.items():
            for i, p in enumerate(tensors):
                if id(p) not in held:
                    raise ValueError(
                        f"layers[{layer!r}] holds a tensor of shape {tuple(p.shape)} that is not among {whose}: pass "
                        "the tensors themselves, not copies"
                    )
                own = layer if len(tensors) == 1 else f"{layer}.{i}"
                named.append((known.get(id(p), own), p))
        return unique_names(named)

    def layer_of(self) -> dict[int, str]:
        """Return the layer of each tensor, by the tensor's id."""
        return {id(p): layer for layer, tensors in self.tensors.items() for p in tensors}


LayerSpecification = (
    Literal["module", "parameter"] | Sequence[str] | LayerName | Mapping[str, Iterable[Tensor]] | TensorLayers
)


def as_specification(layers: Any) -> Any:
    """Return the argument `layers`, with a dictionary of tensors checked.

    Args:
        layers: What `LayerwiseLR` takes.

    Raises:
        TypeError: The dictionary holds anything but lists of tensors.
        ValueError: It is empty, a list is empty, or a tensor appears twice.
    """
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
    return TensorLayers(result)


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters that share one factor.

    Args:
        name: The layer's name; `""` is the root module, as in `torch.nn.Module.named_modules`.
        parameters: The layer's parameters that the optimizer holds, in the model's order.
        parameter_names: Their names, without the prefixes of wrappers.
        module: The module that owns them, when there is one such module and the model is known.
        included: Whether the layer is not excluded; the factor of an excluded one is 1.
        pieces: This process's shard of each parameter, where some are sharded; else empty.
    """

    name: str
    parameters: tuple[Tensor, ...]
    parameter_names: tuple[str, ...] = ()
    module: nn.Module | None = field(default=None, repr=False)
    included: bool = True
    pieces: tuple[Piece | None, ...] = field(default=(), repr=False)

    def whole(self) -> list[Tensor]:
        """Return for each parameter a tensor of its whole shape: the parameter itself, unless FSDP1 has sharded it."""
        return list(map(stand_in, self.parameters, self.pieces)) if self.pieces else list(self.parameters)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name matches an fnmatch pattern, case-sensitively."""
    return fnmatchcase(name, pattern)


def check_patterns(patterns: Iterable[object], names: Iterable[str], argument: str) -> None:
    """Raise unless each pattern matches one of the names.

    Args:
        patterns: fnmatch patterns.
        names: The names to match.
        argument: The argument's name for the error message, such as `"exclude"`.

    Raises:
        TypeError: A pattern is not a string.
        ValueError: A pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} holds {pattern!r} ({type(pattern).__name__}); each pattern must be a string")
        if not any(matches(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{argument} pattern {pattern!r} matches none of {some(names)}.{hint}")


def named_parameters_of(
    optimizer: Any, model: nn.Module | None, specification: LayerSpecification = "module"
) -> dict[str, Tensor]:
    """Return the optimizer's parameters by clean name, in the model's order.

    Tied parameters appear once, under their first owner.

    Args:
        optimizer: A `torch.optim.Optimizer`.
        model: The model they belong to; None reads the `param_names` of an optimizer built from `named_parameters()`.
        specification: The `layers` argument. A dictionary of tensors needs no model.

    Returns:
        Clean name to parameter, for the parameters of the model that the optimizer holds.

    Raises:
        TypeError: `model` is no module.
        ValueError: There is no model and no name, or the model owns none of the optimizer's parameters.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if isinstance(specification, TensorLayers):
        return specification.named(held, model, f"the {len(held)} parameters of this optimizer")
    if not held:
        raise ValueError("this optimizer holds no parameters: attach when its parameter groups have been filled")
    if model is None:
        named: list[tuple[str, Tensor]] = []
        for group in optimizer.param_groups:
            if len(group.get("param_names", ())) != len(group["params"]):
                raise ValueError(
                    "model=None, and the optimizer's parameters have no names: pass model=, "
                    "or build the optimizer from model.named_parameters(), or name tensors with "
                    "layers={'name': [tensor]}"
                )
            named.extend(zip(group["param_names"], group["params"], strict=True))
        return unique_names((clean_name(name), p) for name, p in named)
    named = [(name, p) for name, p in named_parameters(model) if id(p) in held]
    if not named:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        raise ValueError(
            f"model={type(model).__name__} owns none of the {len(held)} parameters of this optimizer: "
            + _why_none(list(model.parameters()), every)
        )
    return unique_names(named)


def _why_none(own: Sequence[Tensor], held: Sequence[Tensor]) -> str:
    """Return, for the error message, what the optimizer's tensors may be if none is the model's, and the remedy."""
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
    pieces: Mapping[int, Piece] | None = None,
) -> list[Layer]:
    """Group named parameters into layers.

    Args:
        named_parameters: Clean name to parameter, in the model's order.
        specification: `"module"` is the module that directly owns a parameter, or one above it that is one layer as a
            whole (see `Owners`). `"parameter"` makes each parameter a layer. In a list of fnmatch patterns each one is
            a layer; a parameter goes to the first that matches its name or its module's. Also accepted are a callable
            `(name, parameter) -> layer name or None`, and `TensorLayers`.
        model: The model, from which rules get the layers' modules.
        pieces: This process's shards of sharded parameters, by the parameters' ids.

    Returns:
        The layers in the order of their first parameter. Integer parameters, such as quantised weights, are in no
        layer. Nor are those on the meta device if others are not.

    Raises:
        TypeError: The specification, a pattern or what the callable returns has a wrong type.
        ValueError: An unknown word, an empty list, a pattern that matches nothing, or no layer at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [layer.name for layer in make_layers(dict(model.named_parameters()), "module")]
        ['0', '2']
    """
    owners = Owners(named_parameters, model)
    name_of = _layer_name_function(named_parameters, specification, owners)
    pieces = pieces or {}
    members: dict[str, list[tuple[str, Tensor]]] = {}
    some_measured = any(map(can_be_measured, named_parameters.values()))
    for name, parameter in named_parameters.items():
        if not holds_weights(parameter) or (some_measured and not can_be_measured(parameter)):
            continue
        layer = name_of(name, stand_in(parameter, pieces.get(id(parameter))))
        if layer is None:
            continue
        if not has_type(layer, str):
            raise TypeError(f"layers({name!r}, parameter) returned {layer!r}; it must return a string or None")
        members.setdefault(layer, []).append((name, parameter))
    if not members:
        raise ValueError(f"layers={specification!r} puts no parameter into a layer; names: {some(named_parameters)}")
    layers: list[Layer] = []
    for layer, entries in members.items():
        own = {owner_name(name) for name, _ in entries}
        if len(own) > 1:
            own = {owners(name) for name, _ in entries}
        module = owners.modules.get(own.pop()) if len(own) == 1 else None
        parameters = tuple(p for _, p in entries)
        held = tuple(pieces.get(id(p)) for p in parameters) if pieces else ()
        layers.append(Layer(layer, parameters, tuple(n for n, _ in entries), module, pieces=held))
    return layers


def warn_of_unmeasured(named_parameters: Mapping[str, Tensor], nothing_measured: str) -> None:
    """Warn about parameters that cannot be measured. Called by a constructor; the warning points at its caller.

    Args:
        named_parameters: Name to parameter.
        nothing_measured: The message if none can be measured.
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
            UserWarning,
            stacklevel=3,
        )


def included_layers(layers: Sequence[Layer], exclude: Exclusion) -> list[bool]:
    """Return for each layer whether it is not excluded.

    Args:
        layers: The layers.
        exclude: None, patterns of layer names, or a callable `(parameter name, parameter) -> bool`, which excludes a
            layer when it holds for all of its parameters.

    Raises:
        TypeError: `exclude` is none of these.
        ValueError: A pattern matches no layer.
    """
    if exclude is None:
        return [True] * len(layers)
    if isinstance(exclude, str) or not (callable(exclude) or has_type(exclude, Sequence)):
        allowed = "'auto', None, a list of patterns or a callable (name, parameter) -> bool"
        raise TypeError(f"exclude={exclude!r} must be {allowed}")
    if callable(exclude):
        return [not all(map(exclude, layer.parameter_names, layer.whole())) for layer in layers]
    check_patterns(exclude, [layer.name for layer in layers], "exclude")
    return [not any(matches(pattern, layer.name) for pattern in exclude) for layer in layers]


def _layer_name_function(
    named_parameters: Mapping[str, Tensor], specification: LayerSpecification, owners: Owners
) -> LayerName:
    allowed = (
        "'module', 'parameter', a list of patterns, a callable (name, parameter) -> layer name or None, or a dict of "
        "layer names and lists of tensors"
    )
    if isinstance(specification, str):
        if specification == "module":
            return lambda name, parameter: owners(name)
        if specification == "parameter":
            return lambda name, parameter: name
        raise ValueError(f"layers={specification!r} is unknown; allowed: {allowed}. For one pattern, pass a list")
    if isinstance(specification, TensorLayers):
        layer_of = specification.layer_of()
        by_name = {name: layer_of.get(id(p)) for name, p in named_parameters.items()}
        return lambda name, parameter: by_name[name]
    if callable(specification):
        return specification
    if not has_type(specification, Sequence):
        raise TypeError(f"layers={specification!r} ({type(specification).__name__}) is not {allowed}")
    if not specification:
        raise ValueError(f"layers=[] names no layer; allowed: {allowed}")
    patterns = list(specification)
    names = [n for name in named_parameters for n in (name, owner_name(name), owners(name))]
    check_patterns(patterns, names, "layers")

    def first_match(name: str, parameter: Tensor) -> str | None:
        hits = (p for p in patterns if matches(p, name) or matches(p, owner_name(name)))
        # The layer under "module" comes last, so that patterns can divide it.
        return next(hits, None) or next((p for p in patterns if matches(p, owners(name))), None)

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
