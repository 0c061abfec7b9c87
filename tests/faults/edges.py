"""Gradients at the edge of what numbers can be, put into a small network; rules and optimizers that meet them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwise.rules import Directionality, GradientAmplification, Phase
from rule_cases import RULES as CASES

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYERS = ["0", "2", "4"]
RULES: dict[str, Any] = {
    **{name: case.make(LAYERS) for name, case in CASES.items()},
    "directionality": GradientAmplification(Directionality(threshold=0.5, reselect=1), [Phase(9, True)]),
    "G prime": GradientAmplification(Directionality("G_prime", threshold=0.5, reselect=1), [Phase(9, True)]),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=2.0**-6),
    "momentum": lambda p: torch.optim.SGD(p, lr=2.0**-6, momentum=0.875, weight_decay=2.0**-4),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=2.0**-6, momentum=0.875, weight_decay=2.0**-4, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2.0**-6),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=2.0**-6, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=2.0**-6, weight_decay=2.0**-4),
}
PLACES = ["auto", "gradient", "lr", "update"]
EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-38, -1e-38]


def fits(rule: str, kind: str, place: str) -> bool:
    """Tell whether a rule may act at this place of an optimizer; elsewhere it is refused."""
    if place == "auto":
        return not RULES[rule].needs_scale or kind in ("SGD", "momentum", "Nesterov")
    divided_out = place == "gradient" and RULES[rule].scales_rates and kind.startswith("Ada")
    return place in RULES[rule].places and not divided_out


@dataclass(frozen=True)
class Fault:
    """One kind of number in the gradient of one parameter at one step: in one entry, or in all."""

    step: int
    parameter: int
    value: float | str
    everywhere: bool

    def put_into(self, gradient: Tensor) -> None:
        info = torch.finfo(gradient.dtype)
        named = {"largest": info.max, "lowest": info.min, "tiny": info.tiny, "subnormal": info.smallest_normal / 4}
        number = named[self.value] if isinstance(self.value, str) else self.value
        value = torch.tensor(number, dtype=torch.float64).to(gradient.dtype)
        if self.everywhere:
            gradient.fill_(value)
        else:
            gradient.view(-1)[-1] = value


FAULTS = st.lists(
    st.builds(
        Fault,
        step=st.integers(0, 3),
        parameter=st.integers(0, 5),
        value=st.sampled_from([*EDGES, "largest", "lowest", "tiny", "subnormal"]),
        everywhere=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def network(dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def put_gradients(model: nn.Module, step: int, faults: list[Fault]) -> None:
    generator = torch.Generator().manual_seed(step)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for fault in faults:
            if (fault.step, fault.parameter) == (step, number):
                fault.put_into(p.grad)


every_case = given(
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(sorted(RULES)),
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    place=st.sampled_from(PLACES),
    faults=FAULTS,
)
