"""Returning freed memory to the system: when it is done, and where it is not possible."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise import _tensors as memory
from layerwise import backward as stepping
from layerwise.rules import Constant


def test_only_large_layers_return_memory_in_the_first_iteration(monkeypatch: Any) -> None:
    returned: list[int] = []
    monkeypatch.setattr(stepping, "return_freed_memory", lambda: returned.append(1))
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, memory.LARGE // 8), nn.Linear(memory.LARGE // 8, 1))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.step_in_backward(optimizer, model, Constant({"*": 2.0}))
    for expected in (1, 1):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        assert len(returned) == expected


@pytest.mark.skipif(memory._trim is None, reason="the C library is not glibc")
def test_gaps_between_kept_blocks_are_returned_to_the_system() -> None:
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
held = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024
blocks = [bytearray(b"x" * 2**20) for _ in range(64)]
blocks[::2] = [None] * 32
before = held()
memory.return_freed_memory()
print(before - held())
"""
    child = subprocess.run(
        [sys.executable, "-c", program, memory.__file__],
        env={"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) > 25  # MB of 32


def imported_again() -> ModuleType:
    """Import the module again, as a new process does."""
    spec = importlib.util.spec_from_file_location("memory_of_another_system", memory.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OtherLibrary:
    """A C library for Linux without `malloc_trim`, such as musl."""

    def __init__(self, name: str | None) -> None:
        assert name is None


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_do_not_load_the_c_library(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none under this name: `ctypes.CDLL(None)` raises there, and the import would fail."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(TypeError("as Windows says")))
    assert imported_again().return_freed_memory() is None


def test_a_c_library_that_cannot_return_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)
    module = imported_again()
    assert module._trim is None
    module.return_freed_memory()


@pytest.mark.parametrize("there", [True, False])
def test_weights_are_the_same_with_and_without_it(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not there:
        monkeypatch.setattr(memory, "_trim", None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, memory.LARGE // 8), nn.Linear(memory.LARGE // 8, 1)).double()
    expected = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    layerwise.step_in_backward(optimizer, model, Constant({"*": 2.0}))
    loss = model(torch.ones(1, 1, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    for p, before, gradient in zip(model.parameters(), expected, gradients, strict=True):
        torch.testing.assert_close(p.detach(), before - 2e-3 * gradient, rtol=0, atol=1e-15)
