"""One run of the amplification demo: an arm, a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

import torch
from torch.nn import functional

import layerwise
from layerwise.lab import cifar_recipe
from layerwise.lab.amplification import images
from layerwise.lab.data import Dataset
from layerwise.lab.data.augmentation import shuffled_batches
from layerwise.lab.evaluation import CHANCE_ERROR, MEMORY_FORMAT, StoppedError, measure_error
from layerwise.lab.models.resnet import ResNet
from layerwise.rules import PARAMS_1, AllLayers, Directionality, GradientAmplification, Phase, RandomLayers

ARMS = {
    "plain": "plain",
    "random": "random layers",
    "G": "layers by G",
    "G_prime": "layers by G′",
    "all": "every layer",
}
"""Arm -> its name in tables; each is of one training, whose gradients are doubled in some layers and epochs."""

MEASURED = ("G", "G_prime")
"""The arms that measure; the others leave the same epochs plain."""

THRESHOLD = 1.0
"""On z. Basodi et al. 2023, section 4, try 0.7 to 2.5 on simple networks. Of normal z, 16 % are above 1.0, which is 4
of the 25 layers here; above 1.5 there would be one or two."""

RANDOM_RATIO = 0.16
"""Share of the layers that the arm ``random`` takes: about that of the measured arms at THRESHOLD. The ratios of Basodi
et al. 2020 are not known."""

RECORD_FIELDS = frozenset({"accuracy", "training_loss", "share", "selections", "diverged_at", "seconds"})
"""What the record of a whole run holds."""

PROGRESS_EVERY = 10
"""Iterations between two messages."""


@dataclass(frozen=True)
class Protocol:
    """The network, the slice of data and the length of a run.

    Attributes:
        epochs: passes over the training images; the phases of PARAMS_1 and the rates are compressed to them.
        train_count: training images.
        test_count: test images.
        batch_size: images of a training batch.
        depth: of the residual network.
        width: channels of its first stage; the paper's have 64.
    """

    epochs: int = 15
    train_count: int = 2000
    test_count: int = 1000
    batch_size: int = 32
    depth: int = 10
    width: int = 8

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.train_count / self.batch_size)

    @property
    def iterations(self) -> int:
        """Updates of a run."""
        return self.epochs * self.batches

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of PARAMS_1 (Basodi et al. 2023, section 4), each end at its share of the epochs."""
        whole = PARAMS_1[-1].until
        return tuple(Phase(round(phase.until * self.epochs / whole), phase.amplify, phase.factor) for phase in PARAMS_1)

    @property
    def analysis_epochs(self) -> tuple[int, ...]:
        """The first epoch of each amplified phase: gradients are measured and nothing is amplified."""
        starts = [1, *(phase.until + 1 for phase in self.phases)]
        return tuple(start for start, phase in zip(starts, self.phases, strict=False) if phase.amplify)

    def recipe(self, weight_decay: float) -> cifar_recipe.Recipe:
        """Give the constants of the training: those of the CIFAR recipe, compressed."""
        full = cifar_recipe.Recipe(batch_size=self.batch_size, weight_decay=weight_decay)
        return cifar_recipe.compressed(full, self.epochs)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run is; two runs with equal fields give equal numbers.

    Attributes:
        dataset: name of the data set.
        arm: key of ``ARMS``.
        seed: of the initial weights, the order of the batches and their augmentation, the same in every arm; and
            of the draw of random layers.
        weight_decay: of the optimizer.
        protocol: network, data and length.
    """

    dataset: str
    arm: str
    seed: int
    weight_decay: float
    protocol: Protocol

    @property
    def name(self) -> str:
        """Name of the run and of its file, for example ``G_prime-seed0``."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        """Key of the run's record."""
        return self.arm, self.seed

    def rule(self) -> GradientAmplification | None:
        """Make the rule of the arm; None for ``plain``."""
        if self.arm == "plain":
            return None
        selections = {
            "random": lambda: RandomLayers(RANDOM_RATIO, seed=self.seed, after_analysis=True),
            "G": lambda: Directionality("G", THRESHOLD),
            "G_prime": lambda: Directionality("G_prime", THRESHOLD),
            "all": lambda: AllLayers(),
        }
        return GradientAmplification(selections[self.arm](), self.protocol.phases)

    def configuration(self) -> dict[str, object]:
        """Give everything that decides the numbers, as it is written to the run's file."""
        recipe = asdict(self.protocol.recipe(self.weight_decay))
        return {
            **asdict(self),
            "model": f"resnet{self.protocol.depth}",
            "rule": repr(self.rule()),
            "recipe": recipe | {"milestones": list(recipe["milestones"])},
        }


