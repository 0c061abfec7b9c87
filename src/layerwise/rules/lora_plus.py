"""Hayou, Ghosh, Yu 2024: a larger rate for the second matrix of LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, is_number
from .constant import fixed_factors
from .roles import roles_of
from .state import State


@dataclass(frozen=True)
class LoRAPlus(Rule):
    """A larger rate for LoRA's matrix B.

    f_l = ratio for `lora_B` and for parameters of one dimension, 1 for every other parameter

    Start: `LayerwiseLR(optimizer, LoRAPlus(), model)`. The model is one that PEFT has made. Begin at half the rate that
    is tuned for LoRA.

    It finds the matrices by their names in PEFT. Layers are single parameters. LoRA of embeddings keeps factor 1, where
    the paper's code gives it an absolute rate of 1e-6. Decoupled weight decay is multiplied too.

    When it helps: the paper reports 1 to 2 % and up to twice the speed, on hard tasks. When not: its authors call the
    best ratio dependent on model and task, so compare at each ratio's own best rate. Costs: nothing but two groups.

    Args:
        ratio: The rate of B by that of A, above 0.

    Raises:
        ValueError: `ratio` is out of its range; or, when attached, there is no layer whose rate would be raised.

    Example:
        >>> names = ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"]
        >>> layers = [Layer(name, (torch.zeros(2, 2),)) for name in names]
        >>> LoRAPlus().init(layers, torch.device("cpu"))["_factors"]
        tensor([ 1., 16.], dtype=torch.float64)

    Reference:
        Hayou, Ghosh, Yu: LoRA+: efficient low rank adaptation of large models, ICML 2024, arXiv 2402.12354; parameters
        of one dimension are its code's.
    """

    ratio: float = 16
    needs = ()
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True
    own_layer = True

    def __post_init__(self) -> None:
        if not (is_number(self.ratio) and 0 < self.ratio < math.inf):
            raise ValueError(f"ratio={self.ratio!r} must be a finite number above 0; 16 is usual")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        raised = [
            (role == "lora_b" and "lora_embedding" not in layer.name.lower()) or all(p.ndim <= 1 for p in layer.whole())
            for role, layer in zip(roles_of(layers), layers, strict=True)
        ]
        if not any(raised):
            raise ValueError("LoRAPlus found no layer named lora_B: attach it to the model that PEFT has made")
        return fixed_factors(layers, [float(self.ratio) if one else 1.0 for one in raised])

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return a remark where there is no matrix B."""
        if "lora_b" in roles_of(layers):
            return []
        return [
            f"LoRAPlus found no layer named lora_B, as PEFT calls them: biases and gains get {self.ratio:g} times the "
            "rate, nothing else does; attach it to the model that PEFT has made"
        ]

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state
