"""What the tests of real trainings share: one thread, digits, and what a linear classifier makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a core with another process wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Digits:
    """Real digits, numbers from 0 to 1 of shape (n, 1, 28, 28), and their names."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def train(self, model: nn.Module, optimizer, *, epochs: int, shape: Callable[[Tensor], Tensor], peak=None) -> float:
        """Train in batches of 32, the rate rising and falling where its peak is given; return the test accuracy."""
        steps = epochs * -(-len(self.labels) // 32)
        scheduler = None
        if peak is not None:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, peak, total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
            )
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.labels), generator=generator).split(32):
                optimizer.zero_grad()
                functional.cross_entropy(model(shape(self.images[rows])), self.labels[rows]).backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        with torch.no_grad():
            return (model(shape(self.test_images)).argmax(1) == self.test_labels).double().mean().item()


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Return 4,000 digits to train on and 1,000 to test."""
    pytest.importorskip("numpy")
    from layerwise.lab import data

    known = data.load("digits5k")
    return Digits(
        data.pixels(known.train_images), known.train_labels, data.pixels(known.test_images), known.test_labels
    )


@pytest.fixture(scope="session")
def linear_accuracy(digits: Digits) -> float:
    """Return the test accuracy of a linear classifier after as many epochs as the networks get."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(784, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accuracy = digits.train(model, optimizer, epochs=5, shape=lambda images: images.flatten(1))
    assert accuracy > 0.85  # no weak opponent
    return accuracy


@pytest.fixture(scope="session")
def shown() -> Callable[[str], Callable]:
    """Return a function that finds a function by its name in the page on networks, as a reader would copy it."""
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")

    def find(name: str) -> Callable:
        start = page.index(f"def {name}(")
        lines = page[start:].split("\n\n")[0].split("\n```")[0]
        namespace: dict = {}
        exec(f"import re\n{lines}", namespace)
        return namespace[name]

    return find
