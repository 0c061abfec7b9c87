"""Norms of arrays, slowly and in float64."""

from __future__ import annotations

import math

import numpy as np
import torch


def layer_norm(arrays):
    """Return the 2-norm over arrays together, slowly and in float64."""
    return math.sqrt(sum(float(np.sum(np.abs(np.asarray(a).astype(np.complex128)) ** 2)) for a in arrays))


def arrays(tensors):
    return [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).numpy() for t in tensors]
