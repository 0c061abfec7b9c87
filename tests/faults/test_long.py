"""A hundred thousand steps: memory, handles and the work of a step stay what they were."""

from __future__ import annotations

import gc
import os
import sys
import threading
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.rules import Directionality, GradientAmplification, LayerAdaptive, Phase

pytestmark = pytest.mark.full

EPOCH = 250
OURS = tracemalloc.Filter(True, str(Path(layerwise.__file__).parent / "*"), all_frames=True)
Step = Callable[[int], None]


class Operations(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def build(what: str) -> tuple[Step, Any]:
    """Return a step of training with something attached, and what is attached."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if what == "amplification":
        # Every other epoch is one of analysis, up to the last step; both layers are chosen each time.
        rule = GradientAmplification(Directionality(threshold=0.0, sides="both", reselect=2), [Phase(10**6, True)])
        attached: Any = layerwise.LayerwiseLR(optimizer, rule, model)
    elif what == "monitor":
        records: deque[Any] = deque(maxlen=5)
        attached = layerwise.Monitor(optimizer, model, every=50, sinks=[records.append])
    else:
        attached = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)

    def step(number: int) -> None:
        optimizer.zero_grad()
        (model(torch.randn(8, 4)) - torch.randn(8, 2)).square().mean().backward()
        optimizer.step()
        if what == "amplification" and number % EPOCH == 0:
            attached.end_epoch()

    return step, attached


def traced_bytes() -> int:
    """Return the bytes allocated below a function of ours.

    The account of all is too coarse: some of what PyTorch allocates counts for ever, because PyTorch frees it in a way
    that tracemalloc does not see. A bare optimizer comes to half a byte a step, and on some machines to more.
    """
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([OURS]).traces)


def state_of_process() -> dict[str, int]:
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "traced bytes": traced_bytes(),
        "resident bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def work_of(step: Step, number: int) -> dict[str, int]:
    """Count the calls of Python functions and the tensor operations of a step."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        step(number)
    finally:
        sys.setprofile(None)
        gc.enable()
    with Operations() as operations:
        step(number + 1)
    return {"calls": calls, "operations": operations.count}


def growth(what: str, first: int, last: int) -> dict[str, tuple[int, int]]:
    """Take steps; return what each quantity was after the first ones and after the last ones."""
    step, attached = build(what)
    seen: list[dict[str, int]] = []
    tracemalloc.start(12)  # frames, from a tensor's allocation up to the function of ours that wants it
    try:
        for number in range(1, last + 1):
            step(number)
            if number in (first // 2, first, last):  # each time at the same place in an epoch and between two records
                seen.append({**work_of(step, number + 1), **state_of_process()})
    finally:
        tracemalloc.stop()
        attached.detach()
    _, early, late = seen  # measuring for the first time fills caches of its own
    return {name: (early[name], late[name]) for name in early}


def check(what: str, first: int, last: int) -> dict[str, tuple[int, int]]:
    found = growth(what, first, last)
    for name in ("calls", "operations", "handles", "threads"):
        assert found[name][0] == found[name][1], (name, found)
    assert found["objects"][1] - found["objects"][0] <= 20, found
    assert found["traced bytes"][1] - found["traced bytes"][0] <= 5_000 + (last - first) // 2, found
    assert found["resident bytes"][1] - found["resident bytes"][0] <= 8 * 2**20, found
    return found


on_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of the process")
every_kind = pytest.mark.parametrize("what", ["layer-adaptive", "amplification", "monitor"])


@on_linux
@every_kind
def test_nothing_grows_in_a_thousand_steps(what):
    check(what, 500, 1500)


@pytest.mark.faults
@on_linux
@every_kind
def test_nothing_grows_in_a_hundred_thousand_steps(what, record_testsuite_property):
    record_testsuite_property(f"after 1,000 and 100,000 steps, {what}", check(what, 1000, 100_000))
