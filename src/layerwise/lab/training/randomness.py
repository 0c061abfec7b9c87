"""The state of the generators that a network or a task may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Give the state of torch, Python and NumPy, in plain values and tensors."""
    import numpy

    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],  # type: ignore[union-attr]
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
        state["gpu"] = torch.cuda.current_device()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take over what ``random_state`` gave."""
    import numpy

    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        if "gpu" in state:  # a run may go on on another GPU
            torch.cuda.set_rng_state(state["cuda"][state["gpu"]])
