"""Rules: how large each layer's factor is, one published method a file."""

from .back_matching import BackMatching
from .base import Rule
from .combine import bounds, chain
from .constant import Constant
from .elementwise import ElementwiseRule
from .lars import LARC, LARS
from .layer_adaptive import LayerAdaptive
from .layer_decay import LayerDecay
from .replay import Replay, load_factors, save_factors

__all__ = [
    "LARC",
    "LARS",
    "BackMatching",
    "Constant",
    "ElementwiseRule",
    "LayerAdaptive",
    "LayerDecay",
    "Replay",
    "Rule",
    "bounds",
    "chain",
    "load_factors",
    "save_factors",
]
