"""Every rule of `layerwise.rules`, one row each: the tests that hold for all rules read this table.

A new rule needs a row here and no other test file. `tests/rules/test_every_rule.py` has the common tests; the tests of
checkpoints, of `step_in_backward`, of faults and of sharded training take their rules from here too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import reference
from layerwise.rules import (
    AGC,
    LARC,
    LARS,
    AdaGC,
    AdaLip,
    AlignUpdates,
    AllLayers,
    BackMatching,
    ByRole,
    Constant,
    Directionality,
    FreezeOut,
    GradientAmplification,
    HeavyTail,
    InitialSNR,
    LayerAdaptive,
    LayerDecay,
    LayerFreezing,
    LayerMoment,
    LDoG,
    LoRAPlus,
    NoiseAdaptive,
    NormalizedGradient,
    Phase,
    RandomTraining,
    RelativeGradient,
    Replay,
    Rule,
    Trust,
    Unfreezing,
    UpdateClip,
    UpdateFloor,
    WeightScaled,
    WidthDepth,
    bounds,
    chain,
    refresh,
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
        sharded: Whether it is trained in several processes too; "FSDP2" for that way in full and a share of the others,
            where other rules have the same statistics.
        freezes: Whether some of its first factors are 0.
    """

    make: Callable[[Names], Rule]
    reference: Callable[[Network], np.ndarray] | None = None
    refused: str = ""
    sharded: bool | Literal["FSDP2"] = True
    freezes: bool = False


_FILES = tempfile.TemporaryDirectory()  # removed when the process ends


def replay(names: Names) -> Replay:
    file = Path(_FILES.name) / f"{'-'.join(names)}.jsonl"
    save_factors(file, [recorded(names, step) for step in range(9)])
    return Replay(file)


def recorded(names: Names, step: int) -> dict[str, float]:
    return {name: 1 + step + i / 8 for i, name in enumerate(names)}


def lars(of: Network) -> np.ndarray:
    return reference.lars(of.gradients, of.weights, of.decays)


def block(name: str) -> str | None:
    """Two of the layers, or all if they are numbered."""
    return name if name in ("second", "third") or name.isdigit() else None


