"""Networks of the papers, as their authors' software defined them, and of kinds that the papers leave to the future."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerwise.lab.errors import UsageError


def check_sizes(**sizes: int) -> None:
    """Refuse a size of a network that is no whole number from 1; each is given by the name of its argument."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r}: use a whole number from 1")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw PyTorch's own initial weights on the CPU, the same on every device; the global state is left alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
