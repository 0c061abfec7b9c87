"""What a monitor costs: a training iteration of LeNet, and one optimizer step on ResNet-50's parameters."""

from __future__ import annotations

import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.nn import functional as F

from layerwise import LayerwiseLR, Monitor, sinks
from layerwise.lab.models.lenet import LeNet
from layerwise.rules import LayerAdaptive

from .networks import resnet50_parameters

EVERY = 50
TARGET = 1.01
"""Of a whole iteration of LeNet, at a record each 50 steps."""


def outlets(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield the sinks whose packages are installed."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("WANDB_SILENT", "true")
    makers: dict[str, Callable[[], Any]] = {
        "JSONL": lambda: sinks.JSONL(folder / "layers.jsonl"),
        "Parquet": lambda: sinks.Parquet(folder / "layers"),
        "TensorBoard": lambda: sinks.TensorBoard(folder / "events"),
        "W&B, offline": lambda: sinks.WandB(mode="offline", dir=folder, project="benchmark"),
        "MLflow, folder": lambda: sinks.MLflow(tracking_uri=(folder / "mlruns").as_uri()),
    }
    yield "monitor alone", []
    for name, make in makers.items():
        try:
            yield name, [make()]
        except ImportError as error:
            print(f"  {name:<37} left out: {error}")


def costs(
    model: nn.Module, backward: Callable[[], None], folder: Path, rounds: int, *, every_sink: bool
) -> dict[str, dict[str, float]]:
    """Time steps bare, watched and recorded, in turn and in random order.

    Every second step of the monitors is recorded here, so that both kinds are seen often; the ratio is that of a record
    each `EVERY` steps. An iteration varies by more than the cost, and all of the cost lies in the step.
    """
    arms: dict[str, tuple[optim.Optimizer, Monitor | None]] = {"bare": (_optimizer(model), None)}
    for name, outlet in outlets(folder):
        if every_sink or not outlet:
            optimizer = _optimizer(model)
            arms[name] = optimizer, Monitor(optimizer, model, every=2, sinks=outlet)
    for name, watched in (("adapter", False), ("adapter and monitor", True)):
        optimizer = _optimizer(model)
        LayerwiseLR(optimizer, LayerAdaptive(), model)
        arms[name] = optimizer, Monitor(optimizer, model, every=2) if watched else None
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in arms}
    whole: list[float] = []
    for round_ in range(-4, rounds - rounds % 2):
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            backward()
            middle = time.perf_counter()
            arms[name][0].step()
            end = time.perf_counter()
            if round_ >= 0:
                times[name][round_ % 2].append(1000 * (end - middle))
                whole.append(1000 * (middle - start))
    for _, monitor in arms.values():
        if monitor is not None:
            monitor.detach()
    median = {name: [statistics.median(values) for values in both] for name, both in times.items()}
    rows = {}
    for name in arms:
        if arms[name][1] is None:
            continue
        bare = statistics.median(chain(*times["adapter" if name.startswith("adapter") else "bare"]))
        plain, recorded = (value - bare for value in median[name])
        rows[name] = {"iteration_ms": statistics.median(whole) + bare, "plain_ms": plain, "record_ms": recorded}
        extra = (recorded + (EVERY - 1) * plain) / EVERY
        rows[name]["ratio"] = 1 + extra / rows[name]["iteration_ms"]
    return rows


def _optimizer(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)


def show(rounds: int) -> dict[str, dict[str, float]]:
    """Print the table and return its rows."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    print(f"\n{f'monitor, every={EVERY}':<39}{'ms':>8}{'step ms':>10}{'record ms':>11}{'ratio':>8}{'target':>8}")
    lenet, images, labels = LeNet(seed=0), torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))

    def backward() -> None:
        lenet.zero_grad()
        F.cross_entropy(lenet(images), labels).backward()

    result: dict[str, dict[str, float]] = {}
    networks: list[tuple[str, nn.Module, Callable[[], None], int, float | None]] = [
        ("LeNet, batch 64, whole iteration", lenet, backward, 10 * rounds, TARGET),
        ("ResNet-50 (161 tensors), one step", resnet50_parameters(), lambda: None, rounds, None),
    ]
    for network, model, compute, times, target in networks:
        print(network)
        with tempfile.TemporaryDirectory() as folder:
            rows = costs(model, compute, Path(folder), times, every_sink=target is not None)
        for name, row in rows.items():
            figures = (
                f"{row['iteration_ms']:>8.2f}{row['plain_ms']:>10.3f}{row['record_ms']:>11.3f}{row['ratio']:>8.4f}"
            )
            print(f"  {name:<37}{figures}{'' if target is None else f'{target:.2f}':>8}")
            result[f"{network}, monitor, {name}"] = {**row, **({} if target is None else {"target": target})}
    return result
