"""Which layers: all of them, some at random, or those whose gradients kept a direction over an epoch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from .._arguments import has_type
from ..layers import Layer, is_message_passing
from .base import is_number

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.modules.conv._ConvNd,),
    "bn": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "fc": (nn.Linear,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "attention": (nn.MultiheadAttention,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "graph": (),
}
"""Kinds of layers; `"graph"` stands for the convolutions of PyTorch Geometric, known by `is_message_passing`."""

Kind = str | type[nn.Module]
"""A key of `KINDS`, or a class of modules."""

MEASURES = ("G", "G_prime")
Measure = Literal["G", "G_prime"]


class LayerChoice(ABC):
    """A way to choose layers.

    The attributes are the arguments of `Directionality`, `RandomLayers` and `AllLayers`. `measure` is None where the
    choice needs no epoch of measuring.
    """

    kinds: Sequence[Kind] | None = None
    measure: Measure | None = None
    sample: int | None = None
    reselect: int | None = None
    ddof: int = 0
    redraw: Literal["phase", "epoch"] = "phase"
    after_analysis: bool = True

    @abstractmethod
    def choose(self, candidates: Sequence[bool], z: Sequence[float], draw: int) -> list[bool]:
        """Return which of the candidates are chosen, by their ẑ or as draw number `draw`."""


def _is_of(module: nn.Module | None, kind: Kind) -> bool:
    if kind == "graph":
        return is_message_passing(module)
    return isinstance(module, KINDS[kind] if isinstance(kind, str) else kind)


def of_kinds(layers: Sequence[Layer], kinds: Sequence[Kind] | None) -> list[bool]:
    """Return which layers are of the kinds and not excluded; raise a ValueError if none is of one of the kinds."""
    if kinds is None:
        return [layer.included for layer in layers]
    for kind in kinds:
        if not any(_is_of(layer.module, kind) for layer in layers):
            found = sorted({type(layer.module).__name__ for layer in layers if layer.module is not None})
            known = f"the layers are {', '.join(found)}" if found else "no layer's module is known; pass the model"
            raise ValueError(f"kinds={tuple(kinds)!r}: no layer is of kind {kind!r}; {known}")
    return [layer.included and any(_is_of(layer.module, kind) for kind in kinds) for layer in layers]


@dataclass(frozen=True)
class AllLayers(LayerChoice):
    """Every layer: the control that asks whether a gain is more than that of a larger rate in the same epochs.

    Args:
        kinds: Kinds of layers, keys of `KINDS` such as `"conv"` and `"recurrent"`, or classes of modules; None for all.
        after_analysis: Whether the first epoch of each amplified phase stays plain, in which `Directionality` measures.

    Raises:
        ValueError: A kind is unknown.

    Example:
        >>> AllLayers().choose([True, False], [], 0)
        [True, False]
    """

    kinds: Sequence[Kind] | None = None
    after_analysis: bool = True

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        check_flag("after_analysis", self.after_analysis)

    def choose(self, candidates: Sequence[bool], z: Sequence[float], draw: int) -> list[bool]:
        """Return the candidates."""
        return list(candidates)


@dataclass(frozen=True)
class RandomLayers(LayerChoice):
    """`round(ratio · candidates)` layers at random, drawn anew at the start of each amplified phase.

    The draw has a stream of random numbers of its own, so it changes no other one.

    Args:
        ratio: Share of the candidates, from 0 to 1.
        kinds: Kinds of layers, keys of `KINDS` such as `"conv"` and `"recurrent"`, or classes of modules; None for all.
        seed: Of the draws.
        redraw: `"phase"`, or `"epoch"` for a draw in each epoch of an amplified phase.
        after_analysis: Whether the first epoch of each amplified phase stays plain, as under `Directionality`, so that
            both amplify in the same epochs.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> sum(RandomLayers(0.5).choose([True] * 10, [], 0))
        5

    Reference:
        Basodi, Ji, Zhang, Pan: Gradient amplification: an efficient way to train deep neural networks, Big Data Mining
        and Analytics 3(3), 2020. The paper's ratios are not known.
    """

    ratio: float
    kinds: Sequence[Kind] | None = None
    seed: int = 0
    redraw: Literal["phase", "epoch"] = "phase"
    after_analysis: bool = False

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        if not (is_number(self.ratio) and 0 <= self.ratio <= 1):
            raise ValueError(f"ratio={self.ratio!r} must be a share of the layers, from 0 to 1, such as 0.5")
        check_whole("seed", self.seed, 0)
        if self.redraw not in ("phase", "epoch"):
            raise ValueError(f"redraw={self.redraw!r} must be 'phase' or 'epoch'")
        check_flag("after_analysis", self.after_analysis)

    def choose(self, candidates: Sequence[bool], z: Sequence[float], draw: int) -> list[bool]:
        """Return a draw without replacement."""
        return drawn(candidates, round(self.ratio * sum(candidates)), self.seed, draw)


@dataclass(frozen=True)
class Directionality(LayerChoice):
    """The layers whose gradients kept their direction over an epoch more than others did.

    `G_l = Σ_i |Σ_j g_lij| / Σ_i Σ_j |g_lij|` and `G′_l = (1/n) Σ_i |Σ_j g_lij| / Σ_j |g_lij|`, over the weights i of
    layer l and the steps j of an epoch; both from 0 to 1, about 1/√m for noise over m steps, and free of the gradients'
    scale. `ẑ_l = (G_l − mean) / σ` over the layers that received a gradient. Chosen are those with ẑ_l above the
    threshold (case 1), or |ẑ_l| (case 2).

    Args:
        measure: `"G"` or `"G_prime"`.
        threshold: On ẑ, at least 0. The paper tries 0.7 to 3; of normal ẑ, 6.7 % are above 1.5.
        sides: `"upper"` (case 1) or `"both"` (case 2).
        reselect: None, or after how many epochs of an amplified phase the layers are chosen anew.
        kinds: Kinds of layers that are measured and chosen, as for `AllLayers`; None for all.
        sample: None, or how many fixed weights stand for each layer: less memory, and an estimate. With 4096 of
            ResNet-18 in training, G and G′ were 0.5 % off on average over the layers and 4 % at worst, ẑ at most 0.16.
        ddof: 0 for the population's σ, 1 for the sample's.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> Directionality(threshold=1.0, sides="both").choose([True] * 3, [1.2, -1.3, 0.1], 0)
        [True, True, False]

    Reference:
        Basodi, Pusuluri, Xiao, Pan: Intelligent gradient amplification for deep neural networks, 2023, arXiv
        2305.18445, equations 4 to 9; the two cases are section 3.6 and Algorithm 1.
    """

    measure: Measure | None = "G"
    threshold: float = 1.5
    sides: Literal["upper", "both"] = "upper"
    reselect: int | None = None
    kinds: Sequence[Kind] | None = None
    sample: int | None = None
    ddof: int = 0

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        check_measure(self.measure)
        if not (is_number(self.threshold) and 0 <= self.threshold < math.inf):
            raise ValueError(f"threshold={self.threshold!r} must be a finite number of at least 0, such as 1.5")
        if self.sides not in ("upper", "both"):
            raise ValueError(f"sides={self.sides!r} must be 'upper' (case 1) or 'both' (case 2)")
        if self.reselect is not None:
            check_whole("reselect", self.reselect, 1)
        if self.sample is not None:
            check_whole("sample", self.sample, 1)
        if isinstance(self.ddof, bool) or self.ddof not in (0, 1):
            raise ValueError(f"ddof={self.ddof!r} must be 0 (population) or 1 (sample)")

    def choose(self, candidates: Sequence[bool], z: Sequence[float], draw: int) -> list[bool]:
        """Return the candidates above the threshold; equality is not above."""
        sizes = [abs(value) if self.sides == "both" else value for value in z]
        return [inside and size > self.threshold for inside, size in zip(candidates, sizes, strict=True)]


@dataclass(frozen=True)
class ShuffledLayers(LayerChoice):
    """As many layers as a measured choice takes, but drawn at random: the control that asks whether it matters which.

    Args:
        measured: The choice whose number is taken.
        seed: Of the draws.

    Raises:
        TypeError: `measured` is no `Directionality`.
        ValueError: The seed is out of its range.

    Example:
        >>> sum(ShuffledLayers(Directionality(threshold=1.0)).choose([True] * 5, [1.5, 0.0, 0.0, -0.2, -1.3], 0))
        1
    """

    measured: Directionality
    seed: int = 0

    def __post_init__(self) -> None:
        if not has_type(self.measured, Directionality):
            raise TypeError(f"measured={self.measured!r} must be a Directionality(...)")
        check_whole("seed", self.seed, 0)
        for name in ("kinds", "measure", "sample", "reselect", "ddof"):
            object.__setattr__(self, name, getattr(self.measured, name))

    def choose(self, candidates: Sequence[bool], z: Sequence[float], draw: int) -> list[bool]:
        """Return a draw of the same number."""
        return drawn(candidates, sum(self.measured.choose(candidates, z, draw)), self.seed, draw)


def drawn(candidates: Sequence[bool], count: int, seed: int, draw: int) -> list[bool]:
    """Draw some of the candidates without replacement; the same for the same seed and draw."""
    inside = [i for i, candidate in enumerate(candidates) if candidate]
    generator = torch.Generator("cpu").manual_seed(((seed + 1) * 1_000_003 + draw) % 2**63)
    order: Any = torch.randperm(len(inside), generator=generator, device="cpu")
    chosen: set[int] = {inside[i] for i in order[:count].tolist()}
    return [i in chosen for i in range(len(candidates))]


def check_kinds(kinds: Sequence[Kind] | None) -> None:
    """Raise unless every kind is known."""
    if kinds is None:
        return
    if isinstance(kinds, str) or not has_type(kinds, Sequence) or not kinds:
        raise ValueError(f"kinds={kinds!r} must be a tuple of {', '.join(map(repr, KINDS))}, such as ('conv', 'fc')")
    for kind in cast("Sequence[object]", kinds):
        known = kind in KINDS if isinstance(kind, str) else isinstance(kind, type) and issubclass(kind, nn.Module)
        if not known:
            raise ValueError(f"kinds holds {kind!r}; allowed: {', '.join(map(repr, KINDS))}, or a class of modules")


def check_measure(measure: str | None) -> None:
    """Raise unless the measure is known."""
    if measure not in MEASURES:
        hint = "; a threshold is named: threshold=1.5" if is_number(measure) else ""
        raise ValueError(f"measure={measure!r} must be one of {', '.join(map(repr, MEASURES))}{hint}")


def check_flag(name: str, value: object) -> None:
    """Raise unless an argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise unless an argument is a whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