def heavy_tail(of: Network) -> np.ndarray:
    """The first and the last matrix, and the normalisation after the first one, keep 1."""
    alphas = [reference.hill_alpha(reference.spectrum(layer[0])) if layer[0].ndim > 1 else None for layer in of.weights]
    return np.array(reference.heavy_tail([None, *alphas[1:-1], None], 0.5, 1.5))


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
    "LayerDecay_completed": RuleCase(
        lambda names: LayerDecay(0.5, min_scale=0.2, multiply={names[-1]: 3.0}),
        lambda of: reference.layer_decay_by_depth(
            list(range(len(of.names))), 0.5, least=0.2, factors=[1.0] * (len(of.names) - 1) + [3.0]
        ),
        sharded=False,
    ),
    "Unfreezing": RuleCase(
        lambda names: Unfreezing(),
        lambda of: reference.unfreezing(list(range(len(of.names))), epoch=1),
        freezes=True,
        sharded="FSDP2",
    ),
    "Unfreezing_chain": RuleCase(
        lambda names: Unfreezing(2, every=2, order="chain"),
        lambda of: reference.unfreezing([0] * (len(of.names) - len(of.names) // 2) + [1] * (len(of.names) // 2), 1),
        freezes=True,
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
    "ByRole": RuleCase(
        lambda names: ByRole({"norm": 0.5, "head": 2.0}),
        lambda of: np.array([{"norm": 0.5, "head": 2.0}.get(name, 1.0) for name in of.names]),
        sharded="FSDP2",
    ),
    "ByRole_shared": RuleCase(
        lambda names: ByRole({"norm": 0.5, "head": 2.0}, schedule="shared", warmup=3, total=50),
        lambda of: np.ones(len(of.names)),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "LoRAPlus": RuleCase(
        lambda names: LoRAPlus(),
        lambda of: np.array([16.0 if all(w.ndim <= 1 for w in layer) else 1.0 for layer in of.weights]),
        sharded="FSDP2",
    ),
    "NormalizedGradient": RuleCase(
        lambda names: NormalizedGradient(), lambda of: reference.normalized_gradient(of.gradients), sharded="FSDP2"
    ),
    "NormalizedGradient_rms": RuleCase(
        lambda names: NormalizedGradient("rms"),
        lambda of: reference.normalized_gradient(of.gradients, "rms"),
        sharded=False,
    ),
    "LayerMoment": RuleCase(
        lambda names: LayerMoment(),
        lambda of: np.array([reference.layer_moment([reference.joint_norm(g)])[0] for g in of.gradients]),
        refused=COUNTS,
        sharded="FSDP2",
    ),
    "LayerMoment_corrected": RuleCase(
        lambda names: LayerMoment(0.9, bias_correction=True),
        lambda of: np.array(
            [reference.layer_moment([reference.joint_norm(g)], corrected=True)[0] for g in of.gradients]
        ),
        refused=COUNTS,
        sharded=False,
    ),
    "WeightScaled": RuleCase(
        lambda names: WeightScaled(), lambda of: reference.weight_scaled(of.weights), sharded="FSDP2"
    ),
    "Trust": RuleCase(
        lambda names: Trust(),
        lambda of: reference.trust(of.gradients, of.weights),
        refused=NEEDS_OTHERS,
    ),
    "Trust_calibrated": RuleCase(
        lambda names: Trust(calibrate=True, clip=(0.1, 5.0)),
        lambda of: np.ones(len(of.names)),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "AlignUpdates": RuleCase(
        lambda names: AlignUpdates(every=2),
        lambda of: reference.align_updates(of.gradients, of.weights, ["all"] * len(of.names)),
        refused=NEEDS_OTHERS,
    ),
    "UpdateFloor": RuleCase(
        lambda names: UpdateFloor(),
        lambda of: reference.update_floor(of.gradients, of.weights),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "UpdateClip": RuleCase(
        lambda names: UpdateClip(),
        lambda of: reference.update_clip(of.gradients),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "AGC": RuleCase(lambda names: AGC(), lambda of: reference.agc(of.gradients, of.weights), sharded="FSDP2"),
    "AdaGC": RuleCase(
        lambda names: AdaGC(warmup=2),
        lambda of: np.array(reference.ada_gc([list(map(reference.joint_norm, of.gradients))], 1.05, 0.98, 1, 2)[0]),
        refused=COUNTS,
    ),
    "RelativeGradient": RuleCase(
        lambda names: RelativeGradient(batches=1),
        lambda of: reference.relative_gradient(of.gradients, of.weights, [name == "norm" for name in of.names]),
        refused=COUNTS,
        sharded="FSDP2",
    ),
    "RelativeGradient_snr": RuleCase(
        lambda names: RelativeGradient("snr", 3),
        lambda of: np.ones(len(of.names)),
        refused=COUNTS,
        sharded=False,
    ),
    "WidthDepth": RuleCase(
        lambda names: WidthDepth(4, width=16),
        lambda of: np.array([1.0 if name in ("norm", "head") else 0.25 for name in of.names]),
        sharded="FSDP2",
    ),
    "WidthDepth_muon": RuleCase(
        lambda names: WidthDepth(kind="muon"),
        lambda of: np.array(
            [reference.of_shape(max((w.shape for w in layer), key=len), "muon") for layer in of.weights]
        ),
        sharded=False,
    ),
    "FreezeOut": RuleCase(
        lambda names: FreezeOut(50),
        lambda of: np.array([reference.freeze_out(0, 50, i / (len(of.names) - 1)) for i in range(len(of.names))]),
        refused=NEEDS_OTHERS,
        sharded="FSDP2",
    ),
    "RandomTraining": RuleCase(
        lambda names: RandomTraining(every=2, block=block),
        lambda of: np.ones(len(of.names)),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "LDoG": RuleCase(
        lambda names: LDoG(1e-3),
        lambda of: np.array(
            [
                reference.l_dog([np.array([reference.joint_norm(w)])], [np.array([reference.joint_norm(g)])], 1e-3)[0]
                for w, g in zip(of.weights, of.gradients, strict=True)
            ]
        ),
        refused=COUNTS,
        sharded=False,
    ),
    "InitialSNR": RuleCase(
        lambda names: InitialSNR(within=2),
        lambda of: reference.initial_snr(of.gradients),
        refused=NEEDS_OTHERS,
    ),
    "InitialSNR_sqrt_n": RuleCase(
        lambda names: InitialSNR("sqrt_n"),
        lambda of: np.array([sum(w.size for w in layer) ** 0.5 for layer in of.weights]),
        sharded="FSDP2",
    ),
    "AdaLip": RuleCase(
        lambda names: AdaLip(),
        lambda of: np.ones(len(of.names)),
        refused=NEEDS_OTHERS,
        sharded=False,
    ),
    "NoiseAdaptive": RuleCase(
        lambda names: NoiseAdaptive(within="all"),
        lambda of: np.ones(len(of.names)),
        refused=COMPARES,
        sharded=False,
    ),
    "HeavyTail": RuleCase(lambda names: HeavyTail(least=5, every=3), heavy_tail, refused=NEEDS_OTHERS, sharded=False),
    "HeavyTail_llr": RuleCase(
        lambda names: HeavyTail("llr", least=1, every=3, until=5, aspect=1.5), refused=NEEDS_OTHERS, sharded=False
    ),
    "refresh": RuleCase(
        lambda names: refresh(LayerAdaptive(), 2, ramp=1, smooth=0.5),
        lambda of: reference.layer_adaptive(of.gradients),
        refused=NEEDS_OTHERS,
        sharded=False,
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
