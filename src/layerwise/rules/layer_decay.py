"""Layer-wise learning-rate decay by depth, as in the fine-tuning of ELECTRA and BEiT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._arguments import has_type
from ..layers import Layer, check_patterns, matches
from ..statistics import Statistics
from .base import Rule, is_number, shown
from .constant import check_factor, fixed_factors
from .depths import Depths, depths, matched_depths, read_depths
from .roles import ROLES, roles_of
from .selection import check_whole
from .state import State

__all__ = ["LayerDecay", "depths"]

DepthArgument = Callable[[str], int] | Mapping[str, Any] | None
"""A function from a layer's name to its depth, or what timm's `group_matcher` returns; None reads the names."""


def depths_of(layers: Sequence[Layer], depth: DepthArgument) -> Depths:
    """Return the layers' depths, from what the user gives or else from their names."""
    if depth is None:
        return read_depths(layers)
    if isinstance(depth, Mapping):
        levels = matched_depths(layers, cast("Mapping[str, Any]", depth))
    else:
        levels = [depth(layer.name) for layer in layers]
    for layer, level in zip(layers, levels, strict=True):
        if isinstance(level, bool) or not has_type(level, int) or level < 0:
            raise ValueError(f"depth({layer.name!r}) returned {level!r}; it must be a whole number of at least 0")
    return Depths(levels, [max(levels)] * len(levels), [])


def check_depth(depth: object) -> None:
    """Raise a TypeError unless an argument may say the depths."""
    if depth is not None and not callable(depth) and not has_type(depth, Mapping):
        raise TypeError(
            f"depth={depth!r} must be a function from a layer's name to its depth, or what group_matcher(coarse=False) "
            "of a network of timm returns"
        )


def doubt(rule: str, remedy: str, reasons: Sequence[str], table: Sequence[str]) -> list[str]:
    """Return the warning of a rule that reads depths from ambiguous names, with its table; none without reasons."""
    if not reasons:
        return []
    text = (
        f"{rule} takes the depths from the layers' names, which leave room for doubt: {'; '.join(reasons)}. Pass "
        f"{remedy}, a function from a layer's name to its depth"
    )
    return ["\n".join([text, *table])]