def _number(value: float) -> float | None:
    """Write what was not measured as None, as JSON has no NaN."""
    return value if math.isfinite(value) else None


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
        progress: called with the number of updates done, every ``PROGRESS_EVERY`` iterations.

    Returns:
        A record that JSON can hold: ``configuration``, ``accuracy`` (pairs of epoch and % of the test images),
        ``training_loss`` (pairs of epoch and mean loss), ``share`` (pairs of epoch and the share of layers whose
        factor was not 1 in its last step), ``selections`` (for each analysis epoch the choice made at its end:
        layer -> value, z, chosen), ``diverged_at`` (iteration of the first loss that was not finite, else None),
        ``started``, ``seconds``.

    Raises:
        StoppedError: ``stop`` said so; nothing of the run is kept.
    """
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    protocol = run.protocol
    model = ResNet(protocol.depth, run.seed, width=protocol.width, channels=dataset.train_images.shape[1])
    model = model.to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]
    optimizer, scheduler = cifar_recipe.build(model, protocol.recipe(run.weight_decay))
    rule = run.rule()
    adapter = None if rule is None else layerwise.LayerwiseLR(optimizer, rule, model)
    generator = torch.Generator().manual_seed(run.seed)
    accuracies: list[list[float]] = []
    losses: list[list[float]] = []
    shares: list[list[float]] = []
    selections: list[dict[str, object]] = []
    diverged_at = None
    done = 0
    for epoch in range(1, protocol.epochs + 1):
        recent: list[float] = []
        for index in shuffled_batches(len(dataset.train_labels), protocol.batch_size, generator):
            if stop():
                raise StoppedError
            inputs = images.to_train(dataset, index, generator).contiguous(memory_format=MEMORY_FORMAT)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), dataset.train_labels[index])
            recent.append(loss.item())
            if not math.isfinite(recent[-1]):
                diverged_at = done
                break
            loss.backward()
            optimizer.step()
            done += 1
            if done % PROGRESS_EVERY == 0:
                progress(done)
        if diverged_at is not None:
            break
        scheduler.step()
        losses.append([epoch, sum(recent) / len(recent)])
        error = measure_error(model, dataset, lambda raw: _inputs(dataset, raw), stop)
        accuracies.append([epoch, round(100.0 - error, 9)])  # without the dust of the subtraction
        if adapter is None:
            shares.append([epoch, 0.0])
            continue
        factors = adapter.get_last_factors().values()
        shares.append([epoch, sum(factor != 1.0 for factor in factors) / len(factors)])
        adapter.end_epoch()
        if epoch in protocol.analysis_epochs:
            choice = adapter.get_last_selection().items()
            layers = {name: [_number(row.value), _number(row.z), row.selected] for name, row in choice}
            selections.append({"epoch": epoch, "layers": layers})
    accuracies += [[epoch, 100.0 - CHANCE_ERROR] for epoch in range(len(accuracies) + 1, protocol.epochs + 1)]
    return {
        "configuration": run.configuration(),
        "accuracy": accuracies,
        "training_loss": losses,
        "share": shares,
        "selections": selections,
        "diverged_at": diverged_at,
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - clock,
    }


def _inputs(dataset: Dataset, raw: torch.Tensor) -> torch.Tensor:
    """Turn raw bytes into what the network reads."""
    return images.to_test(dataset, raw).contiguous(memory_format=MEMORY_FORMAT)
