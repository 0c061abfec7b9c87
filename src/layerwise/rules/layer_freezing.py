"""Freezing by gradient fluctuation: layers whose gradients only fluctuate stand still for some epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .base import is_number
from .directionality import ChoosingRule, with_choice
from .selection import Directionality, Kind, Measure, check_whole
from .state import State

logger = logging.getLogger("layerwise")


@dataclass(frozen=True)
class LayerFreezing(ChoosingRule):
    """Freezing of layers by the fluctuation of their gradients.

    F_l = 1 − G_l over an epoch of measuring; f_l = 0 where F_l > threshold, else 1, until the next one

    Start: `LayerwiseLR(optimizer, LayerFreezing(0.9), model)`. Keep the optimizer's own rate, and call
    `adapter.end_epoch()` after every epoch. Take 1 − 1/√m as the threshold for m steps an epoch: 0.87 for 63, 0.95 for
    400.

    G_l is that of `Directionality`, so F_l is 0 for gradients that keep their direction and about 1 − 1/√m for noise
    over m steps. Frozen layers are measured too, and thaw when their gradients find a direction again. The logger
    `layerwise` warns when every layer is frozen. This rule is ours: it decides by fluctuations as Xiao et al. 2019 do,
    whose formula is not public.

    Args:
        threshold: On F_l, from 0 to 1.
        start: The first epoch of measuring.
        every: Epochs from one measuring to the next.
        measure: `"G"` or `"G_prime"`.
        kinds: Kinds of layers that may be frozen, as for `AllLayers`; None for all.
        sample: As for `Directionality`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> rule = LayerFreezing(0.9, start=2, every=3)
        >>> [epoch for epoch in range(1, 10) if rule.measured(epoch)]
        [2, 5, 8]
    """

    threshold: float
    start: int = 1
    every: int = 5
    measure: Measure = "G"
    kinds: Sequence[Kind] | None = None
    sample: int | None = None
    default_place = "lr"

    def __post_init__(self) -> None:
        if not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise ValueError(f"threshold={self.threshold!r} must be from 0 to 1, such as 0.95; 1 freezes nothing")
        check_whole("start", self.start, 1)
        check_whole("every", self.every, 1)
        _ = self._choice  # checks the other arguments

    @property
    def _choice(self) -> Directionality:
        return Directionality(self.measure, kinds=self.kinds, sample=self.sample)

    def measured(self, epoch: int) -> bool:
        """Return whether gradients are measured in an epoch."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def _factor(self, epoch: int) -> float:
        return 0.0

    def _score(self, value: float) -> float:
        return 1 - value

    def _chosen(self, state: State, live: Sequence[bool], values: Sequence[float], z: Sequence[float]) -> State:
        frozen = [inside and value > self.threshold for value, inside in zip(values, live, strict=True)]
        scores = [value for value in values if not math.isnan(value)]
        if scores and all(value > self.threshold for value in scores):
            logger.warning(
                "epoch %d: all %d layers are frozen, with scores from %.3f to %.3f above threshold=%g; noise alone "
                "scores about 1 - 1/sqrt(steps an epoch), such as 0.87 for 63 steps: raise the threshold",
                *(state["epoch"], len(scores), min(scores), max(scores), self.threshold),
            )
        largest = max(scores, default=0.0)
        return with_choice(state, frozen, f"frozen above {self.threshold:g}, largest score {largest:.3f}")
