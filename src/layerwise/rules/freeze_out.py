"""Brock et al. 2017: layers that stop learning one after another, from the input up (FreezeOut)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import check_choice, check_count
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule, is_number, shown
from .layer_decay import DepthArgument, check_depth, depths_of, doubt
from .selection import check_flag
from .state import State

POWERS = {"linear": 1, "squared": 2, "cubic": 3}


@dataclass(frozen=True)
class FreezeOut(Rule):
    """A cosine for each layer that ends the earlier, the nearer the layer is to the input.

    f_l = ½ (1 + cos(π j / J_l)) / t_l at j < J_l, 0 after;  J_l = total t_l;  t_l = (t0 + (1 − t0) depth_l / D)^p

    Start: `LayerwiseLR(optimizer, FreezeOut(total=10_000), model)`. `total` is the number of all steps. Take the rate
    that a cosine would begin with, and no scheduler.

    j counts the calls of the optimizer from 0, also those that a fused one skips for a gradient scaler. The depth is 0
    for the embeddings, D for the head. The optimizer's rate must be constant, unless `base="cosine"`: then the factor
    is divided by the cosine ½ (1 + cos(π j / total)) that the scheduler makes. After `total` steps every layer stands
    still. `rescale` makes the first layers' rates up to 2 times larger at `t0=0.8`.

    The factor acts on the rate, so decoupled decay stops with it, and momentum goes on without effect. `diagnose`
    prints the step at which each layer ends.

    When it helps: the authors report 10 % less time at no cost, and 20 % for a relative rise of the error by at most 3
    %. When not: it saves no time by itself, and without that it only trains less. Set `requires_grad=False` for the
    parameters of layers whose factor is 0, from the input up. Costs: nothing but the groups.

    Args:
        total: J, the number of all steps.
        t0: When the first layer ends before the power is taken, in (0, 1]; 1 freezes nothing early.
        scaling: The power p: `"cubic"`, `"squared"` or `"linear"`.
        rescale: Whether the first rates are divided by t_l, so that each layer travels as far in its shorter time.
        base: What the optimizer's rate is: `"constant"` or `"cosine"`.
        depth: As in `LayerDecay`, which reads the depths from the names by default, and warns where they are in doubt.

    Raises:
        TypeError: `total` is no whole number, a word no string, or `depth` none of what it may be.
        ValueError: An argument is out of its range, or a depth is no whole number of at least 0.

    Example:
        >>> names = ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
        >>> rule, layers = FreezeOut(1000), [Layer(name, (torch.zeros(1),)) for name in names]
        >>> rule.factors(Statistics(), rule.init(layers, torch.device("cpu")))[0]
        tensor([1.9531, 1.6283, 1.3717, 1.1664, 1.0000], dtype=torch.float64)

    Reference:
        Brock, Lim, Ritchie, Weston: FreezeOut: accelerate training by progressively freezing layers, 2017, arXiv
        1706.04983. The ½ is its code's; the formula in the paper lacks it.
    """

    total: int
    t0: float = 0.8
    scaling: Literal["cubic", "squared", "linear"] = "cubic"
    rescale: bool = True
    base: Literal["constant", "cosine"] = "constant"
    depth: DepthArgument = None
    needs = ()
    default_place = "lr"
    scales_rates = True
    compares_layers = True

    def __post_init__(self) -> None:
        check_count("total", self.total, ", the number of all steps")
        if not (is_number(self.t0) and 0 < self.t0 <= 1):
            raise ValueError(f"t0={self.t0!r} must be a share of the training in (0, 1], such as 0.8")
        check_choice("scaling", self.scaling, tuple(POWERS))
        check_flag("rescale", self.rescale)
        check_choice("base", self.base, ("constant", "cosine"))
        check_depth(self.depth)

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return when each layer ends, as a share of the training, and the number of the first step."""
        device, dtype = common_device(layers)
        return {"_ends": torch.tensor(self._ends(layers), dtype=dtype, device=device), "step": 0}

    def _ends(self, layers: Sequence[Layer]) -> list[float]:
        read = depths_of(layers, self.depth)
        shares = [depth / top if top else 1.0 for depth, top in zip(read.depth, read.top, strict=True)]
        return [(self.t0 + (1 - self.t0) * share) ** POWERS[self.scaling] for share in shares]

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the cosines at this step."""
        step, ends = state["step"], state["_ends"]
        done = step / (self.total * ends)
        falling = 0.5 * (1 + torch.cos(math.pi * done.clamp(max=1)))
        factors = falling / ends if self.rescale else falling
        if self.base == "cosine" and step < self.total:
            factors = factors / (0.5 * (1 + math.cos(math.pi * step / self.total)))
        return torch.where(done < 1, factors, 0.0), {**state, "step": step + 1}

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return a warning with the table of last steps if the names leave the depths in doubt."""
        reasons = depths_of(layers, self.depth).doubts
        return doubt("FreezeOut", f"FreezeOut({self.total}, depth=function)", reasons, self.table(layers))

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each layer's last step, so that a misread depth is seen."""
        members: dict[float, list[str]] = {}
        for end, layer in zip(self._ends(layers), layers, strict=True):
            members.setdefault(end * self.total, []).append(layer.name or "(root)")
        lines = [f"{'last step':<10} layers"]
        for end, names in sorted(members.items()):
            lines.append(f"{end:<10.6g} {shown(names)}")
        return lines
