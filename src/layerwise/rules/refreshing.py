"""Factors that are renewed every few steps, and hold, move or are averaged in between."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule
from .state import State


class RefreshingRule(Rule):
    """A rule that makes new factors every few steps.

    `every`, `ramp` and `smooth` are those of `refresh`. A layer for which an answer is not finite keeps what it has.
    One that has none yet, because its gradient was missing or the step was skipped, is asked for again at steps 2, 3,
    5, 9, … of the first period, and then with the others.
    """

    every: int
    ramp: int = 0
    smooth: float = 0.0

    @property
    def measures_early(self) -> bool:
        """Return True: a layer without a gradient in the first period waits for the next one."""
        return True

    @abstractmethod
    def answer(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return new factors, not finite for a layer without an answer, and the state."""

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return factors of 1, and averages before the first answer.

        `unanswered` is βᵏ, k the number of a layer's answers: 1 for a layer without any.
        """
        device, dtype = common_device(layers)
        ones = torch.ones(len(layers), dtype=dtype, device=device)
        names = ("unanswered", "start", "target", "factors")
        return {"average": torch.zeros_like(ones), **{name: ones.clone() for name in names}, "step": 0}

    def asks(self, state: State) -> bool:
        """Return whether this step is measured."""
        step = state["step"]
        return step % self.every == 0 or (step < self.every and step & (step - 1) == 0)  # the powers of two

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors, which are renewed every few steps."""
        since = state["step"] % self.every
        new: State = {**state, "step": state["step"] + 1}
        if self.asks(state):
            answer, state = self.answer(statistics, state)
            unanswered = state["unanswered"]
            first = unanswered == 1
            taken = torch.isfinite(answer)
            if since:
                taken = taken & first
            average = self.smooth * state["average"] + (1 - self.smooth) * answer
            average = torch.where(taken, average, state["average"])
            left = torch.where(taken, unanswered * self.smooth, unanswered)
            target = torch.where(left < 1, average / (1 - left), 1.0)
            start = state["start"] if since else state["factors"]
            # The first factors have none before them from which they could come.
            start = torch.where(first, target, start)
            new = {
                **state,
                "step": new["step"],
                "average": average,
                "unanswered": left,
                "target": target,
                "start": start,
            }
        elif since > self.ramp:
            return state["factors"], new
        new["factors"] = torch.lerp(new["start"], new["target"], min(1.0, (since + 1) / (self.ramp + 1)))
        return new["factors"], new
