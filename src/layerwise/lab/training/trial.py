"""What a run trains: network, optimizer, batches, loss and measure, made from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab import data
from layerwise.lab.data import library, shifts, text
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.training import inputs, networks, solvers
from layerwise.lab.training.streams import FolderStream, MemoryStream, drawn, shortened, with_validation, without_first
from layerwise.lab.training.text_stream import TextStream

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Layouts of the convolutions. On one thread an iteration of LeNet takes 11 ms in the first, 20 ms in the second."""


MEASURES = {
    "test": ("test_error", "accuracy", "test_loss"),
    "validation": ("validation_error", "validation_accuracy", "validation_loss"),
}
"""What a classifier is measured on -> the names of its error, accuracy and loss there."""


class StoppedError(Exception):
    """The run was told to stop; what it did up to then is in its checkpoint."""


@dataclass
class Trial:
    """What the engine needs to train: of a recipe, or of a user's own task."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    schedule_unit: str  # when ``scheduler.step`` is called: "iteration" or "epoch"
    batches: Callable[[int, int], Iterator[Any]]  # epoch, from 1, and number of batches to leave out -> the batches
    loss: Callable[[nn.Module, Any], Any]  # -> the loss, or with a training metric the loss and the batch's metric
    evaluate: Callable[[nn.Module, Callable[[], bool]], dict[str, float]]  # asks whether to stop -> the quantities
    iterations: int | None  # updates of the run, or
    epochs: int | None  # its passes over the data
    epoch_length: int | None  # in batches; None where it is not known
    test_every: int | None  # in updates, the first test before the first one; None for each epoch's end
    layers_every: int  # updates between two records of each layer's norms
    factors_every: int  # updates between two records of each layer's factor
    training_metric: str = ""  # averaged over each epoch's examples
    prepare: Callable[[Any], Any] = lambda batch: batch  # puts a batch where the network reads it
    test_batches: int | None = None
    flush_denormal: bool = False
    whole: Callable[[int], int | None] = lambda number: None
    """Number of a batch in its epoch -> its examples, where ``batches`` gives only the part of this process."""

    @property
    def total(self) -> int | None:
        """Updates of the whole run, where that is known beforehand."""
        if self.iterations is not None:
            return self.iterations
        return None if self.epoch_length is None else self.epoch_length * (self.epochs or 0)


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """Compute the mean cross-entropy of a batch, in nats."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def next_symbol_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Compute the mean cross-entropy of the symbol that follows each, in nats."""
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def cross_entropy_and_accuracy(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean cross-entropy of a batch, in nats, and the accuracy on it, in %."""
    scores = model(batch[0])
    right = (scores.detach().argmax(1) == batch[1]).double().mean()
    return functional.cross_entropy(scores, batch[1]), 100.0 * right


Evaluation = Callable[[nn.Module, Callable[[], bool]], dict[str, float]]
"""Measures a network; asks whether to stop."""


def classification(
    tests: Callable[[], Iterator[Any]], prepare: Callable[[Any], Any], measured: str = "test"
) -> Evaluation:
    """Make a classifier's ``evaluate``: ``test_error`` and ``accuracy`` in %, ``test_loss`` in nats.

    On validation images they are called ``validation_error``, ``validation_accuracy`` and ``validation_loss``.
    """
    names = MEASURES[measured]

    def measure(model: nn.Module, batch: Any) -> tuple[float, int, int]:
        scores, labels = model(batch[0]), batch[1]
        loss = float(functional.cross_entropy(scores, labels, reduction="sum"))
        return loss, len(labels), int((scores.argmax(1) != labels).sum())

    def evaluate(model: nn.Module, stop: Callable[[], bool]) -> dict[str, float]:
        loss, count, wrong = _summed(measure, model, tests, prepare, stop)
        return dict(zip(names, (100.0 * wrong / count, 100.0 * (count - wrong) / count, loss / count), strict=True))

    return evaluate


def language_model(
    tests: Callable[[], Iterator[Any]], prepare: Callable[[Any], Any], measured: str = "test"
) -> Evaluation:
    """Make a language model's ``evaluate``: ``test_loss``, in nats a symbol; see ``classification``."""
    name = MEASURES[measured][2]

    def measure(model: nn.Module, batch: Any) -> tuple[float, int]:
        count = batch[1].numel()
        return float(next_symbol_loss(model, batch)) * count, count

    def evaluate(model: nn.Module, stop: Callable[[], bool]) -> dict[str, float]:
        loss, count = _summed(measure, model, tests, prepare, stop)
        return {name: loss / count}

    return evaluate


def _summed(
    measure: Callable[[nn.Module, Any], tuple[float, ...]],
    model: nn.Module,
    tests: Callable[[], Iterator[Any]],
    prepare: Callable[[Any], Any],
    stop: Callable[[], bool],
) -> list[float]:
    """Sum what is measured of each batch of the tests, with the network in evaluation mode."""
    found: list[tuple[float, ...]] = []
    model.eval()
    try:
        with torch.no_grad():
            for batch in tests():
                if stop():
                    raise StoppedError
                found.append(measure(model, prepare(batch)))
    finally:
        model.train()
    return list(map(sum, zip(*found, strict=True)))


def check(constants: Constants) -> None:
    """Refuse constants that no run can have, before any is begun."""
    data.known(constants.data)
    networks.check(constants.model, constants.width)
    solvers.check(constants)
    shifts.check(constants.shift)
    if constants.pretraining is not None:
        check(constants.pretraining)
    of_text = constants.model.startswith(networks.OF_TEXT)
    if constants.data == data.LIBRARY or of_text or constants.context is not None:
        _check_text(constants, of_text=of_text)
        return
    if constants.data != data.FOLDER:
        inputs.check(constants.inputs)
        return
    counts = constants.train_count, constants.test_count, constants.validation_count, constants.drawn_count
    others = constants.shift, constants.pretrained
    if (*counts, *others, constants.inputs, constants.order) != (*[None] * 6, "crops", "shuffled"):
        raise UsageError(
            "an image folder is read whole, shuffled, in crops: use inputs='crops' and order='shuffled', and leave "
            "train_count, test_count, validation_count, drawn_count, shift and pretrained out"
        )


def _check_text(constants: Constants, *, of_text: bool) -> None:
    """Refuse a text for a network of images, and the reverse."""
    read = constants.data == data.LIBRARY, of_text, constants.context is not None, constants.inputs == inputs.SYMBOLS
    if not all(read) or constants.order != "shuffled":
        raise UsageError(
            f"data={constants.data!r} with model={constants.model!r}, context={constants.context!r}, "
            f"inputs={constants.inputs!r}, order={constants.order!r}: a text is {data.LIBRARY!r} for a network whose "
            f"name begins with {networks.OF_TEXT!r}, with a context, inputs={inputs.SYMBOLS!r} and order='shuffled'"
        )
    others = ("train_count", "drawn_count", "shift", "pretrained")
    given = [name for name in others if getattr(constants, name) is not None]
    given += ["training_accuracy"] if constants.training_accuracy else []
    if given:
        raise UsageError(f"{given[0]} with data={constants.data!r}: a text takes none; leave it out")


@lru_cache(maxsize=1)
def _source(
    name: str,
    digest: str | None,
    train: int | None,
    test: int | None,
    validation: int | None,
    measured: str,
    before: int,
    shift: str | None,
    data_dir: Path | None,
) -> Any:
    """Read a data set once a process, shortened; open the image folder that the run was planned for, and no other."""
    if name == data.LIBRARY:
        found = library.load()
        if found.digest != digest:
            raise UsageError(
                f"data_digest={digest!r}, and the library of this Python has {found.digest!r}: use the Python that "
                "this run was planned with, or start the command again, which makes other runs of other text"
            )
        return found
    if name != data.FOLDER:
        whole = data.load(name, data_dir)
        classes = int(whole.train_labels.max()) + 1
        whole = with_validation(whole, validation, train, measure=measured == "validation")
        whole = without_first(whole, before, train or 0) if before else whole
        whole = shortened(whole, train, test if measured == "test" else None)
        return shifts.shifted(whole, shift, classes), classes
    folder = data.open_folder(data_dir)
    if folder.digest != digest:
        raise UsageError(
            f"data_digest={digest!r}, and the image folder in data-dir={str(data_dir)!r} has {folder.digest!r}: "
            "its files are not those that this run was planned for; start the command again, which makes other "
            "runs of other files, or give the folder that it had with --data-dir"
        )
    return folder


def _text_stream(source: library.Library, constants: Constants, how: Any) -> TextStream:
    """Make the stream of a text: windows to test of its last part, or of that for validation."""
    part, count = source.test, constants.test_count
    if constants.measured == "validation":
        part, count = source.validation, constants.validation_count
    assert constants.context is not None
    counts = {"test_count": count, "context": constants.context, "classes": text.SYMBOLS}
    return TextStream(train=source.train, test=part, **counts, **how)


def build(
    configuration: Configuration,
    data_dir: Path | None = None,
    device: str = "cpu",
    *,
    loaders: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Trial:
    """Make the trial of a recipe's run; ``share`` is rank and number of the processes that share it."""
    constants = configuration.constants
    cuda, memory_format = device.startswith("cuda"), MEMORY_FORMATS[constants.memory_format]
    wanted = constants.data, constants.data_digest, constants.train_count, constants.test_count
    before = 0 if constants.pretraining is None else constants.pretraining.train_count or 0
    kept = constants.validation_count, constants.measured, before, constants.shift
    source = _source(*wanted, *kept, data_dir)
    sizes = {"batch_size": constants.batch_size, "test_batch_size": constants.test_batch_size}
    how: Any = {**sizes, "seed": configuration.seed}
    stream: MemoryStream | FolderStream | TextStream
    if constants.data == data.LIBRARY:
        stream = _text_stream(source, constants, how)
    elif constants.data == data.FOLDER:
        stream = FolderStream(folder=source, loaders=loaders, pin=cuda, share=share, **how)
    else:
        dataset, classes = source
        dataset = drawn(dataset, constants.drawn_count, configuration.seed)
        form = {"form": constants.inputs, "order": constants.order}
        stream = MemoryStream(dataset=dataset, classes=classes, **form, **how)
    shape = {"classes": stream.classes, "channels": stream.channels}
    sizes = {"width": constants.width, "context": constants.context}
    model = networks.build(constants.model, configuration.seed, **shape, **sizes)
    model = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    if constants.compile:
        # A graph for each shape: one for all shapes would be compiled at another moment in a run that goes on.
        model.compile(dynamic=False)
    if cuda:  # convolutions use TF32 by PyTorch's default; float32 here is float32
        torch.set_float32_matmul_precision("high" if constants.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = constants.precision == "tf32"
    at_precision: Callable[[Any], Any] = lambda function: function  # noqa: E731
    if constants.precision == "bfloat16":
        at_precision = torch.autocast(torch.device(device).type, torch.bfloat16)
    optimizer, scheduler = solvers.build(constants, model)

    def prepare(batch: Any) -> Any:
        inputs, labels = batch
        inputs, labels = (each.to(device, non_blocking=cuda) for each in (inputs, labels))
        return inputs if inputs.ndim < 4 else inputs.contiguous(memory_format=memory_format), labels

    loss: Callable[[nn.Module, Any], Any] = next_symbol_loss
    evaluate = language_model
    if constants.data != data.LIBRARY:
        loss = cross_entropy_and_accuracy if constants.training_accuracy else cross_entropy
        evaluate = classification
    return Trial(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        schedule_unit=constants.policy_unit,
        batches=stream.batches,
        loss=at_precision(loss),
        training_metric="training_accuracy" if constants.training_accuracy else "",
        evaluate=at_precision(evaluate(stream.tests, prepare, constants.measured)),
        iterations=constants.iterations,
        epochs=constants.epochs,
        epoch_length=stream.epoch_length,
        test_every=constants.test_every,
        layers_every=constants.layers_every,
        factors_every=constants.factors_every,
        prepare=prepare,
        test_batches=stream.test_length,
        flush_denormal=constants.flush_denormal,
        whole=stream.whole,
    )
