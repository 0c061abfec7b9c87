"""What the tests of the core share: a small network, a step on it, and comparisons to the bit."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# One thread each: on tensors this small, threads that wait for one another take most of the time. Processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sharded import processes
from torch import Tensor, nn
from torch.optim import Optimizer

import layerwise
import pairwise

LONG = {"full": "run everything but the long part of the fault suite", "faults": "run the long part of the fault suite"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, words in LONG.items():
        parser.addoption(f"--{name}", action="store_true", help=words)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = [name for name in LONG if not config.getoption(f"--{name}")]
    without = {item for item in items if any(map(item.get_closest_marker, marks))}
    if "full" in marks:
        without.update(pairwise.left_out(items))
    config.hook.pytest_deselected(items=[item for item in items if item in without])
    items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session", autouse=True)
def _processes_end_with_the_tests() -> Iterator[None]:
    yield
    processes.end()


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported stays, and is not gone through again by each collection


@pytest.fixture
def few_objects() -> None:
    """Let tests that go through all objects find those alone that are made from here on: it takes a second else."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_model() -> Callable[..., nn.Sequential]:
    """Return a function that builds the same network each time; its layers are '0', '2' and '4'."""

    def make(dtype: torch.dtype = torch.float64) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = (nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
            return nn.Sequential(*layers).to(dtype)

    return make


@pytest.fixture
def backward() -> Callable[..., Tensor]:
    """Return a function that puts fresh gradients into a network, other ones at each step."""

    def run(model: nn.Module, step: int = 0) -> Tensor:
        model.zero_grad()
        generator = torch.Generator().manual_seed(100 + step)
        inputs = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        loss = model(inputs.to(next(model.parameters()).dtype)).square().sum()
        loss.backward()
        return loss.detach()

    return run


@pytest.fixture
def setup(make_model) -> Callable[..., tuple[nn.Sequential, torch.optim.SGD, layerwise.LayerwiseLR]]:
    """Return a function that makes the network, an SGD with momentum and decay for it, and an adapter."""

    def make(rule: Any, **arguments: Any) -> tuple[nn.Sequential, torch.optim.SGD, layerwise.LayerwiseLR]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
        return model, optimizer, layerwise.LayerwiseLR(optimizer, rule, model, **arguments)

    return make


@pytest.fixture
def train(backward) -> Callable[..., None]:
    """Return a function that takes steps, numbered from `first`."""

    def run(model: nn.Module, optimizer: Optimizer, steps: int = 3, first: int = 0) -> None:
        for step in range(first, first + steps):
            backward(model, step)
            optimizer.step()

    return run


@pytest.fixture
def weights() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return a function that copies a network's parameters."""
    return lambda model: {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def assert_same_bits() -> Callable[[object, object], None]:
    """Return a function that compares nested tensors, NaN being equal to NaN."""

    def check(actual: object, expected: object) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    return check


@pytest.fixture
def assert_close() -> Callable[[object, object], None]:
    """Return a function that compares nested float64 tensors up to rounding."""

    def check(actual: object, expected: object) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)

    return check