@dataclass(frozen=True, repr=False)
class LayerDecay(Rule):
    """Layer-wise learning-rate decay.

    f_l = max(min_scale, d^(D − depth_l)) · multiply_l, depth 0 for the embeddings, D for the head (BEiT)

    Start: `LayerwiseLR(optimizer, LayerDecay(0.65), model)` with `optimizer = AdamW(model.parameters(), lr=5e-4,
    weight_decay=0.05)`. The rate is that of the head. MAE's code fine-tunes ViT-B so, with batches of 256; its `lr`
    grows with the batch. `LayerDecay(1 / 2.6)` is discriminative fine-tuning, over few groups of layers: over twelve
    blocks its lowest factor is 1e-5.

    With `style="electra"` there is one more power between the last block and the head: below the head it is d^(D + 1 −
    depth_l), and 1 for the head. Each of several towers (CLIP, BART) has depths and a D of its own. The factor scales
    the rate, and so decoupled weight decay too.

    Args:
        decay: d, in (0, 1]; ELECTRA uses 0.8 (base) and 0.9 (large), BEiT 0.65 to 0.9.
        style: `"beit"` or `"electra"`.
        depth: A function from layer name to depth (0 at the input), or `group_matcher(coarse=False)` of a network of
            timm. By default `depths` reads the names, and warns with a table of depths where they are ambiguous.
        min_scale: The least power, from 0 to 1.
        freeze_below: Layers of a depth below this have factor 0.
        multiply: Roles, as for `ByRole`, or patterns of layer names, to further factors, such as `{"stem": 0.2}`. All
            that match a layer count.

    Raises:
        TypeError: `depth` or `multiply` has the wrong type.
        ValueError: An argument is out of its range, a depth is no whole number of at least 0, `freeze_below` would
            freeze every layer, or a key of `multiply` matches none.

    Example:
        >>> names = ["embeddings", "layer.0", "layer.1", "head"]
        >>> layers = [Layer(name, (torch.zeros(1),)) for name in names]
        >>> LayerDecay(0.5).init(layers, torch.device("cpu"))["_factors"]
        tensor([0.1250, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
        >>> rule = LayerDecay(0.5, freeze_below=1, min_scale=0.3, multiply={"head": 10})
        >>> rule.init(layers, torch.device("cpu"))["_factors"]
        tensor([ 0.0000,  0.3000,  0.5000, 10.0000], dtype=torch.float64)

    Reference:
        Clark et al.: ELECTRA, ICLR 2020, arXiv 2003.10555; Bao et al.: BEiT, ICLR 2022, arXiv 2106.08254; Howard,
        Ruder: ULMFiT, ACL 2018, arXiv 1801.06146 (d = 1 / 2.6). `min_scale` is timm's, `multiply` in DINOv2's code.
        timm counts a norm after the last block with that block, and not with the head as BEiT does: its
        `group_matcher` gives that.
    """

    decay: float
    style: Literal["beit", "electra"] = "beit"
    depth: DepthArgument = None
    min_scale: float = 0.0
    freeze_below: int = 0
    multiply: Mapping[str, float] | None = None
    needs = ()
    default_place = "lr"
    scales_rates = True
    own_layer = True
    compares_layers = True

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay={self.decay!r} must be a number in (0, 1]; 0.65 to 0.9 are usual")
        if self.style not in ("beit", "electra"):
            raise ValueError(f"style={self.style!r} is unknown; allowed: 'beit', 'electra'")
        check_depth(self.depth)
        if not (is_number(self.min_scale) and 0 <= self.min_scale <= 1):
            raise ValueError(f"min_scale={self.min_scale!r} must be a number from 0 to 1, such as 0.01")
        check_whole("freeze_below", self.freeze_below, 0)
        if self.multiply is not None and not has_type(self.multiply, Mapping):
            raise TypeError(f"multiply={self.multiply!r} must be a mapping of roles or patterns to factors")
        for key, factor in (self.multiply or {}).items():
            check_factor(factor, f"multiply {key!r}")

    def __repr__(self) -> str:
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        words = [f"{name}={own[name]!r}" for name in ("decay", "style", "depth")]
        words += [f"{one.name}={own[one.name]!r}" for one in fields(self)[3:] if own[one.name] != one.default]
        return f"LayerDecay({', '.join(words)})"

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        return fixed_factors(layers, self._values(layers, depths_of(layers, self.depth)))

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return a warning with the table of depths if `depth` is not given and the names are ambiguous."""
        reasons = depths_of(layers, self.depth).doubts
        return doubt("LayerDecay", f"LayerDecay({self.decay!r}, depth=function)", reasons, self.table(layers))

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each depth with its factor and its layers."""
        read = depths_of(layers, self.depth)
        members: dict[tuple[int, float], list[str]] = {}
        for layer, level, factor in zip(layers, read.depth, self._values(layers, read), strict=True):
            members.setdefault((level, factor), []).append(layer.name or "(root)")
        lines = [f"{'depth':>5}  {'factor':<9}  layers"]
        for (level, factor), own in sorted(members.items()):
            lines.append(f"{level:>5}  {factor:<9.4g}  {shown(own)}")
        return lines

    def _values(self, layers: Sequence[Layer], read: Depths) -> list[float]:
        if max(read.depth) < self.freeze_below:
            raise ValueError(
                f"freeze_below={self.freeze_below} freezes every layer: depths go from 0 to {max(read.depth)}"
            )
        gap = int(self.style == "electra")
        values: list[float] = []
        for level, top, factor in zip(read.depth, read.top, self._multiples(layers), strict=True):
            power = 1.0 if level == top else float(self.decay) ** (top + gap - level)
            values.append(0.0 if level < self.freeze_below else max(float(self.min_scale), power) * factor)
        return values

    def _multiples(self, layers: Sequence[Layer]) -> list[float]:
        """Return the product of the factors in `multiply` for each layer."""
        result = [1.0] * len(layers)
        if not self.multiply:
            return result
        names, roles = [layer.name for layer in layers], roles_of(layers)
        for key, factor in self.multiply.items():
            if key not in roles:
                if key in ROLES and not any(matches(name, key) for name in names):
                    raise ValueError(
                        f"multiply {key!r} is the role of no layer; there are {', '.join(sorted(set(roles)))}"
                    )
                check_patterns([key], names, "multiply")
            for i, (name, role) in enumerate(zip(names, roles, strict=True)):
                result[i] *= float(factor) if key == role or matches(name, key) else 1.0
        return result

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state
