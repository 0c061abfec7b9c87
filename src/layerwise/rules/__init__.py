"""Rules: how large each layer's factor is, one published method a file."""

from .back_matching import BackMatching
from .base import Rule, Selection
from .by_name import show_rules
from .by_role import ByRole
from .combine import bounds, chain, refresh
from .constant import Constant
from .elementwise import ElementwiseRule
from .freeze_out import FreezeOut
from .gradient_amplification import PARAMS_1, PARAMS_2, GradientAmplification, Phase
from .gradient_change import AdaLip, NoiseAdaptive
from .gradient_clipping import AGC, AdaGC
from .heavy_tail import HeavyTail
from .initial_snr import InitialSNR
from .l_dog import LDoG
from .lars import LARC, LARS
from .layer_adaptive import LayerAdaptive
from .layer_decay import LayerDecay
from .layer_freezing import LayerFreezing
from .layer_moment import LayerMoment
from .lora_plus import LoRAPlus
from .normalized_gradient import NormalizedGradient
from .random_training import RandomTraining
from .relative_gradient import RelativeGradient
from .replay import Replay, load_factors, save_factors
from .selection import AllLayers, Directionality, RandomLayers, ShuffledLayers
from .trust import Trust
from .unfreezing import Unfreezing
from .update_ratio import AlignUpdates, UpdateClip, UpdateFloor
from .weight_scaled import WeightScaled
from .width_depth import WidthDepth

list = show_rules  # not in __all__, since it hides Python's own

__all__ = [
    "AGC",
    "LARC",
    "LARS",
    "PARAMS_1",
    "PARAMS_2",
    "AdaGC",
    "AdaLip",
    "AlignUpdates",
    "AllLayers",
    "BackMatching",
    "ByRole",
    "Constant",
    "Directionality",
    "ElementwiseRule",
    "FreezeOut",
    "GradientAmplification",
    "HeavyTail",
    "InitialSNR",
    "LDoG",
    "LayerAdaptive",
    "LayerDecay",
    "LayerFreezing",
    "LayerMoment",
    "LoRAPlus",
    "NoiseAdaptive",
    "NormalizedGradient",
    "Phase",
    "RandomLayers",
    "RandomTraining",
    "RelativeGradient",
    "Replay",
    "Rule",
    "Selection",
    "ShuffledLayers",
    "Trust",
    "Unfreezing",
    "UpdateClip",
    "UpdateFloor",
    "WeightScaled",
    "WidthDepth",
    "bounds",
    "chain",
    "load_factors",
    "refresh",
    "save_factors",
]
