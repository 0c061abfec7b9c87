"""One training run: a network, a solver, an arm, a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import torch
from torch.nn import functional

import layerwise
from layerwise.lab import solvers
from layerwise.lab.data import BATCH_SIZE, Dataset, pixels, training_batch
from layerwise.lab.evaluation import CHANCE_ERROR, MEMORY_FORMAT, StoppedError, measure_error
from layerwise.lab.models.lenet import LeNet

ARMS = {
    "plain": "plain",
    "layer-adaptive": "layer-adaptive",
    "control": "plain at the mean factor",
}
"""Arm -> its name in tables, in the order of a job: the control needs the factor of the arm before it."""

RECORD_FIELDS = frozenset({"test_error", "training_loss", "rates", "factor", "diverged_at", "seconds"})
"""What the record of a whole run holds."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run is; two runs with equal fields give equal numbers.

    Attributes:
        dataset: name of the data set.
        solver: key of ``solvers.SOLVERS``.
        arm: key of ``ARMS``.
        seed: of the initial weights. The batches are in file order, so they are the same for every seed.
        iterations: updates in all.
        record_at: numbers of updates after which the test error is measured.
        loss_every: iterations between two records of the training loss.
        rate_every: iterations between two records of the layers' factors and rates.
        rate_factor: multiplies the base rate; other than 1 only in the control.
    """

    dataset: str
    solver: str
    arm: str
    seed: int
    iterations: int
    record_at: tuple[int, ...]
    loss_every: int = 10
    rate_every: int = 5
    rate_factor: float = 1.0

    @property
    def name(self) -> str:
        """Name of the run and of its file, for example ``sgd-plain-seed0``."""
        return f"{self.solver}-{self.arm}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, str, int]:
        """Key of the run's record."""
        return self.solver, self.arm, self.seed

    def configuration(self) -> dict[str, object]:
        """Give everything that decides the numbers, as it is written to the run's file."""
        constants = {
            "model": "lenet",
            "rule": "LayerAdaptive()" if self.arm == "layer-adaptive" else None,
            "batch_size": BATCH_SIZE,
            "base_rate": solvers.BASE_RATE,
            "momentum": None if self.solver == "adagrad" else solvers.MOMENTUM,
            "weight_decay": solvers.WEIGHT_DECAY,
            "policy": f"inv gamma={solvers.GAMMA} power={solvers.POWER}",
            "bias_rate_multiplier": solvers.BIAS_RATE_MULTIPLIER,
        }
        return {**asdict(self), "record_at": list(self.record_at), **constants}


def _inputs(images: torch.Tensor) -> torch.Tensor:
    """Turn raw bytes into what the network reads."""
    return pixels(images).contiguous(memory_format=MEMORY_FORMAT)


class _FactorRecord:
    """Factors and rates of the layers: a sample now and then, and summaries over every iteration."""

    def __init__(self, layers: list[str]) -> None:
        self.iterations: list[int] = []
        self.rates: dict[str, list[float]] = {layer: [] for layer in layers}
        self.factors: dict[str, list[float]] = {layer: [] for layer in layers}
        self._low = dict.fromkeys(layers, math.inf)
        self._high = dict.fromkeys(layers, -math.inf)
        self._sum = dict.fromkeys(layers, 0.0)
        self._spread = 0.0
        self._count = 0

    def add(self, factors: dict[str, float]) -> None:
        """Count one iteration's factors; those of a diverging step (not finite) are left out."""
        if not all(math.isfinite(value) for value in factors.values()):
            return
        self._count += 1
        self._spread += max(factors.values()) / min(factors.values())
        for layer, value in factors.items():
            self._low[layer] = min(self._low[layer], value)
            self._high[layer] = max(self._high[layer], value)
            self._sum[layer] += value

    def sample(self, iteration: int, factors: dict[str, float], rates: dict[str, float]) -> None:
        """Keep the values of one iteration, unless they are those of a diverging step."""
        if not all(math.isfinite(value) for value in (*factors.values(), *rates.values())):
            return
        self.iterations.append(iteration)
        for layer, values in self.rates.items():
            values.append(rates[layer])
            self.factors[layer].append(factors[layer])

    def summary(self) -> dict[str, object]:
        """Give range and mean of each layer, the mean over layers and iterations, and the mean spread."""
        if not self._count:
            return {"layers": {}, "mean": 1.0, "spread": 1.0}
        layers = {
            layer: {
                "lowest": self._low[layer],
                "mean": self._sum[layer] / self._count,
                "highest": self._high[layer],
            }
            for layer in self.rates
        }
        mean = sum(self._sum.values()) / (self._count * len(self._sum))
        return {"layers": layers, "mean": mean, "spread": self._spread / self._count}


def train(
    run: Run,
    dataset: Dataset,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda iteration: None,
) -> dict[str, object]:
    """Do one run.

    Args:
        run: what to do.
        dataset: the data that ``run.dataset`` names.
        stop: asked once an iteration.
        progress: called with the number of updates done, every ``run.loss_every`` iterations.

    Returns:
        A record that JSON can hold: ``configuration``, ``test_error`` (pairs of iteration and %),
        ``training_loss`` (pairs of iteration and the mean loss of the batches since the pair before),
        ``rates`` (the layers' effective rate and factor; the base rate of a layer is that of its weight),
        ``factor`` (summary over every iteration), ``diverged_at`` (iteration of the first loss that was not
        finite, else None), ``started``, ``seconds``.

    Raises:
        StoppedError: ``stop`` said so; nothing of the run is kept.
    """
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    model = LeNet(run.seed).to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]
    optimizer, scheduler = solvers.build(run.solver, model, run.rate_factor)
    adapter = None
    if run.arm == "layer-adaptive":
        adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model)
    layers = [name for name, _ in model.named_children()]
    record = _FactorRecord(layers)
    errors: list[list[float]] = []
    losses: list[list[float]] = []
    recent: list[float] = []
    diverged_at = None
    for iteration in range(run.iterations):
        if stop():
            raise StoppedError
        images, labels = training_batch(dataset, iteration)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(_inputs(images)), labels)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            diverged_at = iteration
            break
        loss.backward()
        optimizer.step()
        if adapter is None:
            factors = dict.fromkeys(layers, 1.0)
            rates = dict.fromkeys(layers, optimizer.param_groups[0]["lr"])
        else:
            factors, rates = adapter.get_last_factors(), adapter.get_last_lr()
        scheduler.step()
        record.add(factors)
        done = iteration + 1
        if done % run.rate_every == 0:
            record.sample(done, factors, rates)
        if done % run.loss_every == 0:
            losses.append([done, sum(recent) / len(recent)])
            recent.clear()
            progress(done)
        if done in run.record_at:
            errors.append([done, measure_error(model, dataset, _inputs, stop)])
    recorded = {done for done, _ in errors}
    errors += [[done, CHANCE_ERROR] for done in run.record_at if done not in recorded]
    return {
        "configuration": run.configuration(),
        "test_error": errors,
        "training_loss": losses,
        "rates": {"iterations": record.iterations, "rate": record.rates, "factor": record.factors},
        "factor": record.summary(),
        "diverged_at": diverged_at,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
    }
