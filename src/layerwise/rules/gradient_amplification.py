"""Basodi et al. 2020 and 2023: the gradients of some layers are doubled in some epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .._arguments import has_type
from ..layers import Layer
from .base import is_number
from .directionality import ChoosingRule, candidates_of, with_choice
from .selection import AllLayers, LayerChoice, check_flag, check_whole
from .state import State

logger = logging.getLogger("layerwise")


@dataclass(frozen=True)
class Phase:
    """Epochs up to and with `until`, and whether layers are amplified in them.

    Args:
        until: The last epoch; the first epoch of all is 1.
        amplify: Whether the chosen layers are amplified.
        factor: By how much, above 0.

    Raises:
        TypeError: `amplify` is no bool.
        ValueError: `until` or `factor` is out of its range.
    """

    until: int
    amplify: bool
    factor: float = 2.0

    def __post_init__(self) -> None:
        check_whole("until", self.until, 1)
        check_flag("amplify", self.amplify)
        if not (is_number(self.factor) and 0 < self.factor < math.inf):
            raise ValueError(f"factor={self.factor!r} must be a finite number above 0; the paper's is 2")


PARAMS_1 = (Phase(50, False), Phase(100, True), Phase(130, True), Phase(150, False))
"""The paper's phases for VGG-19, ResNet-18 and ResNet-34, at rate 0.1 up to epoch 100 and 0.01 from 101 on."""

PARAMS_2 = (Phase(10, False), Phase(100, True), Phase(145, True), Phase(150, False))
"""The paper's phases for ResNet-50 and ResNet-101, at the same rates."""


@dataclass(frozen=True)
class GradientAmplification(ChoosingRule):
    """Gradient amplification: the gradients of chosen layers times a factor, in some epochs.

    g_l ← f g_l for the chosen layers in the epochs of an amplified phase, else g_l: equal to the rate f · lr for this
    gradient alone. SGD's weight decay is not amplified (AdamW's is, which goes with the rate); momentum is neither
    reset nor scaled when amplification begins or ends.

    Start: `LayerwiseLR(optimizer, GradientAmplification(Directionality("G", threshold=1.5)), model)` with `optimizer =
    SGD(model.parameters(), lr=0.1, momentum=0.9)`. Call `adapter.end_epoch()` after every epoch. The paper's rate is
    0.1, and 0.01 from epoch 101 of 150; its momentum is not known.

    With `Directionality` the first epoch of each amplified phase is one of analysis: gradients are summed, nothing is
    amplified, and the layers are chosen at its end. With `reselect=N` the choice is renewed at epochs N, 2N … later,
    from what the epoch before each showed. `adapter.get_last_selection()` has value, ẑ and choice. Where no layer
    passes the threshold none is amplified, and the log says so.

    The sums take one float32 number a parameter for G and two for G′ while an epoch of analysis lasts.

    Args:
        selection: `Directionality(…)`, `RandomLayers(ratio)`, `AllLayers()` or `ShuffledLayers(Directionality(…))`.
        phases: `Phase(until, amplify, factor)` one after another; plain after the last. `PARAMS_1` and `PARAMS_2` are
            the paper's, which go with 150 epochs.

    Raises:
        TypeError: `selection` or a phase is of another type.
        ValueError: The phases do not increase, or (when attached) no layer is of one of the kinds.

    Example:
        >>> from layerwise.rules import AllLayers
        >>> rule = GradientAmplification(AllLayers(), [Phase(1, False), Phase(3, True)])
        >>> [rule.amplified(epoch) for epoch in (1, 2, 3, 4)]  # 2 is the epoch of analysis
        [False, False, True, False]

    Reference:
        Basodi, Ji, Zhang, Pan 2020, Big Data Mining and Analytics 3(3); Basodi, Pusuluri, Xiao, Pan 2023, arXiv
        2305.18445, equations 2 and 3, section 4.
    """

    selection: LayerChoice
    phases: Sequence[Phase] = PARAMS_1
    default_place = "gradient"
    default_decay = "plain"

    def __post_init__(self) -> None:
        if not has_type(self.selection, LayerChoice):
            raise TypeError(
                f"selection={self.selection!r} must be Directionality(...), RandomLayers(ratio), AllLayers() or "
                "ShuffledLayers(Directionality(...))"
            )
        right = has_type(self.phases, Sequence) and all(has_type(phase, Phase) for phase in self.phases)
        if not right or not self.phases:
            raise TypeError(f"phases={self.phases!r} must be Phase(until, amplify, factor), at least one; try PARAMS_1")
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "own_layer", self.selection.measure is None)
        object.__setattr__(self, "compares_layers", not isinstance(self.selection, AllLayers))
        ends = [phase.until for phase in self.phases]
        if any(later <= earlier for earlier, later in pairwise(ends)):
            raise ValueError(f"phases end at epochs {ends}; each must end after the one before it")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the state at the beginning of epoch 1; warn of what can never amplify a layer."""
        state = super().init(layers, device)
        if not any(self.amplified(epoch) for epoch in range(1, self.phases[-1].until + 1)):
            logger.warning("no epoch of these phases is amplified: %s", list(self.phases))
        threshold, count = getattr(self.selection, "threshold", 0.0), sum(candidates_of(state))
        if count and threshold >= math.sqrt(max(count - 1, 1)):
            limit = math.sqrt(count - 1)
            logger.warning("threshold=%g chooses nothing: z of %d layers is at most %.2f", threshold, count, limit)
        return state

    def _phase(self, epoch: int) -> tuple[Phase, int]:
        """Return the phase of an epoch and the phase's first epoch; after the last phase a plain one."""
        first = 1
        for phase in self.phases:
            if epoch <= phase.until:
                return phase, first
            first = phase.until + 1
        return Phase(epoch, amplify=False), first

    def amplified(self, epoch: int) -> bool:
        """Return whether the chosen layers are amplified in an epoch."""
        phase, first = self._phase(epoch)
        return phase.amplify and not (self.selection.after_analysis and epoch == first)

    def measured(self, epoch: int) -> bool:
        """Return whether gradients are measured in an epoch."""
        phase, first = self._phase(epoch)
        every = self.selection.reselect
        renewed = every is not None and (epoch + 1 - first) % every == 0 and epoch < phase.until
        return self.selection.measure is not None and phase.amplify and (epoch == first or renewed)

    analysed = measured  # the paper's word

    @property
    def _choice(self) -> LayerChoice:
        return self.selection

    def _factor(self, epoch: int) -> float:
        return self._phase(epoch)[0].factor if self.amplified(epoch) else 1.0

    def _entered(self, state: State) -> State:
        phase, first = self._phase(state["epoch"])
        draws = state["epoch"] == first or self.selection.redraw == "epoch"
        if self.selection.measure is not None or not phase.amplify or not draws:
            return state
        selected = self.selection.choose(candidates_of(state), [], state["draw"])
        return with_choice(state, selected, type(self.selection).__name__)

    def _chosen(self, state: State, live: Sequence[bool], values: Sequence[float], z: Sequence[float]) -> State:
        why = f"{self.selection!r}, largest z {max(z):.2f}" if z else repr(self.selection)
        return with_choice(state, self.selection.choose(live, z, state["draw"]), why)
