"""A fixed factor for each role in the network, as in blockwise learning rates (Wang et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._arguments import has_type
from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, is_number, shown
from .constant import check_factor, fixed_factors
from .roles import ROLES, RoleArgument, roles_of
from .state import State

PRESETS: dict[str, dict[str, float]] = {
    "blockwise": {"norm": 1, "vo": 4, "ffn": 6, "qk": 8, "embedding": 10, "position": 10, "head": 10},
    "fixup": {"bias": 0.1, "scalar": 0.1},
    "airbench": {"norm.bias": 64},
    "dinov2": {"stem": 0.2},
    "nanochat": {"wte": 10, "value_embeds": 5, "lm_head": 0.2, "resid_lambdas": 0.25, "x0_lambdas": 25},
}
"""Role, `bias`, or role and `bias` to factor; the docstring of `ByRole` has the sources."""
FINAL = 0.05
"""The last rate of every role under `schedule="shared"`, relative to the largest rate of a factor of 1."""


@dataclass(frozen=True)
class ByRole(Rule):
    """A factor for each role in the network.

    f_l = ratio[role_l], 1 for a role without a ratio

    Start: `LayerwiseLR(optimizer, ByRole("blockwise"), model, normalize="weighted")`. Keep the optimizer's own rate.
    Without `normalize` begin at a sixth of it: the blockwise ratios have a mean of 6.2 over the weights of a small GPT.
    The other presets leave most factors at 1, and need no `normalize`.

    Roles come from the modules' classes and from names, `layerwise.rules.roles.roles_of`; `adapter.roles` and
    `diagnose` show them. Look at them first: names may be read wrongly. Layers are single parameters, and a bias has
    the role of its module. The factor multiplies decoupled weight decay too.

    Under `schedule="shared"` a role's ratio a lengthens its warm-up instead, and all roles end at the same rate, as the
    code of the paper does: of the largest rate η, a role has η t / warmup until t = a · warmup, and then falls by a
    cosine from a η to η / 20. The factor is this rate by that of a = 1, so the optimizer's scheduler must be the same
    warm-up and cosine, with ratio 1. t counts the calls of the optimizer, also those that a fused one skips for a
    gradient scaler.

    When it helps: the paper reports transformers pre-trained in 1.9 to 2.3 times fewer steps. When not: another group's
    measurement at four sizes found no gain, or a loss. Without `normalize` compare with the plain optimizer at the mean
    factor. Costs: nothing but the groups; as permanent groups (`layerwise.param_groups`) nothing at all.

    Presets: `"blockwise"` has the paper's ratios; that of the head is from another group's code
    (hed-ucas/Layer-wise-Learning-Rate). `"fixup"` is for biases and scales of networks with Fixup initialisation, as in
    its code. `"airbench"` is for biases of batch normalisations, as in lib_airbench94, which divides their weight decay
    by 64. `"dinov2"` is for the patch embedding, beside `LayerDecay(0.9)`, as in its code. `"nanochat"` has its AdamW
    rates beside a matrix rate of 0.02, before their factor (width / 768)^−0.5; its keys are names of its modules and
    parameters, which become roles.

    Args:
        ratios: A preset, `"blockwise"`, `"fixup"`, `"airbench"`, `"dinov2"` or `"nanochat"`, or a mapping of roles
            to factors. A key `"bias"` stands for the biases of all roles, one such as `"norm.bias"` for those of one.
        role: A mapping of patterns to roles, or a function from a layer's name to its role or None, for names that are
            read wrongly. A role may then be any string.
        schedule: `"constant"` or `"shared"`.
        warmup: The steps of warm-up for a ratio of 1, for `"shared"`.
        total: The number of all steps, for `"shared"`.

    Raises:
        TypeError: `ratios` or `role` has the wrong type.
        ValueError: A preset, a role or the schedule is unknown, or a number out of its range.

    Example:
        >>> names = ("wte.weight", "h.0.attn.q_proj.weight", "h.1.ln.weight")
        >>> layers = [Layer(name, (torch.zeros([2] if "ln" in name else [2, 2]),)) for name in names]
        >>> ByRole("blockwise").init(layers, torch.device("cpu"))["_factors"]
        tensor([10.,  8.,  1.], dtype=torch.float64)

    Reference:
        Wang et al.: The sharpness disparity principle in transformers for accelerating language model pre-training,
        ICML 2025, arXiv 2502.19002; `schedule="shared"` is its code's.
    """

    ratios: str | Mapping[str, float]
    role: RoleArgument = None
    schedule: Literal["constant", "shared"] = "constant"
    warmup: int = 0
    total: int | None = None
    needs = ()
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True
    compares_layers = True

    def needs_own_layer_only(self) -> bool:
        """Return whether the factors never change."""
        return self.schedule == "constant"

    def __post_init__(self) -> None:
        if isinstance(self.ratios, str):
            if self.ratios not in PRESETS:
                raise ValueError(f"preset {self.ratios!r} is unknown; allowed: {', '.join(map(repr, PRESETS))}")
        elif not has_type(self.ratios, Mapping):
            raise TypeError(f"ByRole takes a preset or a mapping of role to factor, not {self.ratios!r}")
        if not self._ratios:
            raise ValueError("ByRole({}) changes no layer; give at least one role, such as {'embedding': 10}")
        known = {"bias", *ROLES, *(f"{role}.bias" for role in ROLES)}
        for role, factor in self._ratios.items():
            check_factor(factor, f"ByRole role {role!r}")
            if self._roles is None and role not in known:
                raise ValueError(
                    f"role {role!r} is unknown; allowed: bias, and with or without .bias {', '.join(ROLES)}"
                )
        if self.schedule not in ("constant", "shared"):
            raise ValueError(f"schedule={self.schedule!r} is unknown; allowed: 'constant', 'shared'")
        if self.schedule == "shared":
            self._check_steps()

    def _check_steps(self) -> None:
        total = self.total or 0
        if not (is_number(self.warmup) and self.warmup >= 0 and max(1.0, *self._ratios.values()) * self.warmup < total):
            raise ValueError(
                f"warmup={self.warmup!r}, total={self.total!r}: schedule='shared' takes the steps of warm-up, from 0, "
                "and the number of all steps, above the longest warm-up, which is that of the largest ratio"
            )

    @property
    def _roles(self) -> RoleArgument:
        return _nanochat_role if self.role is None and self.ratios == "nanochat" else self.role

    @property
    def _ratios(self) -> Mapping[str, float]:
        return PRESETS[self.ratios] if isinstance(self.ratios, str) else self.ratios

    def _ratio(self, role: str, layer: Layer) -> float:
        """Return the ratio of a layer's role; what is said of its biases goes first."""
        names = [name.partition("[")[0] for name in layer.parameter_names or (layer.name,)]
        is_bias = all(name.rpartition(".")[2] == "bias" for name in names)
        keys = (f"{role}.bias", "bias", role) if is_bias else (role,)
        return float(next((self._ratios[key] for key in keys if key in self._ratios), 1.0))

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the ratios as a tensor, and the number of steps for a schedule."""
        ratios = [self._ratio(role, layer) for role, layer in zip(roles_of(layers, self._roles), layers, strict=True)]
        return {**fixed_factors(layers, ratios), **({"step": 0} if self.schedule == "shared" else {})}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the ratios, or at this step of a schedule the rates by that of ratio 1."""
        if self.schedule == "constant":
            return state["_factors"], state
        step, ratios = state["step"], state["_factors"]
        return self._rate(ratios, step) / self._rate(torch.ones_like(ratios), step), {**state, "step": step + 1}

    def _rate(self, ratio: Tensor, step: int) -> Tensor:
        """Return the rate of a ratio at a step, relative to the largest rate of ratio 1."""
        assert self.total is not None
        # At the first step of a warm-up every rate is 0, so that the factors are those of the second.
        rising = ratio.new_full(ratio.shape, max(step, 1) / self.warmup) if self.warmup else ratio
        begin = ratio * self.warmup
        done = ((step - begin) / (self.total - begin)).clamp(0, 1)
        falling = FINAL + 0.5 * (ratio - FINAL) * (1 + torch.cos(math.pi * done))
        return torch.where(step < begin, rising, falling)

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each role with its factor and its layers."""
        members: dict[tuple[str, float], list[str]] = {}
        for role, layer in zip(roles_of(layers, self._roles), layers, strict=True):
            members.setdefault((role, self._ratio(role, layer)), []).append(layer.name or "(root)")
        lines = [f"{'role':<10} {'factor':<8} layers"]
        for (role, ratio), names in members.items():
            without = "" if role in self._ratios or f"{role}.bias" in self._ratios or ratio != 1 else "  no ratio"
            lines.append(f"{role:<10} {ratio:<8.4g} {shown(names)}{without}")
        return lines


def _nanochat_role(name: str) -> str | None:
    return next((part for part in name.split(".") if part in PRESETS["nanochat"]), None)
