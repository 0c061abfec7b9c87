"""Sums of gradients over an epoch, and the directionality ratios G and G′ of layers."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._arguments import has_type
from .._norms import absolute_sums
from .._tensors import as_dense_real, has_values, local, moved
from ..layers import Layer
from ..sharding import Buffers, Sharing, number_count, sharing_of
from ..statistics import Gradients, Statistics
from .base import Rule, Selection
from .selection import Measure, check_whole, of_kinds
from .state import State, is_state, loaded


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
        """Return the gradient of these weights; the positions are those in the parameter's memory."""
        if gradient.shape == parameter.shape and gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        # The positions are computed anew: kept, they would take as much memory as the sums.
        positions = torch.arange(self.count, device=gradient.device).mul_(self.step).remainder_(gradient.numel())
        dense = gradient if _fills_its_memory(gradient) else gradient.contiguous()
        return dense.as_strided((gradient.numel(),), (1,)).index_select(0, positions)


def samples_of(layer: Sequence[Tensor], most: int | None) -> list[Sample | None]:
    """Return for each parameter of a layer the weights that stand for it; None for all.

    Args:
        layer: Tensors of the parameters' whole shapes.
        most: How many weights stand for the layer, about; None for all.
    """
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


def _fills_its_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor has no gaps."""
    return tensor.is_contiguous() or (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        == tensor.numel()
    )


# --- Sums ------------------------------------------------------------------------------------------------------------

Sums = dict[str, Any]
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

    Where parameters are shared among processes, so are their buffers; a step and the end of an epoch take one
    collective each.

    Args:
        layers: The layers.
        each_weight: Whether Σ_j |g_ij| is kept for each weight (G′) or summed at once (G).
        sample: Number of weights of each layer that stand for it; None for all.
        measured: Which layers are summed; None for all. The others still tell whether a step counts.

    Raises:
        ValueError: A sample is asked for of parameters that are shared among processes.
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
        self.sample = sample
        self._sizes = [len(layer.parameters) for layer in layers]
        self._parameters = [p for layer in layers for p in layer.parameters]
        names = [
            name
            for layer in layers
            for name in (layer.parameter_names or [f"{layer.name}.{i}" for i in range(len(layer.parameters))])
        ]
        # A state's own entries that begin with an underscore are not saved; a parameter's name may begin with one.
        self._keys = [f"/{name}" for name in names]
        self._shards = [shard for layer in layers for shard in layer.shards]
        self._sharing = sharing_of(self._shards)
        if sample is not None and self._sharing is not None:
            raise ValueError(
                f"sample={sample!r}: the parameters are sharded, and which weights stand for a layer depends on the "
                "number of processes; leave sample out, the sums are sharded too"
            )
        self._samples = [taken for layer in layers for taken in samples_of(layer.whole(), sample)]
        self._counts = [
            number_count(whole) if taken is None else taken.count
            for whole, taken in zip((p for layer in layers for p in layer.whole()), self._samples, strict=True)
        ]
        self._buffers = Buffers(self._parameters, self._shards, [None if s is None else s.count for s in self._samples])
        inside = [True] * len(layers) if measured is None else measured
        self._measured = [flag for size, flag in zip(self._sizes, inside, strict=True) for _ in range(size)]

    @torch.no_grad()
    def add(self, sums: Sums, gradients: Gradients) -> Sums:
        """Return the sums with one step more; the buffers are changed in place.

        Args:
            sums: Those so far; empty before the first step.
            gradients: This step's.
        """
        every = [(i, _real(g)) for i, g in enumerate(gradients.tensors) if g is not None]
        if not every and self._sharing is None:
            return sums
        device = every[0][1].device if every else local(self._parameters[0]).device
        totals: list[Tensor] | None = None
        received: Tensor | None = None
        if self._sharing is not None:
            joint, received = self._joined(every, device)
            size = joint.sum()
            totals = list(joint)
        elif self.sample is None and not self.each_weight and all(self._measured):
            totals = [torch.zeros(())] * len(self._keys)
            for (i, _), total in zip(every, absolute_sums([g for _, g in every]), strict=True):
                totals[i] = total
            size = torch.stack([moved(totals[i], device) for i, _ in every]).sum()
        else:
            size = _size([g for _, g in every], device)
        present = [
            (i, g if (sample := self._samples[i]) is None else sample.of(g, self._parameters[i]))
            for i, g in every
            if self._measured[i]
        ]
        if size.device.type == "cpu" and gradients.skipped is None:
            if not 0 < size.item() < LARGEST:
                return sums
            counts = None
            scale: Any = 1.0 if gradients.scale is None else 1 / float(gradients.scale)
        else:
            counts = (size > 0) & (size < LARGEST)
            if gradients.skipped is not None:
                counts &= moved(gradients.skipped, device) == 0
            scale = 1.0 if gradients.scale is None else gradients.scale.double().reciprocal()
        sums = sums or {**{part: {} for part in PARTS}, "iterations": torch.zeros((), dtype=torch.int64, device=device)}
        sums["iterations"] = moved(sums["iterations"], device) + (1 if counts is None else counts)
        elsewhere = self._elsewhere({i for i, _ in every})
        for i, gradient in [*present, *elsewhere]:
            self._open(sums, i, gradient)
            key = self._keys[i]
            arrived: Any = True if received is None else received[i] > 0
            if counts is not None:
                arrived = moved(counts, gradient.device) & arrived
            elif received is not None:
                arrived = bool(arrived)
            sums["received"][key] = sums["received"][key] | arrived
        values = [gradient for _, gradient in present]
        self._accumulate(sums["signed"], present, values, scale, counts)
        if self.each_weight:
            for item in present:  # one at a time: together they would take the room of all parameters once more
                self._accumulate(sums["absolute"], [item], [item[1].abs()], scale, counts)
        else:
            own = absolute_sums(values) if totals is None else [totals[i] for i, _ in present]
            others = [] if totals is None else [totals[i] for i, _ in elsewhere]
            self._accumulate(sums["absolute"], [*present, *elsewhere], own + others, scale, counts)
        return sums

    def ratios(self, sums: Sums) -> tuple[list[float], list[bool]]:
        """Return G or G′ of each layer, and which layers received a gradient. Waits for the device.

        Args:
            sums: Those of the epoch; may be empty.
        """
        found = [self._fraction(sums, i) for i in range(len(self._keys))]
        if self._sharing is not None:
            device = local(self._parameters[0]).device
            shares = torch.tensor([[above, flag] for above, _, flag in found], dtype=torch.float64, device=device)
            joint: Any = self._sharing.sum(shares.T.contiguous())
            above, flags = joint.tolist()
            found = [(x, below, flag > 0) for x, flag, (_, below, _) in zip(above, flags, found, strict=True)]
        ratios: list[float] = []
        received: list[bool] = []
        position = 0
        for size in self._sizes:
            parts = found[position : position + size]
            position += size
            below = sum(part[1] for part in parts)
            ratios.append(min(sum(part[0] for part in parts) / below, 1.0) if below > 0 else 0.0)
            received.append(any(part[2] for part in parts))
        return ratios, received

    def _fraction(self, sums: Sums, i: int) -> tuple[float, float, bool]:
        """Return what a parameter adds above and below the fraction bar, and whether it received a gradient.

        The first and the last are those of the shard that this process holds, the second of the whole parameter.
        """
        key = self._keys[i]
        below = float(self._counts[i]) if self.each_weight else 0.0
        if not sums or key not in sums["signed"]:
            return 0.0, below, False
        signed, absolute = local(sums["signed"][key]).double().abs(), local(sums["absolute"][key]).double()
        received = bool(sums["received"][key])
        if not self.each_weight:
            return float(signed.sum()), float(absolute), received
        return float(torch.where(absolute > 0, signed / absolute, 0.0).sum()), below, received

    def _elsewhere(self, held: Collection[int]) -> list[tuple[int, Tensor]]:
        """Return the shared parameters of which only other processes may have a gradient, with one of that form.

        Their sums go on here too: a process that left a step out would find another G, and choose other layers.

        Args:
            held: The parameters of which this process has a gradient.
        """
        return [
            (i, as_dense_real(local(p.detach())))
            for i, (p, shard) in enumerate(zip(self._parameters, self._shards, strict=True))
            if shard is not None and i not in held and self._measured[i] and p.requires_grad
        ]

    def _joined(self, every: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return Σ|g| of each parameter over all processes, and how many hold a part of its gradient."""
        shares = torch.zeros(2, len(self._keys), dtype=torch.float64, device=device)
        for (i, gradient), total in zip(every, absolute_sums([g for _, g in every]), strict=True):
            shares[0, i] = total
            shares[1, i] = float(gradient.numel() > 0)
        joint, received = cast(Sharing, self._sharing).sum(shares)
        return joint, received

    def _accumulate(
        self,
        buffers: dict[str, Tensor],
        present: Sequence[tuple[int, Tensor]],
        values: Sequence[Tensor],
        scale: Any,
        counts: Tensor | None,
    ) -> None:
        """Add `scale` times the values, or nothing where `counts` is false; the values need not be finite then."""
        into = [local(buffers[self._keys[i]]) for i, _ in present]
        if counts is None:
            torch._foreach_add_(into, list(values), alpha=scale)
            return
        for buffer, value in zip(into, values, strict=True):
            factor = moved(scale, buffer.device) if isinstance(scale, Tensor) else scale
            counted = torch.where(moved(counts, buffer.device), value.to(buffer.dtype) * factor, 0)
            buffer.add_(counted.to(buffer.dtype))

    def loaded(self, sums: Any) -> Sums:
        """Return a copy of saved sums, shared among processes as the parameters are now.

        Raises:
            ValueError: They are not of this form, or of other parameters.
        """
        if sums == {}:
            return {}
        if has_type(sums, dict):  # a distributed checkpoint leaves out what is empty
            empty: Sums = {part: {} for part in PARTS}
            sums = {**empty, **sums}
        form = has_type(sums, dict) and sorted(sums) == sorted([*PARTS, "iterations"])
        if not form or not all(has_type(sums[part], dict) for part in PARTS):
            raise ValueError(f"the saved sums must hold {', '.join(PARTS)} by parameter, and iterations")
        if not isinstance(sums["iterations"], Tensor) or sums["iterations"].ndim:
            raise ValueError("the saved sums hold no number of iterations")
        copy: Sums = {**{part: {} for part in PARTS}, "iterations": sums["iterations"].clone()}
        for part in PARTS:
            if sums[part].keys() != sums["signed"].keys():
                raise ValueError(f"the saved sums are of different parameters in 'signed' and {part!r}")
            for key, buffer in sums[part].items():
                if key not in self._keys:
                    raise ValueError(f"the saved sums hold {key!r}, which is no parameter here; use the same model")
                if part == "received" and isinstance(buffer, bool):
                    copy[part][key] = buffer
                    continue
                whole = part == "signed" or (part == "absolute" and self.each_weight)
                copy[part][key] = self._buffers.loaded(self._keys.index(key), buffer, key, scalar=not whole)
        return copy

    def _open(self, sums: Sums, i: int, gradient: Tensor) -> None:
        """Make a parameter's buffers, or bring those of a file, or of a model that was moved, to its device."""
        key = self._keys[i]
        known = sums["signed"].get(key)
        if known is not None and local(known).shape == gradient.shape:
            if known.device != gradient.device:
                for part in PARTS:
                    buffer = sums[part][key]
                    sums[part][key] = moved(buffer, gradient.device) if isinstance(buffer, Tensor) else buffer
            return
        sums["signed"][key] = self._buffers.zeros(i, gradient)
        sums["received"][key] = False
        sums["absolute"][key] = (
            self._buffers.zeros(i, gradient)
            if self.each_weight
            else torch.zeros((), dtype=torch.float64, device=gradient.device)
        )


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient that can be added up: repeated entries of a sparse one summed, complex ones as pairs."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    return as_dense_real(gradient)


def _size(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return about Σ|g| over all tensors: zero where all are, not finite where one is not; no square can overflow.

    Half precision is summed in float32, since float16 ends at 65,504.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(gradient.dtype, []).append(gradient)
    norms: list[Tensor] = []
    for dtype, same in kinds.items():
        norms += torch._foreach_norm(same, 1, torch.float32 if dtype in (torch.float16, torch.bfloat16) else None)
    return torch.stack([moved(norm, device) for norm in norms]).sum()


def buffer_bytes(sums: Mapping[str, Any]) -> int:
    """Return the bytes that sums hold."""
    tensors = (value for value in sums.values() if isinstance(value, Tensor))
    inner = (value for value in sums.values() if has_type(value, dict))
    return sum(x.numel() * x.element_size() for x in tensors) + sum(map(buffer_bytes, inner))


# --- Rules that measure over an epoch --------------------------------------------------------------------------------

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
