"""The update rules of Caffe's solvers and of torch's optimizers, with a factor for each layer.

All of them step a list of arrays in place, `weights`; `layer_of` gives the number of each array's layer. In
Caffe the local rate, `rate · lr_mult · f_l`, is inside the history; in torch the rate is outside. Weight
decay is added to the gradient before everything else: d = g + λ · decay_mult · w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

Arrays = Sequence[np.ndarray]


class _Caffe(ABC):
    """What Caffe's solvers have in common.

    Args:
        weights: The blobs; they are stepped in place.
        layer_of: The number of each blob's layer.
        momentum: μ.
        weight_decay: λ.
        rate_multipliers: lr_mult of each blob, 1 if not given.
        decay_multipliers: decay_mult of each blob, 1 if not given.
    """

    def __init__(
        self,
        weights: Arrays,
        layer_of: Sequence[int],
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rate_multipliers: Sequence[float] | None = None,
        decay_multipliers: Sequence[float] | None = None,
    ) -> None:
        self.weights, self.layer_of = list(weights), list(layer_of)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.rate_multipliers = list(rate_multipliers or [1.0] * len(self.weights))
        self.decay_multipliers = list(decay_multipliers or [1.0] * len(self.weights))
        self.history = [np.zeros_like(w) for w in self.weights]

    def step(self, gradients: Arrays, rate: float, factors: Sequence[float]) -> None:
        """Take a step.

        Args:
            gradients: The gradient of each blob, without decay.
            rate: The global rate t(k).
            factors: The factor of each layer.
        """
        for i, w in enumerate(self.weights):
            d = gradients[i] + self.weight_decay * self.decay_multipliers[i] * w
            local = rate * self.rate_multipliers[i] * factors[self.layer_of[i]]
            w -= self.update(i, d, local)

    @abstractmethod
    def update(self, i: int, d: np.ndarray, local: float) -> np.ndarray:
        """Return what is taken off blob i, and renew its history."""


class CaffeSGD(_Caffe):
    """h ← μ h + local d; w ← w − h."""

    def update(self, i: int, d: np.ndarray, local: float) -> np.ndarray:
        """Return h."""
        self.history[i] = self.momentum * self.history[i] + local * d
        return self.history[i]


class CaffeNesterov(_Caffe):
    """h₀ = h; h ← μ h₀ + local d; w ← w − ((1 + μ) h − μ h₀)."""

    def update(self, i: int, d: np.ndarray, local: float) -> np.ndarray:
        """Return (1 + μ) h − μ h₀."""
        before = self.history[i]
        self.history[i] = self.momentum * before + local * d
        return (1 + self.momentum) * self.history[i] - self.momentum * before


class CaffeAdaGrad(_Caffe):
    """h ← h + d²; w ← w − local d / (√h + δ), element by element; equation 12 of Singh et al. 2015.

    The factor is in the local rate, so it does not enter h. δ stands outside the root.
    """

    delta = 1e-8

    def update(self, i: int, d: np.ndarray, local: float) -> np.ndarray:
        """Return local d / (√h + δ)."""
        if self.momentum != 0:
            raise ValueError(f"momentum={self.momentum!r}: Caffe's AdaGrad takes none, it must be 0")
        self.history[i] = self.history[i] + d * d
        return local * d / (np.sqrt(self.history[i]) + self.delta)


class TorchSGD:
    """v ← μ v + d; w ← w − t v, or with Nesterov w ← w − t (d + μ v), the new v; d = g + λ w.

    The factor acts on the gradient, d = f (g + λ w) (`decay="scaled"`) or d = f g + λ w (`decay="plain"`), or
    on the rate, w ← w − t f v.

    Args:
        weights: The arrays; they are stepped in place.
        layer_of: The number of each array's layer.
        momentum: μ.
        weight_decay: λ.
        nesterov: Whether the step is Nesterov's.
        place: `"gradient"` or `"lr"`.
        decay: `"scaled"` or `"plain"`, for `"gradient"`.
    """

    def __init__(
        self,
        weights: Arrays,
        layer_of: Sequence[int],
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        place: Literal["gradient", "lr"] = "gradient",
        decay: Literal["scaled", "plain"] = "scaled",
    ) -> None:
        self.weights, self.layer_of = list(weights), list(layer_of)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.place, self.decay = place, decay
        self.velocity = [np.zeros_like(w) for w in self.weights]

    def step(self, gradients: Arrays, rate: float, factors: Sequence[float]) -> None:
        """Take a step with these gradients, this rate and these factors of the layers."""
        for i, w in enumerate(self.weights):
            f = factors[self.layer_of[i]]
            if self.place == "lr":
                d, local = gradients[i] + self.weight_decay * w, rate * f
            elif self.decay == "scaled":
                d, local = f * (gradients[i] + self.weight_decay * w), rate
            else:
                d, local = f * gradients[i] + self.weight_decay * w, rate
            self.velocity[i] = self.momentum * self.velocity[i] + d
            w -= local * (d + self.momentum * self.velocity[i] if self.nesterov else self.velocity[i])


class Adam:
    """m ← β₁ m + (1 − β₁) d; v ← β₂ v + (1 − β₂) d²; w ← w − t f m̂ / (√v̂ + ε); the factor is on the rate.

    m̂ = m / (1 − β₁^k), v̂ = v / (1 − β₂^k), k from 1. Coupled, d = g + λ w; decoupled (AdamW), d = g and
    first w ← w − t f λ w, so that the factor scales the decay too.

    Args:
        weights: The arrays; they are stepped in place.
        layer_of: The number of each array's layer.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        decoupled: Whether the decay is AdamW's.
    """

    def __init__(
        self,
        weights: Arrays,
        layer_of: Sequence[int],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        self.weights, self.layer_of = list(weights), list(layer_of)
        self.betas, self.eps, self.weight_decay, self.decoupled = betas, eps, weight_decay, decoupled
        self.first = [np.zeros_like(w) for w in self.weights]
        self.second = [np.zeros_like(w) for w in self.weights]
        self.steps = 0

    def step(self, gradients: Arrays, rate: float, factors: Sequence[float]) -> None:
        """Take a step with these gradients, this rate and these factors of the layers."""
        self.steps += 1
        beta1, beta2 = self.betas
        for i, w in enumerate(self.weights):
            local = rate * factors[self.layer_of[i]]
            d = gradients[i]
            if self.decoupled:
                w -= local * self.weight_decay * w
            else:
                d = d + self.weight_decay * w
            self.first[i] = beta1 * self.first[i] + (1 - beta1) * d
            self.second[i] = beta2 * self.second[i] + (1 - beta2) * d * d
            mean = self.first[i] / (1 - beta1**self.steps)
            variance = self.second[i] / (1 - beta2**self.steps)
            w -= local * mean / (np.sqrt(variance) + self.eps)
