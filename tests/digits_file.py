"""Writes ``src/layerwise/lab/data/digits5k.gz``: 5,000 digits of MNIST, made from its published files.

Run it with the folder of MNIST's four files, ``python tests/digits_file.py FOLDER``; a test compares the two.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import torch

from layerwise.lab.data import digits, mnist

PER_CLASS = 500


def table(folder: Path) -> bytes:
    """Return the first 500 training digits of each class, in the order of the classes: pixels, then the class."""
    published = mnist.load(folder)
    labels = published.train_labels
    rows = torch.cat([(labels == digit).nonzero()[:PER_CLASS, 0] for digit in range(10)])
    pixels = published.train_images[rows].flatten(1)
    return torch.cat([pixels, labels[rows, None].to(torch.uint8)], dim=1).numpy().tobytes()


if __name__ == "__main__":
    digits.FILE.write_bytes(gzip.compress(table(Path(sys.argv[1])), mtime=0))
