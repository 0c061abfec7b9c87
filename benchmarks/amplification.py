"""What gradient amplification costs: plain, amplified and analysis epochs, per training iteration."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.nn import functional as F

import layerwise
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.models.resnet import ResNet
from layerwise.rules import AllLayers, Directionality, GradientAmplification, Phase, RandomLayers

Row = dict[str, float]


def buffer_bytes(sums: dict[str, Any]) -> int:
    """Return the bytes that sums of gradients hold."""
    tensors = [value for value in sums.values() if isinstance(value, torch.Tensor)]
    parts = [value for value in sums.values() if isinstance(value, dict)]
    return sum(tensor.nbytes for tensor in tensors) + sum(map(buffer_bytes, parts))


def rule(selection: Any, *, amplified: bool = False) -> GradientAmplification:
    """Return a rule whose first epoch is plain, amplified, or one of analysis."""
    analysed = isinstance(selection, Directionality)
    return GradientAmplification(selection, [Phase(100, amplified or analysed)])


EPOCHS: list[tuple[str, float, Callable[[], GradientAmplification]]] = [
    ("plain epoch", 1.0, lambda: rule(AllLayers())),
    ("amplified epoch, 1/4 of the layers", 1.005, lambda: rule(RandomLayers(0.25), amplified=True)),
    ("amplified epoch, all layers", 1.005, lambda: rule(AllLayers(after_analysis=False), amplified=True)),
    ("analysis epoch, G", 1.02, lambda: rule(Directionality())),
    ("analysis epoch, G_prime", 1.03, lambda: rule(Directionality("G_prime"))),
    ("analysis epoch, G, sample=4096", 1.01, lambda: rule(Directionality(sample=4096))),
    ("analysis epoch, G_prime, sample=4096", 1.01, lambda: rule(Directionality("G_prime", sample=4096))),
]


class Training:
    """One network in training, whose iterations are timed as a whole and in their optimizer step.

    The rows of a table share the network and its gradients, so that memory and caches are the same for all: each has an
    optimizer of its own, and an adapter on it.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self.model = model
        self.images = images
        self.labels = torch.randint(0, 10, (len(images),))

    def optimizer(self, make: Callable[[], GradientAmplification] | None) -> tuple[optim.SGD, Any]:
        """Return an optimizer that hardly moves the weights, and its adapter."""
        optimizer = optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
        return optimizer, make and layerwise.LayerwiseLR(optimizer, make(), self.model)

    def backward(self) -> None:
        """Compute the gradients."""
        self.model.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()


def costs(training: Training, rounds: int) -> dict[str, Row]:
    """Time every kind of epoch in turn; the iteration's ratio follows from the steps, in which all the cost lies.

    An iteration of seconds varies by more than the cost. Its backward pass is the same for all rows, so the ratio is
    1 + (step attached − step bare) / iteration bare. The end of an epoch, once an epoch, is a column of its own.
    """
    arms = {"bare": training.optimizer(None), **{name: training.optimizer(make) for name, _, make in EPOCHS}}
    steps: dict[str, list[float]] = {name: [] for name in arms}
    whole: list[float] = []
    for round_ in range(rounds + 2):
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            training.backward()
            middle = time.perf_counter()
            arms[name][0].step()
            end = time.perf_counter()
            if round_ >= 2:
                steps[name].append(1000 * (end - middle))
                whole.append(1000 * (middle - start))
    bare = statistics.median(steps["bare"])
    iteration = statistics.median(whole) + bare
    parameters = sum(p.numel() * p.element_size() for p in training.model.parameters())
    rows = {}
    for name, target, _ in EPOCHS:
        extra = statistics.median(steps[name]) - bare
        memory = buffer_bytes(arms[name][1].state_dict()["state"]["sums"]) / parameters
        start = time.perf_counter()
        arms[name][1].end_epoch()
        rows[name] = {
            "end_of_epoch_ms": 1000 * (time.perf_counter() - start),
            "iteration_ms": iteration,
            "extra_ms": extra,
            "ratio": 1 + extra / iteration,
            "memory": memory,
            "target": target,
        }
    return rows


def networks() -> dict[str, tuple[Callable[[], Training], int]]:
    """Return the two networks, and how many rounds for one of the other benchmarks each gets."""
    return {
        "ResNet-18, batch 128": (lambda: Training(ResNet(18, seed=0), torch.randn(128, 3, 32, 32)), 1),
        "LeNet, batch 64": (lambda: Training(LeNet(seed=0), torch.rand(64, 1, 28, 28)), 20),
    }


def show(rounds: int) -> dict[str, Row]:
    """Print the table and return its rows."""
    result: dict[str, Row] = {}
    print(
        f"\n{'gradient amplification, one iteration':<41}{'ms':>8}{'more':>8}{'ratio':>7}"
        f"{'target':>7}{'memory':>8}{'end ms':>8}"
    )
    for network, (make, times) in networks().items():
        print(network)
        for name, row in costs(make(), max(3, rounds * times // 4)).items():
            target = 1.02 if network.startswith("LeNet") and name.startswith("amplified") else row["target"]
            figures = f"{row['iteration_ms']:>8.1f}{row['extra_ms']:>8.2f}{row['ratio']:>7.3f}{target:>7.3f}"
            print(f"  {name:<39}{figures}{row['memory']:>8.1%}{row['end_of_epoch_ms']:>8.1f}")
            result[f"{network}, {name}"] = {**row, "target": target}
    return result
