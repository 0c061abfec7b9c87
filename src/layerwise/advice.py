"""Finds layers that parameter names leave ambiguous, and the value of `layers` that divides or joins them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape

from torch import nn

from .layers import Layer, LayerSpecification, some
from .model import ATTENTION, is_one_layer, owner_name

MOST_PATTERNS = 40
"""The most patterns that are listed; above, the advice is a function."""

DOUBTS = r"LayerDecay takes the depths|all \d+ parameters"
"""Matches the beginnings of warnings about layers, which `diagnose` reports in its own text instead."""

_FLAT = re.compile(r"^(.*?[^\W_].*?(?:__|[_\-:|]))(?:weight|bias|kernel|gamma|beta|scale)(?:_[gv])?$")
_RECURRENT = re.compile(r"^(?:weight|bias)_(?:ih|hh|hr)_l\d+(?:_reverse)?$")


@dataclass(frozen=True)
class Divided:
    """A module that owns parameters and has submodules that own others, so that they are several layers.

    Args:
        layer: The layer of its own parameters.
        below: The layers of its submodules.
        separator: The character between its name and theirs.
    """

    layer: Layer
    below: tuple[Layer, ...]
    separator: str

    @property
    def pattern(self) -> str:
        """The pattern that matches the parameters of all of them."""
        return f"{escape(self.layer.name)}{self.separator}*"

    def __str__(self) -> str:
        own = some([name.rpartition(".")[2] for name in self.layer.parameter_names], 3, str)
        below = some([layer.name for layer in self.below], 3, str)
        return f"{self.layer.name or '(root)'!r} owns {own}, beside {below}: several layers"


def divided(layers: Sequence[Layer]) -> list[Divided]:
    """Return the modules that own parameters and have submodules that own others.

    Args:
        layers: Layers of `"module"`.
    """
    found: list[Divided] = []
    for layer in layers:
        for separator in (".", "/") if layer.name else ("",):
            prefix = layer.name + separator
            below = tuple(other for other in layers if other is not layer and other.name.startswith(prefix))
            if below:
                found.append(Divided(layer, below, separator))
    return found


def joining(layers: Sequence[Layer], modules: Sequence[Divided]) -> str:
    """Return, as Python source, the value of `layers` that makes each of these modules one layer.

    Other layers stay as they are. Of nested modules the inner one is a layer, and the rest of the outer one another.

    Args:
        layers: Layers of `"module"`.
        modules: The modules to join; either the root alone, or modules without the root.
    """
    swallowed = {id(layer) for one in modules for layer in (one.layer, *one.below)}
    kept = [layer for layer in layers if id(layer) not in swallowed]
    whole = [layer for layer in kept if len({owner_name(name) for name in layer.parameter_names}) > 1]
    patterns = {one.layer.name: one.pattern for one in modules}
    patterns |= {layer.name: f"{escape(layer.name)}.*" if layer in whole else escape(layer.name) for layer in kept}
    deepest = sorted(patterns, key=lambda name: -name.count("."))
    if len(deepest) <= MOST_PATTERNS or any("/" in name for name in deepest):
        return repr([patterns[name] for name in deepest])
    joined = tuple(name for name in deepest if patterns[name].endswith(".*"))
    return f"lambda name, parameter: next((m for m in {joined!r} if name.startswith(m + '.')), name.rpartition('.')[0])"


def flattened(layers: Sequence[Layer], specification: LayerSpecification) -> list[str]:
    """Return warnings about layers that seem to hold the parameters of several modules.

    These are networks that are one layer in all, and dictionaries of parameters with keys such as `conv1_weight`.

    Args:
        layers: The layers.
        specification: The `layers` argument; only `"module"` is checked.
    """
    if specification != "module":
        return []
    return [_warning(layer, layers) for layer in layers if _looks_flattened(layer, alone=len(layers) == 1)]


def _looks_flattened(layer: Layer, *, alone: bool) -> bool:
    if any("/" in name for name in layer.parameter_names):
        return False  # names of Keras are paths, which give the modules
    last = [name.rpartition(".")[2] for name in layer.parameter_names]
    if isinstance(layer.module, nn.ParameterDict | nn.ParameterList):
        if len(_stems(layer)) > 1:
            return True
    elif layer.module is None:
        normalised = set(last) <= {"weight0", "weight1", "bias"}  # parametrized, such as by weight_norm
        if normalised or any(map(ATTENTION.match, layer.parameter_names)) or all(map(_RECURRENT.match, last)):
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
        patterns += _patterns([other for other in layers if other is not layer])
        remedy = f"layers={patterns!r}"
    else:
        remedy = "layers='parameter'"
    whose = "" if alone else f" of {layer.name!r}"
    keep = "layers=['*'] keeps them one layer" if alone else f"{layer.name + '.*'!r} among them keeps it one layer"
    return (
        f"all {number} parameters{whose} are one layer, because their names ({some(layer.parameter_names, 3)}) do not "
        f"show which module each belongs to. Pass {remedy}, or other patterns ({keep}, without this warning)"
    )


def _patterns(layers: Sequence[Layer]) -> list[str]:
    """Return patterns that make the same layers, deepest first, since an outer pattern may match deeper layers."""
    several = [len({owner_name(name) for name in layer.parameter_names}) > 1 for layer in layers]
    found = [(layer.name, escape(layer.name) + ".*" * more) for layer, more in zip(layers, several, strict=True)]
    return [pattern for _, pattern in sorted(found, key=lambda pair: -pair[0].count("."))]
