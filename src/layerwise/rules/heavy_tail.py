"""Rates from the tails of the weights' spectra: TempBalance (Zhou et al. 2023) and LLR (He et al. 2026)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._arguments import check_choice, check_count
from .._tensors import moved
from ..layers import Layer
from ..statistics import Statistics
from .base import Rule, is_number
from .combine import check_bounds, refresh
from .copies import refuse_shards
from .roles import roles_of
from .state import State

Style = Literal["tempbalance", "llr"]
RANGES: dict[Style, tuple[float, float]] = {"tempbalance": (0.5, 1.5), "llr": (1.0, 5.0)}
RAMPS: dict[Style, int] = {"tempbalance": 0, "llr": 50}


def hill_alpha(weight: Tensor, aspect: float | None = None) -> Tensor:
    """Return the Hill estimate of the exponent of a matrix's spectrum, a scalar in float64; infinite for a flat one.

    α = 1 + m / Σ_j ln(λ_j / λ_i), j from i = ⌊N / 2⌋ to N − 1, m = N − i, where λ are the N squared singular values in
    ascending order. Of a kernel, those of the matrices at all its positions are taken together.

    Args:
        weight: A tensor of two or more dimensions.
        aspect: None, or the ratio of the long side to the short one of windows whose spectra are averaged.

    Raises:
        ValueError: The weight has fewer dimensions, or is sharded.

    Example:
        >>> hill_alpha(torch.tensor([1.0, 2.0, 4.0, 8.0]).sqrt().diag()).item().__round__(5)
        3.88539
    """
    singular = _singular_values(weight, aspect)
    smallest = torch.finfo(singular.dtype).tiny
    logarithms = 2 * singular.flatten().clamp(min=smallest).double().log().sort().values
    count = len(logarithms) - len(logarithms) // 2
    upper = logarithms.narrow(0, len(logarithms) - count, count)
    alpha = 1 + count / (upper - upper.select(0, 0)).sum()
    return torch.where(weight.detach().isfinite().all(), alpha, math.nan)


def spectral_norm(weight: Tensor) -> Tensor:
    """Return the largest singular value of a matrix, a scalar in float64; of a kernel, that at any of its positions.

    Args:
        weight: A tensor of two or more dimensions.

    Raises:
        ValueError: It has fewer, or is sharded.

    Example:
        >>> spectral_norm(torch.tensor([3.0, -4.0]).diag())
        tensor(4., dtype=torch.float64)
    """
    largest = _singular_values(weight).amax().double()
    return torch.where(weight.detach().isfinite().all(), largest, math.nan)


def stable_rank(weight: Tensor) -> Tensor:
    """Return Σ λ / max λ, λ the squared singular values of a matrix, a scalar in float64; NaN for zero weights.

    Of a kernel, the singular values of the matrices at all its positions are taken together.

    Args:
        weight: A tensor of two or more dimensions.

    Raises:
        ValueError: It has fewer, or is sharded.

    Example:
        >>> stable_rank(torch.tensor([3.0, 4.0]).diag())
        tensor(1.5625, dtype=torch.float64)
    """
    singular = _singular_values(weight).double()
    rank = (singular / singular.amax()).square().sum()
    return torch.where(weight.detach().isfinite().all(), rank, math.nan)


def _singular_values(weight: Tensor, aspect: float | None = None) -> Tensor:
    """Return the singular values of the matrix at each position of a kernel, in at least float32."""
    if weight.ndim < 2 or not weight.numel() or hasattr(weight, "placements"):
        what = "is sharded" if hasattr(weight, "placements") else f"has shape {tuple(weight.shape)}"
        raise ValueError(
            f"weight {what}, and a spectrum is that of a whole matrix: pass a tensor of two or more dimensions, of a "
            "sharded one full_tensor()"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # The decomposition raises for numbers that are not finite.
    values = torch.nan_to_num(weight.detach().to(dtype), 0.0, 0.0, 0.0)
    matrices = values.flatten(2).movedim(2, 0) if values.ndim > 2 else values.unsqueeze(0)
    linalg: Any = torch.linalg
    if aspect is None:
        return linalg.svdvals(matrices)
    return linalg.svdvals(_windows(matrices, aspect)).square().mean(1).sqrt()


def _windows(matrices: Tensor, aspect: float) -> Tensor:
    """Return windows of one aspect ratio that lie beside each other, in a new second dimension."""
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.mT
    long, short = matrices.shape[1:]
    height = min(long, max(1, round(aspect * short)))
    width = short if height < long or long == aspect * short else max(1, min(short, round(long / aspect)))
    rows, columns = long // height, short // width
    cut = matrices.narrow(1, 0, rows * height).narrow(2, 0, columns * width)
    parts = cut.reshape(-1, rows, height, columns, width).transpose(2, 3)
    return parts.reshape(-1, rows * columns, height, width)


class _Spectrum(Rule):
    """The factors of one measurement."""

    needs = ()

    def __init__(self, of: HeavyTail) -> None:
        self._of = of

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        measured, topmost = self._of.measured(layers)
        sources: list[int] = []
        weights = [at for at, layer in enumerate(layers) if _matrix(layer) is not None]
        for at, layer in enumerate(layers):
            before = [i for i in weights if i < at]
            follows = isinstance(layer.module, nn.modules.batchnorm._NormBase) and self._of.style == "tempbalance"
            sources.append(before[-1] if follows and before else at)
        return {
            "_measured": [_matrix(layer) if own else None for layer, own in zip(layers, measured, strict=True)],
            "_topmost": torch.tensor(topmost, device=device),
            "_sources": torch.tensor(sources, dtype=torch.long, device=device),
        }

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        topmost: Tensor = state["_topmost"]
        alphas: list[Tensor] = []
        for weight in state["_measured"]:
            if weight is None:
                alphas.append(torch.full((), math.nan, dtype=torch.float64, device=topmost.device))
            else:
                alphas.append(moved(hill_alpha(weight, self._of.aspect), topmost.device))
        alpha = torch.stack(alphas)
        factors = mapped(alpha, topmost, *(self._of.limits or RANGES[self._of.style]))
        return factors.index_select(0, state["_sources"]), state


def mapped(alpha: Tensor, topmost: Tensor, low: float, high: float) -> Tensor:
    """Return α mapped linearly so that its least value becomes `low` and its largest `high`; 1 where α is not finite.

    Args:
        alpha: α of each layer.
        topmost: Which layers have the largest α of all instead of their own.
        low: The least factor.
        high: The largest factor.

    Example:
        >>> mapped(torch.tensor([2.0, 3.0, 4.0]), torch.zeros(3, dtype=torch.bool), 0.5, 1.5)
        tensor([0.5000, 1.0000, 1.5000])
    """
    known = alpha.isfinite() & topmost.logical_not()
    least, largest = torch.where(known, alpha, math.inf).amin(), torch.where(known, alpha, -math.inf).amax()
    share = (torch.where(topmost, largest, alpha) - least) / (largest - least)
    return torch.where((known | topmost) & share.isfinite(), low + (high - low) * share, 1.0)


@dataclass(frozen=True)
class HeavyTail(Rule):
    """Larger rates for layers whose spectrum has a lighter tail.

    f_l = low + (high − low) (α_l − min α) / (max α − min α), 1 for a layer that is not measured

    Start: `LayerwiseLR(optimizer, HeavyTail(every=400), model)`. `every` is the number of steps in an epoch. Keep the
    optimizer's own rate: the factors are 0.5 to 1.5. With `HeavyTail("llr")` they are 1 to 5: begin at a fifth of that
    rate.

    α_l is `hill_alpha` of the layer's matrix, measured every few steps. Scaling the weights does not change it. With
    `style="tempbalance"`, the first and the last matrix, embeddings, and matrices of fewer than `least` singular values
    keep 1, and a batch normalisation has the factor of the matrix before it. With `style="llr"`, all matrices are
    measured, embeddings and the head get the largest factor, and everything else keeps 1.

    When it helps: for language models of 60 million to a billion parameters the authors of LLR report perplexities of
    20.3 to 9.6, where the plain optimizer has 21.9 to 9.8. When not: LLR has been compared with no plain optimizer at
    the mean factor, and none of its factors is below 1, so compare, or attach with `normalize="weighted"`. Of a random
    matrix α is larger the longer it is beside its width, so at the start of training this is a rule of shapes; `aspect`
    measures windows of one shape instead. Costs: a measurement decomposes each matrix, which takes seconds for 4096 ×
    4096 and waits for the device. Other steps cost nothing.

    Args:
        style: `"tempbalance"` or `"llr"`.
        every: Steps from one measurement to the next. TempBalance measures once an epoch, LLR every 40 or 100 steps. A
            step that a gradient scaler skips counts too where the optimizer is called for it, as a fused one is.
        limits: `(low, high)`; None for the style's, (0.5, 1.5) or (1, 5).
        ramp: Steps in which the factors move to new ones; None for the style's, 0 or 50 (at most `every` − 1).
        until: The step after which the factors stay; None for never. LLR takes a fifth of all steps.
        least: The fewest singular values of a matrix that is measured.
        aspect: None, or the ratio of long to short side of windows, such as 1. A matrix is cut into these, and α is
            that of their mean spectrum.

    Raises:
        TypeError: A number of steps is no whole number, or `limits` holds no numbers.
        ValueError: An argument is out of its range; or, when attached, parameters are sharded.

    Example:
        >>> rule, steepness = HeavyTail(least=2), (1.0, 1.0, 0.5, 1 / 3, 1.0)
        >>> spectra = [torch.exp(torch.arange(6, dtype=torch.float64) * c / 2) for c in steepness]
        >>> layers = [Layer(str(i), (torch.diag(one),)) for i, one in enumerate(spectra)]
        >>> rule.factors(Statistics(), rule.init(layers, torch.device("cpu")))[0]
        tensor([1.0000, 0.5000, 1.0000, 1.5000, 1.0000], dtype=torch.float64)

    Reference:
        Zhou, Pang, Liu, Martin, Mahoney, Yang: Temperature balancing, layer-wise weight analysis, and neural network
        training, NeurIPS 2023, arXiv 2312.00359 (TempBalance); He, Tu, Wang, Yin, Liu: ICML 2026, arXiv 2605.22297
        (LLR). Both as in their code, but that singular values of 0 count as the smallest number of their type. The
        windows are in the manner of FARMS (2025).
    """

    style: Style = "tempbalance"
    every: int = 100
    limits: tuple[float, float] | None = None
    ramp: int | None = None
    until: int | None = None
    least: int = 50
    aspect: float | None = None
    needs = ()
    default_layers = "module"
    default_place = "lr"
    scales_rates = True

    def __post_init__(self) -> None:
        check_choice("style", self.style, tuple(RANGES))
        check_count("every", self.every)
        check_count("least", self.least)
        if self.limits is not None:
            check_bounds(self.limits, "limits")
        if self.until is not None:
            check_count("until", self.until)
        if self.aspect is not None and not (is_number(self.aspect) and 1 <= self.aspect < math.inf):
            raise ValueError(f"aspect={self.aspect!r} must be the long side by the short one, at least 1, or None")
        _ = self._refreshed  # checks the ramp

    @cached_property
    def _refreshed(self) -> Rule:
        """The rule that measures, asked every few steps only."""
        ramp = min(RAMPS[self.style], self.every - 1) if self.ramp is None else self.ramp
        return refresh(_Spectrum(self), self.every, ramp)

    def measured(self, layers: Sequence[Layer]) -> tuple[list[bool], list[bool]]:
        """Return which layers are measured, and which get the largest α instead."""
        roles = roles_of(layers)
        shown = [layer.included and _matrix(layer) is not None for layer in layers]
        if self.style == "llr":
            topmost = [own and role in ("embedding", "head") for own, role in zip(shown, roles, strict=True)]
        else:
            topmost = [False] * len(layers)
            weights = [
                at
                for at, (layer, role) in enumerate(zip(layers, roles, strict=True))
                if _matrix(layer) is not None and role not in ("embedding", "position")
            ]
            shown = [own and at in weights[1:-1] for at, own in enumerate(shown)]
        rest = zip(layers, shown, topmost, strict=True)
        return [own and not top and self._count(layer) >= self.least for layer, own, top in rest], topmost

    def _count(self, layer: Layer) -> int:
        """Return how many singular values a layer has."""
        weight = _matrix(layer)
        assert weight is not None
        blank = torch.empty(math.prod(weight.shape[2:]), *weight.shape[:2], device="meta")
        window = blank if self.aspect is None else _windows(blank, self.aspect)
        return min(window.shape[-2:]) * len(blank)

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors before the first measurement."""
        refuse_shards(layers, self, "use a rule of norms, such as WeightScaled")
        return self._refreshed.init(layers, device)

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors, which are measured anew every few steps."""
        if self.until is not None and state["step"] >= self.until:
            return state["factors"], state
        return self._refreshed.factors(statistics, state)

    def remarks(self, layers: Sequence[Layer]) -> list[str]:
        """Return a remark where there is nothing to compare."""
        count = sum(self.measured(layers)[0])
        if count > 1:
            return []
        return [
            f"{self!r} measures {count} of {len(layers)} layers, so their factors are 1: lower least={self.least}, or "
            "use style='llr', which measures the first and the last matrix too"
        ]


def _matrix(layer: Layer) -> Tensor | None:
    """Return a layer's largest parameter if it has two or more dimensions."""
    largest = max(layer.parameters, key=Tensor.numel)
    return largest if largest.ndim > 1 and largest.numel() else None
