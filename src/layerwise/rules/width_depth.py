"""Rates that follow from a network's width and depth: muP, CompleteP, and the shape factors of Muon and Scion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import check_choice, has_type
from ..layers import Layer, inputs_first
from ..statistics import Statistics
from .base import Rule, is_number, shown
from .constant import fixed_factors
from .roles import RoleArgument, roles_of
from .shapes import largest_of, shape_of
from .state import State

Kind = Literal["adam", "sgd", "rms_to_rms", "muon", "match_rms_adamw"]
KINDS: tuple[Kind, ...] = ("adam", "sgd", "rms_to_rms", "muon", "match_rms_adamw")

ONE_SIDED: dict[str, tuple[bool, bool]] = {
    "embedding": (False, True),
    "position": (False, True),
    "stem": (True, False),
    "head": (False, True),
}
"""Roles of which only one side grows with the width: whether d_out does, and whether d_in does."""


@dataclass(frozen=True)
class WidthDepth(Rule):
    """Rates for a network of another width and depth than the one that they were tuned on; for Adam by default.

    f_l = 1 / m_in for Adam, m_out / m_in for SGD, of matrices that are wider than a base network's on both sides

    Start: `LayerwiseLR(optimizer, WidthDepth(base=256), model)`. The optimizer is Adam or AdamW. Take the rate that is
    tuned on a network of width 256: all factors are 1 there.

    **`kind` must be that of the optimizer**, which the rule does not see: the default is wrong for SGD and for Muon.

    m_out and m_in are the sides d_out and d_in of the matrix by those of the base network. What grows on one side only,
    by m (embeddings, the head, biases, gains), has 1 for Adam and m for SGD; what does not grow has 1. This is muP.

    **Rates alone are not muP.** The network must be initialised by muP, its attention scaled by 1 / d, its output
    multiplied by 1 / m, and Adam's ε divided by m; without these a tuned rate does not carry over. Weight decay that is
    decoupled is multiplied by f_l here. muP divides its λ by f_l; the groups of `layerwise.param_groups` can be given
    that.

    With `depth`, layers of numbered blocks get another factor `depth^(alpha − 1)` under `"adam"`, as in CompleteP,
    where residual branches are multiplied by depth^−alpha in the network. At `alpha=1` it is 1.

    Three further kinds are for updates of spectral norm 1, as Muon's or Scion's, and wrong for Adam: √(d_out /
    d_in) / k (`"rms_to_rms"`, k the number of positions in a kernel), √max(1, d_out / d_in) (`"muon"`), and 0.2
    √max(d_out, d_in) (`"match_rms_adamw"`). They need no base, and leave out embeddings. PyTorch's Muon applies
    `"muon"` itself, as `adjust_lr_fn="original"`.

    When it helps: a rate that is tuned on a small network serves a large one. When not: at the width of the base
    network it changes nothing. Without the initialisation and multipliers of muP in the network a tuned rate does not
    carry over. Costs: nothing but the groups.

    Args:
        base: For `"adam"` and `"sgd"`: the shapes of the base network, by parameter name, such as
            `{name: p.shape for name, p in Net(width=128).named_parameters()}`; or its width, a whole number. Then all
            matrices are taken to grow on both sides, but those whose role is embedding, position, stem or head
            (`adapter.roles`).
        kind: `"adam"` (also AdamW, RMSprop, Adagrad, Lion), `"sgd"`, `"rms_to_rms"`, `"muon"` or `"match_rms_adamw"`.
        width: This network's width, if `base` is one; None for that of its embedding.
        depth: The number of blocks by that of the base network.
        alpha: The exponent of CompleteP, from 0.5 to 1.
        role: As in `ByRole`, where names are read wrongly.

    Raises:
        TypeError: `base` is neither shapes nor a width.
        ValueError: An argument is out of its range or missing; or, when attached, a parameter has no base shape or one
            of other dimensions, or the width is not known.

    Example:
        >>> names = {"embed.weight": (1000, 512), "h.0.mlp.fc1.weight": (2048, 512), "h.0.mlp.fc1.bias": (2048,)}
        >>> layers = [Layer(name, (torch.zeros(shape),)) for name, shape in names.items()]
        >>> small = {"embed.weight": (1000, 128), "h.0.mlp.fc1.weight": (512, 128), "h.0.mlp.fc1.bias": (512,)}
        >>> WidthDepth(small).init(layers, torch.device("cpu"))["_factors"]
        tensor([1.0000, 0.2500, 1.0000], dtype=torch.float64)

    Reference:
        Yang et al. 2022 (muP), as in the code of microsoft/mup, which takes the last side that grows for d_in also
        where a weight is transposed; Dey et al.: CompleteP, 2025, arXiv 2505.01618 (`depth`), as in the code of
        EleutherAI's nanoGPT-mup. `"rms_to_rms"` is that of Scion's code, the other two are those of PyTorch's Muon.
    """

    base: int | Mapping[str, Sequence[int]] | None = None
    kind: Kind = "adam"
    width: int | None = None
    depth: float = 1
    alpha: float = 1
    role: RoleArgument = None
    needs = ()
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True
    own_layer = True
    compares_layers = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        scaled = self.kind in ("adam", "sgd")
        for name in ("base", "width"):
            value = getattr(self, name)
            if has_type(value, bool) or (has_type(value, int) and value < 1):
                raise ValueError(f"{name}={value!r} must be a width, a whole number of at least 1")
        if scaled and self.base is None:
            raise ValueError(
                f"WidthDepth(kind={self.kind!r}) needs the base network: pass base=, its width or the shapes of its "
                "parameters, such as {name: p.shape for name, p in Net(width=128).named_parameters()}"
            )
        if self.base is not None and not has_type(self.base, (int, Mapping)):
            raise TypeError(f"base={self.base!r} must be a width, or a mapping of parameter names to shapes")
        if not scaled and self.base is not None:
            raise ValueError(f"kind={self.kind!r} follows from the shapes alone: leave base out")
        if self.width is not None and not has_type(self.base, int):
            raise ValueError("width= is this network's width beside a base width: WidthDepth(128, width=512)")
        if not (is_number(self.depth) and 0 < self.depth < math.inf):
            raise ValueError(f"depth={self.depth!r} must be the number of blocks by that of the base network, above 0")
        if not (is_number(self.alpha) and 0.5 <= self.alpha <= 1):
            raise ValueError(f"alpha={self.alpha!r} must be from 0.5 to 1, CompleteP's choice")
        if self.depth != 1 and self.kind != "adam":
            raise ValueError(f"depth={self.depth!r} is for kind='adam'; leave it out")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        roles = roles_of(layers, self.role)
        width = self._width(layers, roles)
        pairs = list(zip(layers, roles, strict=True))
        return fixed_factors(layers, [self._of_width(*one, width) * self._of_depth(*one) for one in pairs])

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each factor with its layers, so that a misread role is seen."""
        roles = roles_of(layers, self.role)
        width = self._width(layers, roles)
        members: dict[tuple[float, str], list[str]] = {}
        for layer, role in zip(layers, roles, strict=True):
            factor = self._of_width(layer, role, width) * self._of_depth(layer, role)
            members.setdefault((factor, role), []).append(layer.name or "(root)")
        lines = [f"{'factor':<9} {'role':<10} layers"]
        for (factor, role), names in sorted(members.items()):
            lines.append(f"{factor:<9.4g} {role:<10} {shown(names)}")
        return lines

    # --- Width --------------------------------------------------------------------------------------------------------

    def _width(self, layers: Sequence[Layer], roles: Sequence[str]) -> float:
        """Return by how much this network is wider than the base network, if the base is a width."""
        if not isinstance(self.base, int):
            return 1.0
        if self.width is not None:
            return self.width / self.base
        pairs = zip(layers, roles, strict=True)
        widths = {shape_of(layer)[1] for layer, role in pairs if role == "embedding" and largest_of(layer)[1].ndim == 2}
        if len(widths) != 1:
            found = f"its embeddings have the widths {sorted(widths)}" if widths else "it has no embedding"
            raise ValueError(f"the width of this network is not known, since {found}: pass width=")
        return widths.pop() / self.base

    def _of_width(self, layer: Layer, role: str, width: float) -> float:
        if self.kind not in ("adam", "sgd"):
            return self._of_shape(layer, role)
        wide, deep = self._growth(layer, role, width)
        if wide is not None and deep is not None:
            return 1 / deep if self.kind == "adam" else wide / deep
        one_side = wide or deep or 1.0
        return 1.0 if self.kind == "adam" else one_side

    def _growth(self, layer: Layer, role: str, width: float) -> tuple[float | None, float | None]:
        """Return m_out and m_in; None for a side that does not grow with the width."""
        name, largest = largest_of(layer)
        if not isinstance(self.base, Mapping):
            sides = (largest.numel() > 1, False) if largest.ndim < 2 else ONE_SIDED.get(role, (True, True))
            if role == "head" and largest.ndim < 2:
                sides = (False, False)  # a bias of the outputs
            return (width if sides[0] else None), (width if sides[1] else None)
        shape = self.base.get(name, self.base.get(layer.name))
        if shape is None:
            raise ValueError(f"base holds no shape for {name!r}; give those of all parameters of the base network")
        if len(shape) != largest.ndim or list(shape[2:]) != list(largest.shape[2:]):
            raise ValueError(
                f"the base shape of {name!r} is {tuple(shape)}, here {tuple(largest.shape)}: they may differ in the "
                "first two sizes, not in dimensions or kernels"
            )
        ratios = [None if own == other else own / other for own, other in zip(largest.shape, shape, strict=True)][:2]
        first, second = (*ratios, None, None)[:2]
        return (second, first) if inputs_first(layer.module) else (first, second)

    def _of_shape(self, layer: Layer, role: str) -> float:
        largest = largest_of(layer)[1]
        if largest.ndim < 2 or role in ("embedding", "position"):
            return 1.0
        d_out, d_in = shape_of(layer)
        if self.kind == "rms_to_rms":
            kernel = math.prod(largest.shape[2:])
            return math.sqrt(d_out / (d_in // kernel)) / kernel
        if self.kind == "muon":
            return math.sqrt(max(1.0, d_out / d_in))
        return 0.2 * math.sqrt(max(d_out, d_in))

    # --- Depth --------------------------------------------------------------------------------------------------------

    def _of_depth(self, layer: Layer, role: str) -> float:
        numbered = any(part.isdigit() for part in layer.name.split("."))
        return float(self.depth) ** (self.alpha - 1) if numbered and role not in ONE_SIDED else 1.0
