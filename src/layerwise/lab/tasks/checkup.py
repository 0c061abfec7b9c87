"""A short training of a user's task with a monitor on every update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.tasks.findings import Finding, find
from layerwise.lab.tasks.layer_numbers import LayerNumbers, numbers_of
from layerwise.lab.tasks.task import Stream, TaskFile
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import StoppedError
from layerwise.layers import clean_name
from layerwise.sinks import Memory, Record

STEPS = 100
"""Updates of a checkup: after as many, faults of initialisation, rate and graph have shown."""

SECONDS = 30.0
"""After which a checkup ends earlier."""

MOST_STEPS = 100_000
"""A record of every update is kept in memory."""


@dataclass(frozen=True)
class Checkup:
    """What a short training showed.

    Attributes:
        records: of every update.
        losses: of every update.
        asked: updates that were to be done.
        seconds: that the training took.
        findings: what is wrong.
    """

    records: tuple[Record, ...]
    losses: tuple[float, ...]
    asked: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def layers(self) -> list[LayerNumbers]:
        """Medians of every layer."""
        return numbers_of(self.records)

    @property
    def words(self) -> str:
        """How much was trained."""
        count = len(self.records)
        early = f" of {self.asked}, as the time was up" if self.ended_early else ""
        return f"{count} update{'' if count == 1 else 's'}{early}, in {self.seconds:.1f} s"

    @property
    def ended_early(self) -> bool:
        """It was ended by the clock."""
        return len(self.records) < self.asked and all(map(math.isfinite, self.losses))


def check(steps: int, seconds: float) -> None:
    """Refuse a length that cannot be.

    Raises:
        UsageError: a number out of its range.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"steps={steps!r}: must be from 1 to {MOST_STEPS:,}; {STEPS} is the default")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"seconds={seconds!r}: must be finite and above 0; {SECONDS:g} is the default")


def train(
    task_file: TaskFile,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    device: str = "cpu",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Checkup:
    """Train a task as it is, without a rule, and look at every update; on one thread, as a run of a comparison is.

    Args:
        task_file: the task.
        steps: updates; fewer if the task's own run is shorter.
        seconds: after which it ends earlier.
        device: where the network is trained.
        advance: told of the updates done, and of how many there will be.

    Returns:
        What it showed.

    Raises:
        UsageError: the task cannot be used, or a length is out of its range.
    """
    check(steps, seconds)
    about = task_file.configuration(layers_every=MOST_STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Stream(0):
            trial = task_file.trial(Configuration(trial=about, rule=None), device)
            steps = min(steps, trial.total or steps)
            losses: list[torch.Tensor] = []
            own_loss = trial.loss

            def loss(model: nn.Module, batch: Any) -> torch.Tensor:
                value = own_loss(model, batch)
                losses.append(value.detach())
                return value

            # No test: only the layers are looked at.
            trial = replace(
                trial, loss=loss, evaluate=lambda model, stop: {}, iterations=steps, epochs=None, test_every=None
            )
            memory = Memory()
            monitor = layerwise.Monitor(trial.optimizer, trial.model, every=1, sinks=[memory])
            training = Training(trial, None, Configuration(trial=about, rule=None))
            began = time.perf_counter()

            def stop() -> bool:
                advance(training.position.iteration, steps)
                return training.position.iteration > 0 and time.perf_counter() - began > seconds

            try:
                training.run(stop)
            except StoppedError:
                pass
            finally:
                monitor.detach()
            took = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    return Checkup(
        records=tuple(memory.records),
        losses=tuple(torch.stack(losses).double().tolist()) if losses else (),
        asked=steps,
        seconds=took,
        findings=tuple(
            find(
                memory.records,
                diverged_at=training.diverged_at,
                frozen=frozen_layers(trial.model),
                ungiven=layers_without_gradient(trial.model),
            )
        ),
    )


def frozen_layers(model: nn.Module) -> list[str]:
    """Name the modules whose own parameters are all kept as they are."""
    return [
        clean_name(name)
        for name, module in model.named_modules()
        if (own := list(module.parameters(recurse=False))) and not any(p.requires_grad for p in own)
    ]


def layers_without_gradient(model: nn.Module) -> list[str]:
    """Name the modules to whose own parameters the last loss has given no gradient at all."""
    return [
        clean_name(name)
        for name, module in model.named_modules()
        if (own := list(module.parameters(recurse=False))) and all(p.grad is None for p in own)
    ]
