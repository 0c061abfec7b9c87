"""Every rule of `layerwise.rules`, one row each: the tests that hold for all rules read this table.

A new rule needs a row here and no other test file. `tests/rules/test_every_rule.py` has the common tests; the tests of
checkpoints, of `step_in_backward`, of faults and of sharded training take their rules from here too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import reference
from layerwise.rules import (
    LARC,
    LARS,
    AllLayers,
    BackMatching,
    Constant,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    LayerFreezing,
    Phase,
    Replay,
    Rule,
    bounds,
    chain,
    save_factors,
)

Names = Sequence[str]
"""The names of a network's layers, from the input to the loss."""


@dataclass(frozen=True)
class Network:
    """What a reference gets of a network before its first step; gradients, weights and decays by layer and parameter.

    Args:
        names: Of the layers.
        gradients: Arrays of each layer.
        weights: Arrays of each layer.
        decays: The weight decay of each parameter.
        rates: The rate of each layer.
    """

    names: Names
    gradients: list[list[np.ndarray]]
    weights: list[list[np.ndarray]]
    decays: list[list[float]]
    rates: list[float]


@dataclass(frozen=True)
class RuleCase:
    """A rule, and what tests have to know of it.

    Args:
        make: Makes it for layers of these names.
        reference: Its first factors in NumPy and float64. None where a module of `tests/reference` has them, named as
            the rule's module, with tests of their own.
        refused: Why `step_in_backward` refuses it; empty for a rule whose factors each follow from their layer alone.
        sharded: Whether it is trained in several processes too.
    """

    make: Callable[[Names], Rule]
    reference: Callable[[Network], np.ndarray] | None = None
    refused: str = ""
    sharded: bool = True


_FILES = tempfile.TemporaryDirectory()  # removed when the process ends


def replay(names: Names) -> Replay:
    file = Path(_FILES.name) / f"{'-'.join(names)}.jsonl"
    save_factors(file, [recorded(names, step) for step in range(9)])
    return Replay(file)


def recorded(names: Names, step: int) -> dict[str, float]:
    return {name: 1 + step + i / 8 for i, name in enumerate(names)}


def lars(of: Network) -> np.ndarray:
    return reference.lars(of.gradients, of.weights, of.decays)


NEEDS_OTHERS = "does not say own_layer = True"
COMPARES = "compares the gradients of all layers"
COUNTS = "counts the steps whose gradients are finite in every layer"
PHASES = [Phase(3, True)]

RULES: dict[str, RuleCase] = {
    "LayerAdaptive": RuleCase(
        lambda names: LayerAdaptive(),
        lambda of: reference.layer_adaptive(of.gradients),
    ),
    "LayerAdaptive_base_10": RuleCase(
        lambda names: LayerAdaptive(10),
        lambda of: reference.layer_adaptive(of.gradients, 10),
        sharded=False,
    ),
    "LARS": RuleCase(lambda names: LARS(), lars),
    "LARC": RuleCase(
        lambda names: LARC(),
        lambda of: reference.larc(of.gradients, of.weights, of.decays, of.rates),
    ),
    "LARC_scaled": RuleCase(
        lambda names: LARC(clip=False),
        lambda of: reference.larc(of.gradients, of.weights, of.decays, of.rates, clip=False),
        sharded=False,
    ),
    "LayerDecay": RuleCase(lambda names: LayerDecay(0.8)),
    "LayerDecay_electra": RuleCase(
        lambda names: LayerDecay(0.8, "electra"),
        sharded=False,
    ),
    "BackMatching": RuleCase(lambda names: BackMatching(), refused=NEEDS_OTHERS),
    "Constant": RuleCase(
        lambda names: Constant({names[0]: 0.5, names[-1]: 2.0}),
        lambda of: reference.constant(of.names, {of.names[0]: 0.5, of.names[-1]: 2.0}),
    ),
    "Replay": RuleCase(
        replay,
        lambda of: reference.replay([recorded(of.names, 0)], of.names, [True])[0],
        refused=COUNTS,
        sharded=False,  # each process would write a file of its own
    ),
    "GradientAmplification": RuleCase(
        lambda names: GradientAmplification(AllLayers(after_analysis=False), [Phase(9, True)]),
        lambda of: np.full(len(of.names), 2.0),
        sharded=False,
    ),
    "GradientAmplification_by_G": RuleCase(
        lambda names: GradientAmplification(Directionality("G", threshold=0.5), PHASES),
        lambda of: np.ones(len(of.names)),
        refused=COMPARES,
        sharded=False,
    ),
    "GradientAmplification_by_G_prime": RuleCase(
        lambda names: GradientAmplification(Directionality("G_prime", threshold=0.5), PHASES),
        lambda of: np.ones(len(of.names)),
        refused=COMPARES,
        sharded=False,
    ),
    "LayerFreezing": RuleCase(
        lambda names: LayerFreezing(0.25, every=1),
        lambda of: np.ones(len(of.names)),
        refused=COMPARES,
    ),
    "chain": RuleCase(
        lambda names: chain(LayerAdaptive(), LARS()),
        lambda of: reference.chain([reference.layer_adaptive(of.gradients), lars(of)]),
        sharded=False,
    ),
    "chain_with_a_file": RuleCase(
        lambda names: chain(LayerAdaptive(), replay(names), LayerDecay(0.5)),
        refused=COUNTS,
        sharded=False,
    ),
    "bounds": RuleCase(
        lambda names: bounds(chain(LayerAdaptive(), replay(names), LARS()), 0.01, 5.0),
        refused=COUNTS,
        sharded=False,
    ),
}
