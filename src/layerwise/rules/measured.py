"""What rules share that measure the directionality of gradients in some epochs and then choose layers."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import Layer
from ..state import loaded
from ..statistics import Statistics
from ..sums import DirectionalitySums, z_scores
from .base import Rule, State
from .selection import Measure, Selection, candidates_of

logger = logging.getLogger("layerwise")


class ChoosingRule(Rule):
    """A rule that gives the chosen layers one factor and all others 1, and chooses at the ends of epochs.

    The state holds the epoch, the last choice with what it was made from, and in an epoch of measuring the sums of
    gradients, whose buffers are changed in place. The factors are known without asking a device.
    """

    needs = ("gradients",)
    default_layers = "module"

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the state at the beginning of epoch 1."""
        measure, sample = self._measures()
        unknown = torch.full((len(layers),), math.nan, dtype=torch.float64)
        state = {
            "epoch": 1,
            "draw": 0,
            "sums": {},
            "value": unknown,
            "z": unknown.clone(),
            "selected": torch.zeros(len(layers), dtype=torch.bool),
            "_names": [layer.name for layer in layers],
            "_candidates": candidates_of(layers, self._kinds()),
            "_sums": DirectionalitySums(layers, each_weight=measure == "G_prime", sample=sample),
        }
        return self._derived(self._entered(state))

    def asks(self, state: State) -> bool:
        """Tell whether this epoch's steps need the statistics in `needs`."""
        return state["_measuring"]

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return this epoch's factors; add the gradients to the sums when it is one of measuring."""
        if state["_measuring"]:
            state = {**state, "sums": state["_sums"].add(state["sums"], statistics.gradients)}
        return state["_factors"], state

    def end_epoch(self, state: State) -> State:
        """Choose layers if this epoch was one of measuring, and begin the next. Waits for the device."""
        if state["_measuring"]:
            values, received = state["_sums"].ratios(state["sums"])
            live = [x and y for x, y in zip(state["_candidates"], received, strict=True)]
            values = [self._score(value) if inside else math.nan for value, inside in zip(values, live, strict=True)]
            z = z_scores(values, live, self._ddof())
            state = {
                **state,
                "sums": {},
                "value": torch.tensor(values, dtype=torch.float64),
                "z": torch.tensor([x if y else math.nan for x, y in zip(z, live, strict=True)], dtype=torch.float64),
            }
            state = self._chosen(state, live, values, z)
        return self._derived(self._entered({**state, "epoch": state["epoch"] + 1}))

    def load(self, saved: State, state: State) -> State:
        """Return the state with what was saved; the sums of an epoch of measuring may be there or not."""
        sums = saved.get("sums") if isinstance(saved, dict) else None
        if not isinstance(sums, dict):
            raise ValueError("state['sums'] is missing in the file; was it saved of the same rule?")
        rest = loaded({**saved, "sums": {}}, {**state, "sums": {}}, "state")
        return self._derived({**rest, "sums": state["_sums"].loaded(sums)})

    def get_selection(self, state: State) -> list[Selection]:
        """Return the last choice, a layer each."""
        columns = (state[name].tolist() for name in ("value", "z", "selected"))
        return [Selection(*row) for row in zip(*columns, strict=True)]

    def _derived(self, state: State) -> State:
        """Fill in what follows from the rest: this epoch's factors, and whether it measures."""
        factor = self._factor(state["epoch"])
        factors = torch.where(state["selected"], factor, 1.0).to(torch.float64)
        return {**state, "_factors": factors, "_measuring": self._measuring(state["epoch"])}

    def _select(self, state: State, selected: Sequence[bool], why: str) -> State:
        """Return the state with a new choice, and log it."""
        names = [name or "(root)" for name, chosen in zip(state["_names"], selected, strict=True) if chosen]
        if names:
            among = sum(state["_candidates"])
            logger.info("epoch %d: %d of %d layers chosen (%s): %s", state["epoch"], len(names), among, why, names)
        else:
            logger.warning("epoch %d: no layer is chosen (%s), so all keep factor 1", state["epoch"], why)
        return {**state, "selected": torch.tensor(list(selected), dtype=torch.bool), "draw": state["draw"] + 1}

    def _entered(self, state: State) -> State:
        """Return the state at the beginning of its epoch; a place to choose without measuring."""
        return state

    def _score(self, value: float) -> float:
        return value

    def _ddof(self) -> int:
        return 0

    @abstractmethod
    def _measures(self) -> tuple[Measure | None, int | None]:
        """Return what is measured, on how many weights a layer."""

    @abstractmethod
    def _kinds(self) -> Sequence[str] | None:
        """Return the kinds of layers that may be chosen."""

    @abstractmethod
    def _measuring(self, epoch: int) -> bool:
        """Tell whether an epoch is one of measuring."""

    @abstractmethod
    def _factor(self, epoch: int) -> float:
        """Return the factor of the chosen layers in an epoch."""

    @abstractmethod
    def _chosen(self, state: State, live: Sequence[bool], values: Sequence[float], z: Sequence[float]) -> State:
        """Return the state with the choice that follows from what was measured."""
