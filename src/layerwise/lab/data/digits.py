"""``digits5k``: 5,000 digits of MNIST in a file beside this module, so that nothing is downloaded.

The file holds 500 digits of each class, sorted by class. They are permuted once with a fixed seed; the result plays
the part of MNIST's file order. The first 4,000 of it are trained on, the last 1,000 are tested on.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError

TRAIN_COUNT, TEST_COUNT = 4000, 1000
SIDE = 28
FILE = Path(__file__).with_name("digits5k.gz")
"""A row a digit, its class behind its pixels, a byte each, compressed. ``tests/digits_file.py`` writes it;
``digits5k.txt`` says whose the digits are."""

CONTENT = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # SHA-256 of what is in ``FILE``
ORDER_SEED = 2015
"""Seed of the file order, drawn by ``numpy.random.RandomState``, whose stream NumPy promises to keep."""


def file_order() -> np.ndarray:
    """Give the fixed permutation of the rows."""
    return np.random.RandomState(ORDER_SEED).permutation(TRAIN_COUNT + TEST_COUNT)


@lru_cache(maxsize=1)
def load() -> Dataset:
    """Read the digits."""
    try:
        content = gzip.decompress(FILE.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{FILE}: cannot be read ({error}); expected 5,000 digits; install layerwise again") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != CONTENT:
        raise UsageError(
            f"{FILE}: damaged: SHA-256 of pixels and classes is {digest}, expected {CONTENT}; install layerwise again"
        )
    table = np.frombuffer(content, dtype=np.uint8).reshape(-1, SIDE * SIDE + 1)[file_order()]
    images = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, SIDE, SIDE)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    train, test = slice(TRAIN_COUNT), slice(TRAIN_COUNT, None)
    title = "5,000 MNIST digits: 4,000 to train, 1,000 to test"
    return Dataset("digits5k", title, images[train], labels[train], images[test], labels[test])
