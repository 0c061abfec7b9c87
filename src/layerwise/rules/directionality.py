"""Sums of gradients over an epoch, the measures G and G′ of them, and the rules that choose layers by these."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._norms import absolute_sum
from .._tensors import as_dense_real, has_values, local, moved
from ..layers import Layer
from ..sharding import Buffers, number_count, sharing_of
from ..statistics import Gradients, Statistics
from .base import Rule, Selection
from .selection import LayerChoice, check_whole, of_kinds
from .state import State, is_state, loaded

logger = logging.getLogger("layerwise")


@dataclass(frozen=True)
class Sample:
    """The weights that stand for one parameter: number k · step mod n of its n weights, for k from 0.

    Args:
        count: How many weights are taken.
        step: Near n/φ (φ the golden ratio) and without a common divisor with n: no weight twice, none of the channels
            or positions in a kernel left out.
    """

    count: int
    step: int

    def of(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """Return the gradient of these weights, which are numbered in the order of the parameter's memory."""
        order = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
        order += range(parameter.ndim, gradient.ndim)  # real and imaginary parts
        # The positions are computed anew: kept, they would take as much memory as the sums.
        positions = torch.arange(self.count, device=gradient.device).mul_(self.step).remainder_(gradient.numel())
        return gradient.permute(order).reshape(-1).index_select(0, positions)


def samples_of(layer: Sequence[Tensor], most: int | None) -> list[Sample | None]:
    """Return for each parameter of a layer, which is whole, the weights that stand for it; None for all."""
    total = sum(map(number_count, layer))
    if most is None or total <= most:
        return [None] * len(layer)
    samples: list[Sample | None] = []
    for numbers in map(number_count, layer):
        step = max(1, round(numbers * (math.sqrt(5) - 1) / 2))
        while math.gcd(step, numbers) > 1:
            step += 1
        samples.append(Sample(min(numbers, max(1, round(most * numbers / total))), step))
    return samples


# --- Sums ------------------------------------------------------------------------------------------------------------

Sums = State
"""Empty, or `signed`, `absolute`, `received`: tensors by parameter, for a checkpoint to hold; and `iterations`."""

PARTS = ("signed", "absolute", "received")
LARGEST = 2.0**100
"""Σ|g| of a step that counts is below this, so that 2²⁸ steps add up to what float32 can hold."""


