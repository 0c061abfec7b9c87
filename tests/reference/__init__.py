"""The rules' equations once more, slow and obvious, in NumPy and float64.

Each function is written from the paper's equation, in loops, from plain arrays to factors. A layer is a list of arrays
(weight, bias, …), a network a list of layers. Nothing here imports layerwise or PyTorch.
"""

from .back_matching import Convolution, Dense, Normalisation, Other, TransposedConvolution, back_matching
from .combine import bounds, chain
from .constant import constant
from .finished_step import align_updates, trust, update_clip, update_floor
from .gradient_amplification import chosen, directionality, schedule, z_scores
from .gradient_norms import ada_gc, agc, layer_moment, normalized_gradient, weight_scaled
from .lars import larc, lars
from .layer_adaptive import layer_adaptive
from .layer_decay import layer_decay, layer_decay_by_depth
from .layer_freezing import freezing_score
from .moments import gradient_moments
from .norms import joint_norm
from .relative_gradient import relative_gradient, signal_to_noise
from .remembered import ada_lip, change, initial_snr, l_dog, noise_adaptive, rotation
from .replay import replay
from .schedules import freeze_out
from .solvers import Adam, CaffeAdaGrad, CaffeNesterov, CaffeSGD, TorchSGD
from .spectrum import heavy_tail, hill_alpha, spectral_norm, spectrum, stable_rank
from .unfreezing import unfreezing
from .width_depth import mup, of_shape

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
    "ada_gc",
    "ada_lip",
    "agc",
    "align_updates",
    "back_matching",
    "bounds",
    "chain",
    "change",
    "chosen",
    "constant",
    "directionality",
    "freeze_out",
    "freezing_score",
    "gradient_moments",
    "heavy_tail",
    "hill_alpha",
    "initial_snr",
    "joint_norm",
    "l_dog",
    "larc",
    "lars",
    "layer_adaptive",
    "layer_decay",
    "layer_decay_by_depth",
    "layer_moment",
    "mup",
    "noise_adaptive",
    "normalized_gradient",
    "of_shape",
    "relative_gradient",
    "replay",
    "rotation",
    "schedule",
    "signal_to_noise",
    "spectral_norm",
    "spectrum",
    "stable_rank",
    "trust",
    "unfreezing",
    "update_clip",
    "update_floor",
    "weight_scaled",
    "z_scores",
]
