"""What the tests of the lab share: finished runs made up by hand, so that most tests train nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.lab.demo import Outcome, Protocol, Settings
from layerwise.lab.results import Results
from layerwise.lab.training import ARMS

LAYERS = ("conv1", "conv2", "ip1", "ip2")
TINY = Protocol(iterations=4, record_at=(2, 4), loss_every=2, rate_every=2)


def made_up_record(error: float, diverged_at: int | None = None) -> dict[str, Any]:
    """Give a record of the form that ``training.train`` returns."""
    return {
        "configuration": {},
        "test_error": [[2, 2 * error], [4, error]],
        "training_loss": [[2, 2.0], [4, 1.0]],
        "rates": {
            "iterations": [2, 4],
            "rate": {layer: [0.02, 0.03] for layer in LAYERS},
            "factor": {layer: [2.0, 3.0] for layer in LAYERS},
        },
        "factor": {
            "layers": {layer: {"lowest": 2.0, "mean": 2.5, "highest": 3.0} for layer in LAYERS},
            "mean": 2.5,
            "spread": 1.0,
        },
        "diverged_at": diverged_at,
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "versions": {"layerwise": "0", "torch": "2", "python": "3"},
        "hardware": {"processor": "a processor", "cores": 2, "system": "Linux"},
    }


@pytest.fixture
def make_outcome(tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that makes an outcome from the errors of each arm, one a seed."""

    def make(errors: dict[str, list[float]], solvers: tuple[str, ...] = ("sgd",), **changes: Any) -> Outcome:
        seeds = max(map(len, errors.values()))
        settings = Settings(out=tmp_path / "runs", seeds=seeds, solvers=solvers, protocol=TINY)
        results = Results(solvers, tuple(range(seeds)), TINY.record_at)
        for solver in solvers:
            for arm in ARMS:
                for seed, error in enumerate(errors.get(arm, [])):
                    results.records[solver, arm, seed] = made_up_record(error)
        return Outcome(settings, "digits5k", "some digits", 1000, TINY, results, **changes)

    return make


@pytest.fixture
def mnist_folder() -> Path:
    """Give the folder of the full MNIST, or skip."""
    place = os.environ.get("LAYERWISE_DATA")
    if not place:
        pytest.skip("LAYERWISE_DATA is not set: the files of the full MNIST are not tested")
    return Path(place)