class DirectionalitySums:
    """Accumulates Σ_j g_ij and Σ_j |g_ij| over the steps that count.

    G needs one buffer a parameter (Σ_j g_ij) and one number a parameter tensor (Σ_ij |g_ij|), G′ two buffers. They are
    float32, or float64 for float64 gradients, and exist from the first step that is added until they are dropped.

    Steps with a gradient that is not finite or beyond any training (Σ|g| of 2¹⁰⁰ ≈ 1e30), steps that a gradient scaler
    skips and steps whose gradients are all zero do not count.

    The buffers of sharded parameters are sharded too. A step and the end of an epoch take one collective each.

    Args:
        layers: The layers.
        each_weight: Whether Σ_j |g_ij| is kept for each weight (G′) or summed at once (G).
        sample: Number of weights of each layer that stand for it; None for all.
        measured: Which layers are summed; None for all. The others still decide whether a step counts.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        each_weight: bool,
        sample: int | None = None,
        measured: Sequence[bool] | None = None,
    ) -> None:
        self.each_weight = each_weight
        self._sizes = [len(layer.parameters) for layer in layers]
        self._parameters = [p for layer in layers for p in layer.parameters]
        # Entries that begin with an underscore are not saved, and a parameter's name may begin with one.
        self._keys = [
            f"/{name}"
            for layer in layers
            for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
        ]
        self._shards = [shard for layer in layers for shard in layer.shards]
        self._sharing = sharing_of(self._shards)
        if sample is not None and self._sharing is not None:
            raise ValueError(
                f"sample={sample!r}: the parameters are sharded, and which weights stand for a layer depends on the "
                "number of processes; leave sample out, the sums are sharded too"
            )
        whole = [p for layer in layers for p in layer.whole()]
        self._samples = [one for layer in layers for one in samples_of(layer.whole(), sample)]
        counts = [None if one is None else one.count for one in self._samples]
        self._counts = [number_count(p) if n is None else n for p, n in zip(whole, counts, strict=True)]
        self._buffers = Buffers(self._parameters, self._shards, counts)
        inside = [True] * len(layers) if measured is None else measured
        self._measured = [flag for size, flag in zip(self._sizes, inside, strict=True) for _ in range(size)]

    @torch.no_grad()
    def add(self, sums: Sums, gradients: Gradients) -> Sums:
        """Return the sums, empty before the first step, with one step more; the buffers are changed in place."""
        held = {i: _dense(g) for i, g in enumerate(gradients.tensors) if g is not None}
        if not held and self._sharing is None:
            return sums
        totals, holders = self._totals(held)
        size, scale = torch.stack(totals).sum(), gradients.scale
        if size.device.type == "cpu" and gradients.skipped is None:
            if not 0 < size.item() < LARGEST:
                return sums
            counts, inverse = None, 1.0 if scale is None else 1 / float(scale)
        else:
            counts, inverse = (size > 0) & (size < LARGEST), 1.0 if scale is None else scale.double().reciprocal()
            if gradients.skipped is not None:
                counts &= moved(gradients.skipped, size.device) == 0
        if not sums:
            sums = {**{part: {} for part in PARTS}, "iterations": size.new_zeros((), dtype=torch.int64)}
        # In place, as all of the sums, so that a replay of a CUDA graph goes on from it.
        iterations = sums["iterations"] = moved(sums["iterations"], size.device)
        iterations += 1 if counts is None else counts
        for i, parameter in enumerate(self._parameters):
            gradient, sample, key = held.get(i), self._samples[i], self._keys[i]
            # A process without a gradient of a sharded parameter adds the others' sums: all have to choose alike.
            elsewhere = gradient is None and self._shards[i] is not None and parameter.requires_grad
            if not self._measured[i] or (gradient is None and not elsewhere):
                continue
            if gradient is not None and sample is not None:
                gradient = sample.of(gradient, parameter)
            like = as_dense_real(local(parameter.detach())) if gradient is None else gradient
            self._open(sums, i, like)
            arrived: Any = True if holders is None else holders[i] > 0
            arrived = bool(arrived) if counts is None else moved(counts, like.device) & arrived
            sums["received"][key] |= arrived
            if gradient is not None:
                _accumulate(sums["signed"][key], gradient, inverse, counts)
            if not self.each_weight:
                total = totals[i] if sample is None else absolute_sum(like)
                _accumulate(sums["absolute"][key], total, inverse, counts)
            elif gradient is not None:
                _accumulate(sums["absolute"][key], gradient.abs(), inverse, counts)
        return sums

    def _totals(self, held: Mapping[int, Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return Σ|g| of each parameter over all processes, and of sharded ones how many processes have a gradient."""
        device = next(iter(held.values())).device if held else local(self._parameters[0]).device
        own = dict(zip(held, map(absolute_sum, held.values()), strict=True))
        zero = torch.zeros((), device=device)
        totals = [moved(own.get(i, zero), device) for i in range(len(self._parameters))]
        if self._sharing is None:
            return totals, None
        holds = [float(i in held and held[i].numel() > 0) for i in range(len(self._parameters))]
        shares = [torch.stack(totals).double(), torch.tensor(holds, dtype=torch.float64, device=device)]
        sums, holders = self._sharing.sum(torch.stack(shares))
        return list(sums), list(holders)

    def ratios(self, sums: Sums) -> tuple[list[float], list[bool]]:
        """Return G or G′ of each layer, and which layers received a gradient. Waits for the device."""
        parts = [self._part(sums, key) for key in self._keys]
        if self._sharing is not None:
            device = local(self._parameters[0]).device
            shares: Any = self._sharing.sum(torch.tensor(parts, dtype=torch.float64, device=device).T.contiguous())
            parts = shares.T.tolist()
        # Below the fraction bar stand numbers of whole parameters, which every process knows.
        below = list(map(float, self._counts))
        if not self.each_weight:
            below = [float(sums["absolute"].get(key, 0.0)) if sums else 0.0 for key in self._keys]
        ratios: list[float] = []
        received: list[bool] = []
        end = 0
        for size in self._sizes:
            begin, end = end, end + size
            bar = sum(below[begin:end])
            ratios.append(min(sum(above for above, _ in parts[begin:end]) / bar, 1.0) if bar > 0 else 0.0)
            received.append(any(flag > 0 for _, flag in parts[begin:end]))
        return ratios, received

    def _part(self, sums: Sums, key: str) -> tuple[float, float]:
        """Return what this process's part of a parameter adds above the fraction bar, and 1 if it has a gradient."""
        if not sums or key not in sums["signed"]:
            return 0.0, 0.0
        signed = local(sums["signed"][key]).double().abs()
        if self.each_weight:
            absolute = local(sums["absolute"][key]).double()
            signed = torch.where(absolute > 0, signed / absolute, 0.0)
        return float(signed.sum()), float(sums["received"][key])

    def _open(self, sums: Sums, i: int, like: Tensor) -> None:
        """Make a parameter's buffers, or bring those of a file, or of a model that was moved, to its device."""
        key = self._keys[i]
        signed = sums["signed"].get(key)
        if signed is None or local(signed).shape != like.shape:
            sums["signed"][key] = self._buffers.zeros(i, like)
            sums["received"][key] = False
            total = torch.zeros((), dtype=torch.float64, device=like.device)
            sums["absolute"][key] = self._buffers.zeros(i, like) if self.each_weight else total
        elif signed.device != like.device:
            for part in PARTS:
                if isinstance(buffer := sums[part][key], Tensor):
                    sums[part][key] = moved(buffer, like.device)

    def loaded(self, sums: Any) -> Sums:
        """Return a copy of saved sums, sharded as the parameters are now; raise a ValueError if they are others."""
        if sums == {}:
            return {}
        # A distributed checkpoint leaves out what is empty.
        empty: Sums = {part: {} for part in PARTS}
        sums = {**empty, **sums} if is_state(sums) else {}
        if sums.keys() != {*PARTS, "iterations"} or not all(is_state(sums[part]) for part in PARTS):
            raise ValueError(f"the saved sums must hold {', '.join(PARTS)} by parameter, and iterations")
        if not isinstance(sums["iterations"], Tensor) or sums["iterations"].ndim:
            raise ValueError("the saved sums hold no number of iterations")
        result: Sums = {}
        for part in PARTS:
            if sums[part].keys() != sums["signed"].keys():
                raise ValueError(f"the saved sums are of different parameters in 'signed' and {part!r}")
            scalar = part == "received" or (part == "absolute" and not self.each_weight)
            result[part] = {key: self._loaded(key, buffer, scalar=scalar) for key, buffer in sums[part].items()}
        return {**result, "iterations": sums["iterations"].clone()}

    def _loaded(self, key: str, buffer: Any, *, scalar: bool) -> Any:
        if key not in self._keys:
            raise ValueError(f"the saved sums hold {key!r}, which is no parameter here; use the same model")
        if scalar and isinstance(buffer, bool):
            return buffer
        return self._buffers.loaded(self._keys.index(key), buffer, key, scalar=scalar)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient that can be added up: repeated entries of a sparse one summed, complex ones as pairs."""
    return as_dense_real(gradient if gradient.layout is torch.strided else gradient.to_dense())


def _accumulate(buffer: Tensor, value: Tensor, scale: float | Tensor, counts: Tensor | None) -> None:
    """Add `scale` times the value, or nothing where `counts` is false; the value need not be finite then."""
    buffer = local(buffer)
    if counts is None:
        buffer.add_(value, alpha=float(scale))
        return
    factor = moved(scale, buffer.device) if isinstance(scale, Tensor) else scale
    value = moved(value, buffer.device).to(buffer.dtype) * factor
    buffer.add_(torch.where(moved(counts, buffer.device), value, 0))


# --- Rules that measure over an epoch --------------------------------------------------------------------------------


class ChoosingRule(Rule):
    """A rule that gives the chosen layers one factor and all others 1, and chooses at the ends of epochs.

    The state holds the epoch, the last choice with what it was made from, and in an epoch of measuring the sums of
    gradients, whose buffers are changed in place. The factors are known without asking a device.
    """

    needs = ("gradients",)
    default_layers = "module"

    @property
    @abstractmethod
    def _choice(self) -> LayerChoice:
        """What is measured, and of which layers."""

    @abstractmethod
    def measured(self, epoch: int) -> bool:
        """Return whether gradients are measured in an epoch."""

    @abstractmethod
    def _factor(self, epoch: int) -> float:
        """Return the factor of the chosen layers in an epoch."""

    @abstractmethod
    def _chosen(self, state: State, live: Sequence[bool], values: Sequence[float], z: Sequence[float]) -> State:
        """Return the state with the choice that follows from the layers' scores and ẑ.

        `live` says which layers may be chosen and received a gradient. The scores of the others are NaN.
        """

    def _score(self, value: float) -> float:
        """Return the score of a layer with this G or G′."""
        return value

    def _entered(self, state: State) -> State:
        """Return the state at the beginning of its epoch; a rule may choose here without measuring."""
        return state

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the state at the beginning of epoch 1."""
        choice = self._choice
        of_kind = of_kinds(layers, choice.kinds)
        unknown = torch.full((len(layers),), math.nan, dtype=torch.float64, device="cpu")
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
                layers, each_weight=choice.measure == "G_prime", sample=choice.sample, measured=of_kind
            ),
        }
        return self.derived(self._entered(state))

    def derived(self, state: State) -> State:
        """Return the state with what follows from the rest: this epoch's factors, and whether it measures."""
        factor = torch.tensor(self._factor(state["epoch"]), dtype=torch.float64, device="cpu")
        measuring = self.measured(state["epoch"])
        sums: Sums = state["sums"] if measuring else {}
        return {
            **state,
            "sums": sums,
            "summing": bool(sums),
            "_factors": torch.where(state["selected"].cpu(), factor, 1.0),
            "_measuring": measuring,
        }

    def asks(self, state: State) -> bool:
        """Return whether this epoch is one of measuring."""
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
            _log(state, "from the start")
        if state["_measuring"]:
            ratios, received = state["_sums"].ratios(state["sums"])
            live = [x and y for x, y in zip(candidates_of(state), received, strict=True)]
            if not any(live):
                logger.warning("epoch %d: no step of it counted; was end_epoch() called twice?", state["epoch"])
            values = [self._score(one) if inside else math.nan for one, inside in zip(ratios, live, strict=True)]
            z = z_scores(values, live, self._choice.ddof)
            shown = [one if inside else math.nan for one, inside in zip(z, live, strict=True)]
            columns = torch.tensor([values, shown], dtype=torch.float64, device="cpu")
            state = self._chosen({**state, "sums": {}, "value": columns[0], "z": columns[1]}, live, values, z)
        return self.derived(self._entered({**state, "epoch": state["epoch"] + 1}))

    def load(self, saved: Any, state: State) -> State:
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


