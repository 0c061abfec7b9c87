"""What stepping in backward saves and costs: peak memory, and the time of an iteration.

python -m benchmarks.backward [--rounds 30] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn, optim
from torch.nn import functional as F

import layerwise
from layerwise.lab.models.lenet import LeNet
from layerwise.rules import LayerAdaptive

from .timing import ratio

LAYERS, WIDTH, BATCH = 48, 1024, 64
SAVED_TARGET = 0.8
"""Share of the gradients' bytes by which the peak is lower."""
IN_A_ROW = 5
"""Iterations of one side before the other's turn."""
TIME_TARGET = 1.03
"""Iteration against that of the plain optimizer, or of `LayerwiseLR` with the same rule."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "SGD momentum": lambda p: optim.SGD(p, lr=1e-6, momentum=0.9),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-6),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=1e-6, fused=True),
}
KINDS = ("plain", "in backward", "LayerwiseLR", "in backward, LayerAdaptive")


def deep() -> nn.Module:
    """Return 48 linear layers of 1024 x 1024: 50 million parameters, 201 MB."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    f"{LAYERS} x Linear({WIDTH}), batch {BATCH}": (deep, (BATCH, WIDTH)),
    "LeNet, batch 64": (lambda: LeNet(seed=0), (64, 1, 28, 28)),
}


def iteration(network: str, optimizer_name: str, kind: str) -> Callable[[], None]:
    """Return one training iteration."""
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    if kind == "LayerwiseLR":
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    elif kind != "plain":
        layerwise.step_in_backward(optimizer, model, LayerAdaptive() if "LayerAdaptive" in kind else None)
    inputs, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return run


@contextlib.contextmanager
def alone(network: str, optimizer_name: str, kind: str) -> Iterator[Callable[[], float]]:
    """Yield a function that runs a few iterations in a process of their own, and returns the median milliseconds.

    In one process the memory that one side has freed would serve the other one, which then meets fewer page faults than
    either meets alone: a tenth of the iteration.
    """
    command = [sys.executable, "-m", "benchmarks.backward", "--threads", str(torch.get_num_threads())]
    child = subprocess.Popen(
        [*command, "--on-demand", network, optimizer_name, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # the threads of the process that waits must not spin
    )

    def run() -> float:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    try:
        yield run
    finally:
        child.communicate()


def serve(network: str, optimizer_name: str, kind: str) -> None:
    """For each line that comes in, run some iterations and answer with the median of all but the first."""
    run = iteration(network, optimizer_name, kind)
    for _ in sys.stdin.buffer:
        times = []
        for _ in range(IN_A_ROW + 1):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        print(statistics.median(times[1:]), flush=True)


def peak(network: str, optimizer_name: str, kind: str, threads: int) -> int:
    """Return the most memory that a process of its own has held in three iterations, in bytes."""
    command = [sys.executable, "-m", "benchmarks.backward", "--threads", str(threads)]
    child = subprocess.run(
        [*command, "--peak", network, optimizer_name, kind], capture_output=True, text=True, check=True
    )
    return int(child.stdout)


def report_peak(network: str, optimizer_name: str, kind: str) -> None:
    """Train, and print the peak of this process: that of the kernel, which a parent's memory does not enter."""
    run = iteration(network, optimizer_name, kind)
    for _ in range(3):
        run()
    lines = Path("/proc/self/status").read_text().splitlines()
    print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


def show(rounds: int) -> dict[str, dict[str, float]]:
    """Print the tables and return their rows."""
    rows: dict[str, dict[str, float]] = {}
    network = next(iter(NETWORKS))
    gradients = sum(p.numel() * p.element_size() for p in deep().parameters())
    heading = f"peak, {network}, MB ({gradients / 1e6:.0f} of gradients)"
    print(f"\n{heading:<60}{'peak':>8}{'saved':>8}{'target':>8}")
    for name in OPTIMIZERS:
        peaks = {kind: peak(network, name, kind, torch.get_num_threads()) for kind in (KINDS[0], KINDS[1], KINDS[3])}
        for kind, most in peaks.items():
            saved = (peaks[KINDS[0]] - most) / gradients
            rows[f"peak, {name}, {kind}"] = {"peak": most, "saved": saved, "target": SAVED_TARGET}
            share = "" if kind == KINDS[0] else f"{saved:>8.1%}{SAVED_TARGET:>8.0%}"
            print(f"{f'{name}, {kind}':<60}{most / 1e6:>8.0f}{share}")
    print(f"\n{'one iteration':<60}{'ms':>8}{'with':>8}{'ratio':>7}  {'quartiles':<12}{'target':>6}")
    for number, network in enumerate(NETWORKS):
        print(network)
        for name in OPTIMIZERS:
            for before, kind in ((KINDS[0], KINDS[1]), (KINDS[2], KINDS[3])):
                with alone(network, name, before) as plain, alone(network, name, kind) as other:
                    row = ratio(plain, other, max(5, rounds // (1 if number else 3)))
                rows[f"{network}, {name}, {kind}"] = {**row, "target": TIME_TARGET}
                spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
                figures = f"{row['bare_ms']:>8.2f}{row['attached_ms']:>8.2f}{row['ratio']:>7.3f}"
                print(f"  {f'{name}: {kind} / {before}':<58}{figures}  {spread:<12}{TIME_TARGET:>6}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What stepping in backward saves and costs.")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--on-demand", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        report_peak(*arguments.peak)
    elif arguments.on_demand:
        serve(*arguments.on_demand)
    else:
        show(arguments.rounds)
