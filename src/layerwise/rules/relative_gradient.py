"""Lee et al. 2023: rates from the relative gradient norm, measured at the start of each epoch (Auto-RGN, Auto-SNR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .._arguments import check_choice, check_count
from .._tensors import local, moved
from ..layers import Layer
from ..statistics import Gradients, Statistics, common_device
from .base import Rule
from .copies import dense, refuse_shards
from .state import State

THRESHOLD = 0.95
"""The signal-to-noise ratio from which on a layer is trained."""


@dataclass(frozen=True)
class RelativeGradient(Rule):
    """The layers whose gradients are large beside their weights learn fastest.

    r_l = mean of ‖g_l‖ / ‖w_l‖ over the first steps of an epoch;  f_l = r_l / max_k r_k

    Start: `LayerwiseLR(optimizer, RelativeGradient(), model)`. It is for fine-tuning a trained network. Take the rate
    of ordinary fine-tuning, or up to ten times more: the largest factor is 1. The authors' code chooses from 1e-5 to
    0.1. Call `adapter.end_epoch()` after every epoch.

    The factors are 1 until the first measurement is complete. Each epoch begins with a new one, during which the
    factors of the one before hold. Steps that do not count (skipped ones, non-finite gradients), and those in which a
    layer's gradient is zero, are left out of its mean. A layer without a gradient in all of them has 1 and does not
    count in the maximum. So has one whose weights are zero, such as a new head, and so have batch normalisations.

    With `kind="snr"`, s_l is the mean over the weights of g² / (var(g) + 1e-8), the variance over the first dimension
    of each gradient, and f_l is 1 where s_l ≥ 0.95, else 0. A layer with only one row has no variance, and keeps 1. Of
    n rows, s_l is at least (n − 1) / n while gradients are large beside 1e-4, so this stops narrow layers and those
    with tiny gradients only.

    When it helps: where the new data differ in a way that few layers must follow. The paper finds the first block best
    for changed inputs, the last one for changed labels. When not: from random weights, where no layer is to be kept.
    Costs: one pass over gradients and weights in the measured steps, and with `"snr"` two more over the gradients, in
    some 15 operations a layer.

    Args:
        kind: `"rgn"` or `"snr"`.
        batches: Measured steps at the start of each epoch.

    Raises:
        TypeError: `batches` is no whole number, or `kind` no string.
        ValueError: An argument is out of its range; or, when attached with `kind="snr"`, parameters are sharded.

    Example:
        >>> rule, layers = RelativeGradient(batches=1), [Layer(name, (torch.zeros(2, 2),)) for name in "abc"]
        >>> norms = {"gradient_norm": torch.tensor([0.1, 0.4, 0.2]), "weight_norm": torch.tensor([1.0, 2.0, 4.0])}
        >>> statistics = Statistics(**norms, counts=torch.tensor(True))
        >>> rule.factors(statistics, rule.init(layers, torch.device("cpu")))[0]
        tensor([0.5000, 1.0000, 0.2500], dtype=torch.float64)

    Reference:
        Lee, Chen, Tajwar, Kumar, Yao, Liang, Finn: Surgical fine-tuning improves adaptation to distribution shifts,
        ICLR 2023, arXiv 2210.11466. As in its code: the mean over 5 batches, the maximum over parameters, batch
        normalisations left out, the threshold on s itself. Other than there: these batches are trained on with the old
        factors, the optimizer keeps its state at the start of an epoch, and batch normalisations are trained.
    """

    kind: Literal["rgn", "snr"] = "rgn"
    batches: int = 5
    needs = ("gradient_norm", "weight_norm", "counts")
    default_layers = "parameter"
    default_place = "lr"
    scales_rates = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("rgn", "snr"))
        check_count("batches", self.batches)
        if self.kind == "snr":
            object.__setattr__(self, "needs", ("gradients", "counts"))

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return factors of 1 and a measurement before its first step."""
        if self.kind == "snr":
            refuse_shards(layers, self, "use kind='rgn'")
        device, dtype = common_device(layers)
        zeros = torch.zeros(len(layers), dtype=dtype, device=device)
        measured = [layer.included and not isinstance(layer.module, nn.modules.batchnorm._NormBase) for layer in layers]
        return {
            "factors": torch.ones_like(zeros),
            "sum": zeros,
            "count": zeros.clone(),
            "step": 0,
            "_measured": torch.tensor(measured, device=device),
            "_sizes": [len(layer.parameters) for layer in layers],
        }

    def asks(self, state: State) -> bool:
        """Return whether this step is measured."""
        return state["step"] < self.batches

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors, which are new at the last one of the measured steps."""
        if not self.asks(state):
            return state["factors"], state
        if self.kind == "rgn":
            value = statistics.gradient_norm / statistics.weight_norm
        else:
            value = _signal_to_noise(statistics.gradients, state["_sizes"], state["sum"])
        usable = statistics.counts & (value > 0) & (value < math.inf)
        total = state["sum"] + torch.where(usable, value, 0.0)
        count = state["count"] + usable
        new: State = {**state, "sum": total, "count": count, "step": state["step"] + 1}
        if new["step"] == self.batches:
            new["factors"] = self._of_means(total / count, (count > 0) & state["_measured"], state["factors"])
        return new["factors"], new

    def _of_means(self, means: Tensor, known: Tensor, before: Tensor) -> Tensor:
        """Return the factors of the measured means; where no step counted, those of before."""
        if self.kind == "snr":
            found = torch.where(means >= THRESHOLD, 1.0, 0.0).to(means.dtype)
        else:
            found = means / torch.where(known, means, 0.0).amax()
        return torch.where(known.any(), torch.where(known, found, 1.0), before)

    def end_epoch(self, state: State) -> State:
        """Begin a new measurement."""
        zeros = torch.zeros_like(state["sum"])
        return {**state, "sum": zeros, "count": zeros.clone(), "step": 0}


def _signal_to_noise(gradients: Gradients, sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return the mean over each layer's weights of g² / (var(g) + 1e-8); NaN for a layer without a gradient."""
    values: list[Tensor] = []
    tensors = iter(gradients.tensors)
    for size in sizes:
        total, weights = like.new_zeros(()), 0
        for gradient in (next(tensors) for _ in range(size)):
            if gradient is None:
                continue
            own = dense(local(gradient)).to(like.dtype)
            if gradients.scale is not None:
                own = own / moved(gradients.scale, own.device)
            noise = own.var(0, keepdim=True) if own.shape[:1].numel() > 1 else own * math.nan
            total = total + moved((own.square() / (noise + 1e-8)).sum(), like.device)
            weights += own.numel()
        values.append(total / weights if weights else total * math.nan)
    return torch.stack(values)
