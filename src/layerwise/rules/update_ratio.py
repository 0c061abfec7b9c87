"""Rules for how large a step is beside the weights it changes: aligned, at least, at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import check_choice, check_count
from ..layers import Layer
from ..statistics import Statistics
from .base import is_number
from .elementwise import ElementwiseRule, Value
from .lars import one_dimensional
from .refreshing import RefreshingRule
from .roles import roles_of
from .state import State


@dataclass(frozen=True)
class AlignUpdates(RefreshingRule):
    """One ratio of step to weights for all layers, or for all of a role.

    r_l = ‖u_l‖ / ‖w_l‖;  s_l = x / r_l, x the harmonic mean of r over the layers that are compared

    Start: `LayerwiseLR(optimizer, AlignUpdates(), model)`. The optimizer is Muon, with matrices in groups without
    weight decay. Keep its own rate: the mean of the factors is 1 by construction.

    f_l is a moving average of s_l, corrected for its beginning, that is renewed every few steps. u_l = Δw_l / lr is the
    direction of the optimizer's own step. Layers are single parameters; one-dimensional ones keep 1, and so does a
    layer whose ratio is zero or not finite.

    With `within="all"` on the matrices of Muon this is MuonL, with `within="role"` t-MuonL. Both leave the weight decay
    out of u, hence the group without decay.

    When it helps: its authors report 65 of 3,325 steps saved in training a GPT of 124 million parameters, in 15 runs.
    When not: elsewhere it has not been measured. Costs: a copy of the parameters, in each step that measures.

    Args:
        within: `"all"`, `"role"` (`roles_of`), or a function from a layer's name to what it is compared with.
        every: Steps from one measurement to the next.
        smooth: β of the moving average, from 0 to below 1.

    Raises:
        TypeError: `every` is no whole number, or `within` neither a string nor a function.
        ValueError: An argument is out of its range; or, when attached, `apply` is another place than `"update"`.

    Example:
        >>> rule = AlignUpdates(smooth=0)
        >>> layers = [Layer(name, (torch.zeros(2, 2),)) for name in "abc"]
        >>> ratios = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
        >>> of_step = {"weight_norm": torch.ones(3), "direction_norm": ratios}
        >>> rule.factors(Statistics(**of_step), rule.init(layers, torch.device("cpu")))[0]
        tensor([1.7143, 0.8571, 0.4286], dtype=torch.float64)

    Reference:
        The code of uw-ratio-alignment, 2026 (MuonL, t-MuonL).
    """

    within: Literal["all", "role"] | Callable[[str], str] = "all"
    every: int = 5
    smooth: float = 0.9
    needs = ("weight_norm", "direction_norm")
    default_layers = "parameter"
    default_exclude = staticmethod(one_dimensional)
    places = ("update",)

    def __post_init__(self) -> None:
        check_count("every", self.every)
        if not callable(self.within):
            check_choice("within", self.within, ("all", "role"))
        if not (is_number(self.smooth) and 0 <= self.smooth < 1):
            raise ValueError(f"smooth={self.smooth!r} must be a number from 0 to below 1, such as 0.9")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return which layers are compared, and the moving average before its first value."""
        if callable(self.within):
            groups = [self.within(layer.name) for layer in layers]
        else:
            groups = roles_of(layers) if self.within == "role" else [""] * len(layers)
        kinds = list(dict.fromkeys(groups))
        return {
            "_group": torch.tensor([kinds.index(one) for one in groups], dtype=torch.long, device=device),
            "_groups": len(kinds),
            "_included": torch.tensor([layer.included for layer in layers], device=device),
            **super().init(layers, device),
        }

    def answer(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return what brings each layer's ratio to the harmonic mean; NaN where there is none."""
        inverse = statistics.weight_norm / statistics.direction_norm
        usable = state["_included"] & (inverse > 0) & (inverse < math.inf)
        sums = inverse.new_zeros(2, state["_groups"])
        shown = torch.stack([torch.where(usable, inverse, 0.0), usable.to(inverse.dtype)])
        total, count = sums.index_add_(1, state["_group"], shown).index_select(1, state["_group"])
        return torch.where(usable, inverse * count / total, math.nan), state


class _OfStep(ElementwiseRule):
    """A rule of one formula that acts on the finished step."""

    default_layers = "parameter"
    default_exclude = staticmethod(one_dimensional)
    places = ("update",)


@dataclass(frozen=True)
class UpdateFloor(_OfStep):
    """Steps that are never small beside the weights.

    f_l = max(1, ratio ‖w_l‖ / ‖u_l‖)

    Start: `LayerwiseLR(optimizer, UpdateFloor(), model)` with `optimizer = Muon(matrices, lr=0.0375, weight_decay=0)`.
    The rate is that of the record that it comes from. A step then moves a matrix by at least lr · ratio = 1.3 % of its
    norm.

    u_l = Δw_l / lr is the direction of the optimizer's own step, so ‖Δw_l‖ ≥ lr · ratio · ‖w_l‖. It stands in place of
    weight decay: set that to 0. Layers are single parameters, and one-dimensional ones are left out. A layer whose step
    is zero keeps 1.

    When it helps: in place of weight decay, about 1 % fewer steps in one record of training a GPT of 124 million
    parameters. When not: beside weight decay, which it works against. Costs: a copy of the parameters during the step.

    Args:
        ratio: The least ratio, above 0.

    Raises:
        ValueError: `ratio` is out of its range; or, when attached, `apply` is another place than `"update"`.

    Example:
        >>> [UpdateFloor().factor(10.0, direction) for direction in (2.0, 5.0)]
        [1.75, 1.0]

    Reference:
        The code of modded-nanogpt, 2026, track 3, record 9.
    """

    ratio: float = 0.35
    needs = ("weight_norm", "direction_norm")

    def __post_init__(self) -> None:
        if not (is_number(self.ratio) and 0 < self.ratio < math.inf):
            raise ValueError(f"ratio={self.ratio!r} must be a finite number above 0, such as 0.35")

    def factor(self, weight_norm: Value, direction_norm: Value) -> Value:
        """Return 1, or what lengthens the step to the least ratio."""
        wanted = self.ratio * weight_norm / direction_norm
        return wanted.clamp(min=1.0) if isinstance(wanted, Tensor) else max(wanted, 1.0)


@dataclass(frozen=True)
class UpdateClip(_OfStep):
    """Steps whose root mean square is bounded, as Adafactor's.

    f_l = 1 / max(1, RMS(u_l) / limit)

    Start: `LayerwiseLR(optimizer, UpdateClip(), model)`. It can stand in place of a clipping of the global norm. Keep
    the own rate of an optimizer such as Adam: the factor is 1 but at steps that are too large.

    u_l = Δw_l / lr is the direction of the optimizer's own step and RMS(u_l) = ‖u_l‖ / √n_l, n_l the number of the
    layer's weights. Layers are single parameters, one-dimensional ones too.

    When it helps: against single steps that are too large, without a clipping of the global norm. When not: where no
    step is too large, it changes nothing. Costs: a copy of the parameters during the step.

    Args:
        limit: d, above 0.

    Raises:
        ValueError: `limit` is out of its range; or, when attached, `apply` is another place than `"update"`.

    Example:
        >>> f"{UpdateClip().factor(12.5**0.5):.6f}"
        '0.282843'

    Reference:
        Shazeer, Stern: Adafactor, 2018, arXiv 1804.04235, section 6 (update clipping).
    """

    limit: float = 1.0
    needs = ("direction_rms",)
    default_exclude = None

    def __post_init__(self) -> None:
        if not (is_number(self.limit) and 0 < self.limit < math.inf):
            raise ValueError(f"limit={self.limit!r} must be a finite number above 0; Adafactor's is 1")

    def factor(self, direction_rms: Value) -> Value:
        """Return 1, or what shortens the step to the limit."""
        over = direction_rms / self.limit
        return 1 / (over.clamp(min=1.0) if isinstance(over, Tensor) else max(over, 1.0))
