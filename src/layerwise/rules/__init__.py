"""Rules: how large each layer's factor is, one published method a file."""

from .back_matching import BackMatching
from .base import Rule, Selection
from .combine import bounds, chain
from .constant import Constant
from .elementwise import ElementwiseRule
from .gradient_amplification import PARAMS_1, PARAMS_2, GradientAmplification, Phase
from .lars import LARC, LARS
from .layer_adaptive import LayerAdaptive
from .layer_decay import LayerDecay
from .layer_freezing import LayerFreezing
from .replay import Replay, load_factors, save_factors
from .selection import AllLayers, Directionality, RandomLayers, ShuffledLayers

__all__ = [
    "LARC",
    "LARS",
    "PARAMS_1",
    "PARAMS_2",
    "AllLayers",
    "BackMatching",
    "Constant",
    "Directionality",
    "ElementwiseRule",
    "GradientAmplification",
    "LayerAdaptive",
    "LayerDecay",
    "LayerFreezing",
    "Phase",
    "RandomLayers",
    "Replay",
    "Rule",
    "Selection",
    "ShuffledLayers",
    "bounds",
    "chain",
    "load_factors",
    "save_factors",
]
