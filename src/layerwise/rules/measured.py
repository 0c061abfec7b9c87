"""What rules share that measure the directionality of gradients in some epochs and then choose layers."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers import Layer
from ..statistics import Statistics
from ..sums import DirectionalitySums, Sums
from ..tensors import has_values
from .base import Rule, State
from .selection import Measure, Selection, check_whole, of_kinds
from .state import is_state, loaded

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
        unknown = torch.full((len(layers),), math.nan, dtype=torch.float64, device="cpu")
        of_kind = of_kinds(layers, self._kinds())
        state: State = {
            "epoch": 1,
            "draw": 0,
            "sums": {},
            "summing": False,
            "value": unknown,
            "z": unknown.clone(),
            "selected": torch.zeros(len(layers), dtype=torch.bool, device="cpu"),
            "_layers": tuple(layers),
            "_of_kind": of_kind,
            "_sums": DirectionalitySums(
                layers, each_weight=measure == "G_prime", sample=sample, measured=None if all(of_kind) else of_kind
            ),
        }
        return self.derived(self._entered(state))

    def derived(self, state: State) -> State:
        """Return the state with what follows from the rest: this epoch's factors, and whether it measures."""
        factor = torch.tensor(self._factor(state["epoch"]), dtype=torch.float64, device="cpu")
        factors = torch.where(state["selected"].cpu(), factor, 1.0)
        measuring = self._measuring(state["epoch"])
        sums: Sums = state["sums"] if measuring else {}
        return {
            **state,
            "sums": sums,
            "summing": bool(sums),
            "_factors": factors,
            "_measuring": measuring,
        }

    def asks(self, state: State) -> bool:
        """Tell whether this epoch's steps need the statistics in `needs`."""
        return state["_measuring"]

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return this epoch's factors; add the gradients to the sums when it is one of measuring."""
        if state["_measuring"]:
            sums = state["_sums"].add(state["sums"], statistics.gradients)
            state = {**state, "sums": sums, "summing": bool(sums)}
        return state["_factors"], state

    def end_epoch(self, state: State) -> State:
        """Choose layers if this epoch was one of measuring, and begin the next. Waits for the device."""
        if state["epoch"] == 1 and state["draw"]:
            self._log(state, "from the start")
        if state["_measuring"]:
            values, received = state["_sums"].ratios(state["sums"])
            live = [x and y for x, y in zip(candidates_of(state), received, strict=True)]
            values = [self._score(value) if inside else math.nan for value, inside in zip(values, live, strict=True)]
            z = z_scores(values, live, self._ddof())
            shown = [one if inside else math.nan for one, inside in zip(z, live, strict=True)]
            state = {
                **state,
                "sums": {},
                "value": torch.tensor(values, dtype=torch.float64, device="cpu"),
                "z": torch.tensor(shown, dtype=torch.float64, device="cpu"),
            }
            if not any(live):
                logger.warning("epoch %d: no step of it counted; was end_epoch() called twice?", state["epoch"])
            state = self._chosen(state, live, values, z)
        return self.derived(self._entered({**state, "epoch": state["epoch"] + 1}))

    def load(self, saved: State, state: State) -> State:
        """Return the state with what was saved; the sums of an epoch of measuring may be there or not."""
        if not is_state(saved) or not is_state(saved.get("sums")):
            raise ValueError("state['sums'] is missing in the file; was it saved for the same rule?")
        rest = loaded({"summing": False, **saved, "sums": {}}, {**state, "sums": {}}, "state")
        if rest["summing"] and not saved["sums"]:
            raise ValueError(
                "the sums of an epoch of analysis that was saved half done are missing: load() of a checkpoint "
                "in torch.distributed reads only what is there already; call layerwise.load_checkpoint(adapter, folder)"
            )
        check_whole("epoch of the saved state", rest["epoch"], 1)
        check_whole("draw of the saved state", rest["draw"], 0)
        return self.derived({**rest, "sums": state["_sums"].loaded(saved["sums"])})

    def get_selection(self, state: State) -> list[Selection]:
        """Return the last choice, a layer each."""
        if not has_values(state["value"]):
            return [Selection(math.nan, math.nan, False)] * len(state["value"])
        columns = (state[name].tolist() for name in ("value", "z", "selected"))
        return [Selection(*row) for row in zip(*columns, strict=True)]

    def _select(self, state: State, selected: Sequence[bool], why: str) -> State:
        """Return the state with a new choice, and log it."""
        chosen = torch.tensor(list(selected), dtype=torch.bool, device="cpu")
        state = {**state, "selected": chosen, "draw": state["draw"] + 1}
        if "_factors" in state:  # a choice made in init may not be the one that stays
            self._log(state, why)
        return state

    def _log(self, state: State, why: str) -> None:
        names = [layer.name or "(root)" for layer, x in zip(state["_layers"], state["selected"], strict=True) if x]
        if names:
            among = sum(candidates_of(state))
            logger.info("epoch %d: %d of %d layers chosen (%s): %s", state["epoch"], len(names), among, why, names)
        else:
            logger.warning("epoch %d: no layer is chosen (%s), so all keep factor 1", state["epoch"], why)

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


def candidates_of(state: State) -> list[bool]:
    """Tell which layers may be chosen now: of the kinds, not excluded, and with a parameter to train."""
    trained = [layer.included and any(p.requires_grad for p in layer.parameters) for layer in state["_layers"]]
    return [x and y for x, y in zip(state["_of_kind"], trained, strict=True)]


def z_scores(values: Sequence[float], live: Sequence[bool], ddof: int = 0) -> list[float]:
    """Return how many standard deviations each layer's value lies from the mean of the live layers.

    ẑ_l = (v_l − mean) / σ, and 0 where σ = 0, where fewer than two layers are live, and for layers that are not

    Args:
        values: One a layer.
        live: Which layers count.
        ddof: 0 for the population's σ, 1 for the sample's.

    Example:
        >>> z_scores([1.0, 3.0, 9.0], [True, True, False])
        [-1.0, 1.0, 0.0]

    Reference:
        Basodi, Pusuluri, Xiao, Pan 2023, arXiv 2305.18445, equation 6.
    """
    counted = [value for value, inside in zip(values, live, strict=True) if inside]
    if len(counted) < 2:
        return [0.0] * len(values)
    mean = math.fsum(counted) / len(counted)
    sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in counted) / (len(counted) - ddof))
    # Equal values leave rounding dust of float32, which is no spread.
    if sigma <= 1e-6 * max(map(abs, counted)):
        return [0.0] * len(values)
    return [(value - mean) / sigma if inside else 0.0 for value, inside in zip(values, live, strict=True)]
