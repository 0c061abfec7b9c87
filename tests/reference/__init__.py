"""The rules' equations once more, slow and obvious, in NumPy and float64.

Each function is written from the paper's equation, in loops, from plain arrays to factors. A layer is a list of arrays
(weight, bias, …), a network a list of layers. Nothing here imports layerwise or PyTorch.
"""

from .back_matching import Convolution, Dense, Normalisation, Other, TransposedConvolution, back_matching
from .combine import bounds, chain
from .constant import constant
from .gradient_amplification import chosen, directionality, schedule, z_scores
from .lars import larc, lars
from .layer_adaptive import layer_adaptive
from .layer_decay import layer_decay
from .layer_freezing import freezing_score
from .norms import joint_norm
from .replay import replay
from .solvers import Adam, CaffeAdaGrad, CaffeNesterov, CaffeSGD, TorchSGD

__all__ = [
    "Adam",
    "CaffeAdaGrad",
    "CaffeNesterov",
    "CaffeSGD",
    "Convolution",
    "Dense",
    "Normalisation",
    "Other",
    "TorchSGD",
    "TransposedConvolution",
    "back_matching",
    "bounds",
    "chain",
    "chosen",
    "constant",
    "directionality",
    "freezing_score",
    "joint_norm",
    "larc",
    "lars",
    "layer_adaptive",
    "layer_decay",
    "replay",
    "schedule",
    "z_scores",
]
