"""What attaching adds to a whole training iteration."""

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
from layerwise.lab.models.cifar_full import CifarFull
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.models.resnet import ResNet
from layerwise.lab.models.transformer import TransformerLanguageModel
from layerwise.rules import LayerAdaptive

from .timing import Row

Loss = Callable[[nn.Module], torch.Tensor]


def images(batch: int, channels: int, size: int) -> Loss:
    """Return the loss on a fixed batch of images."""
    inputs = torch.rand(batch, channels, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    return lambda model: F.cross_entropy(model(inputs), labels)


def tokens(batch: int, length: int, vocabulary: int) -> Loss:
    """Return the loss on a fixed batch of texts."""
    text = torch.randint(0, vocabulary, (batch, length + 1))
    return lambda model: F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def _sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=1e-6, fused=True)


CASES: list[tuple[str, float, Callable[[], nn.Module], Callable[[], Loss], Callable[[Any], optim.Optimizer], float]] = [
    # name, target, network, loss, optimizer, how many rounds for one of the other benchmarks
    ("LeNet, batch 64, SGD", 1.025, lambda: LeNet(seed=0), lambda: images(64, 1, 28), _sgd, 20),
    ("cifar10_full, batch 100, SGD", 1.01, lambda: CifarFull(0), lambda: images(100, 3, 32), _sgd, 5),
    ("ResNet-18, batch 128, SGD", 1.005, lambda: ResNet(18, seed=0), lambda: images(128, 3, 32), _sgd, 0.25),
    (
        "transformer of 6 blocks, width 256, batch 8 x 128, AdamW fused",
        1.01,
        lambda: TransformerLanguageModel(seed=0, vocabulary=1024, context=128, width=256, depth=6, heads=8),
        lambda: tokens(8, 128, 1024),
        _adamw,
        2,
    ),
]


def iteration_cost(make: Callable[[], nn.Module], loss: Loss, optimizer: Any, rounds: int) -> Row:
    """Time the steps of whole iterations, bare and attached in turn, in random order.

    The backward pass is the same for both and varies by more than the cost, so the ratio is 1 + (step attached − step
    bare) / (backward + step bare), of medians; the steps run where they run in training, with the caches as the
    backward pass leaves them. Two bare optimizers take part; the second's ratio says how far off such a ratio can be.
    """
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    arms = {name: optimizer(model.parameters()) for name in ("bare", "bare again", "attached")}
    layerwise.LayerwiseLR(arms["attached"], LayerAdaptive(), model)
    order = random.Random(0)
    steps: dict[str, list[float]] = {name: [] for name in arms}
    backward: list[float] = []
    for round_ in range(-3, rounds):
        for name in order.sample(list(arms), len(arms)):
            start = time.perf_counter()
            model.zero_grad()
            loss(model).backward()
            middle = time.perf_counter()
            arms[name].step()
            end = time.perf_counter()
            if round_ >= 0:
                steps[name].append(1000 * (end - middle))
                backward.append(1000 * (middle - start))
    bare, again, attached = (statistics.median(values) for values in steps.values())
    whole = statistics.median(backward) + bare
    return {
        "bare_ms": whole,
        "more_ms": attached - bare,
        "ratio": 1 + (attached - bare) / whole,
        "null_ratio": 1 + (again - bare) / whole,
    }


def measure(rounds: int) -> dict[str, Row]:
    """Print the table and return its rows."""
    rows: dict[str, Row] = {}
    print(f"\n{'whole iteration':<39}{'bare ms':>9}{'more ms':>9}{'ratio':>7}{'bare/bare':>11}{'target':>9}")
    for name, target, make, loss, optimizer, share in CASES:
        row = iteration_cost(make, loss(), optimizer, max(3, int(rounds * share)))
        rows[name] = {**row, "target": target}
        print(
            f"{name[:38]:<39}{row['bare_ms']:>9.2f}{row['more_ms']:>9.3f}{row['ratio']:>7.3f}"
            f"{row['null_ratio']:>11.4f}{target:>9.3f}",
            flush=True,
        )
    return rows