def with_choice(state: State, selected: Sequence[bool], why: str) -> State:
    """Return the state with a new choice, and log it."""
    chosen = torch.tensor(list(selected), dtype=torch.bool, device="cpu")
    state = {**state, "selected": chosen, "draw": state["draw"] + 1}
    if "_factors" in state:  # a choice made in init may not be the one that stays
        _log(state, why)
    return state


def _log(state: State, why: str) -> None:
    names = [layer.name or "(root)" for layer, x in zip(state["_layers"], state["selected"], strict=True) if x]
    if names:
        among = sum(candidates_of(state))
        logger.info("epoch %d: %d of %d layers chosen (%s): %s", state["epoch"], len(names), among, why, names)
    else:
        logger.warning("epoch %d: no layer is chosen (%s), so all keep factor 1", state["epoch"], why)


def candidates_of(state: State) -> list[bool]:
    """Return which layers may be chosen now: of the kinds, not excluded, and with a parameter to train."""
    trained = [layer.included and any(p.requires_grad for p in layer.parameters) for layer in state["_layers"]]
    return [x and y for x, y in zip(state["_of_kind"], trained, strict=True)]


def z_scores(values: Sequence[float], live: Sequence[bool], ddof: int = 0) -> list[float]:
    """Return ẑ_l = (v_l − mean) / σ over the live layers (equation 6 of the paper); 0 for the others, and where σ = 0.

    Example:
        >>> z_scores([1.0, 3.0, 9.0], [True, True, False])
        [-1.0, 1.0, 0.0]
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
