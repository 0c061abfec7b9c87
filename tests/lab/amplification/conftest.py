"""What the tests of the amplification demo share: a tiny protocol, and finished runs made up by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.lab.amplification import images
from layerwise.lab.amplification.demo import Outcome, Settings
from layerwise.lab.amplification.results import Results
from layerwise.lab.amplification.training import ARMS, Protocol
from layerwise.lab.data import Dataset

TINY = Protocol(epochs=8, train_count=56, test_count=20, batch_size=16, width=2)
"""Plain in epochs 1 to 3, measured in 4, amplified in 5, measured in 6, amplified in 7, plain in 8; 4 batches each."""

LAYERS = ("conv1", "bn1", "layer1.0.conv1", "fc")
CHOICES = {"random": (0, 1), "G": (2,), "G_prime": (), "all": (0, 1, 2, 3)}
"""Arm -> the places of the layers that its made-up runs choose."""


def made_up_record(arm: str, last: float, best: float) -> dict[str, Any]:
    """Give a record of the form that ``training.train`` returns."""
    z = [0.5, -2.5, 1.5, None] if arm in ("G", "G_prime") else [None] * 4
    chosen = CHOICES.get(arm, ())
    layers = {
        name: [None if value is None else 0.3, value, place in chosen]
        for place, (name, value) in enumerate(zip(LAYERS, z, strict=True))
    }
    return {
        "configuration": {},
        "accuracy": [[epoch, best if epoch == 7 else last - (8 - epoch)] for epoch in range(1, 8)] + [[8, last]],
        "training_loss": [[epoch, 2.0 - 0.1 * epoch] for epoch in range(1, 9)],
        "share": [[epoch, len(chosen) / 4 if epoch in (5, 7) else 0.0] for epoch in range(1, 9)],
        "selections": [] if arm == "plain" else [{"epoch": epoch, "layers": layers} for epoch in (4, 6)],
        "diverged_at": None,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "versions": {"layerwise": "0", "torch": "2", "python": "3"},
        "hardware": {"processor": "a processor", "cores": 2, "system": "Linux"},
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Train as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_outcome(tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that makes an outcome from the last accuracies of each arm, one a seed."""

    def make(accuracies: dict[str, list[float]], **changes: Any) -> Outcome:
        seeds = max(map(len, accuracies.values()))
        settings = Settings(out=tmp_path / "runs", seeds=seeds, protocol=TINY)
        results = Results(tuple(range(seeds)), TINY.epochs, TINY.batches)
        for arm in ARMS:
            for seed, accuracy in enumerate(accuracies.get(arm, [])):
                results.records[arm, seed] = made_up_record(arm, accuracy, accuracy + 0.25)
        return Outcome(settings, "cifar10", "some photographs", 20, TINY, results, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_images() -> Dataset:
    """Give the digits of the tiny protocol."""
    return images.load("digits5k", None, TINY.train_count, TINY.test_count)
