"""Making of a person's task what the engine trains: every part checked, and apart from the others' random numbers."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from layerwise.lab.tasks.guests import Guest, Stream, moved, reseeded, seed_of
from layerwise.lab.training.engine import skipping
from layerwise.lab.training.trial import StoppedError, Trial

if TYPE_CHECKING:
    from layerwise.lab.tasks.task import Task

DEFAULT_RATE, DEFAULT_MOMENTUM = 0.1, 0.9
TESTS = 10
"""Calls of the metric in a run that is counted in iterations, where the task does not say how often."""

RESERVED = ("training_loss", "seconds", "validation", "factor", "rate")
"""Quantities that the lab records itself."""

_END = object()


def check(task: Task, guest: Guest) -> None:
    """Refuse a task with a part of the wrong kind; nothing is called.

    Args:
        task: what was returned.
        guest: whose code it is.

    Raises:
        UsageError: what is wrong, and what to return instead.
    """
    _check_model(task.model, guest)
    batches = task.batches
    if isinstance(batches, Iterable) and not isinstance(batches, (str, bytes, Mapping)):
        if isinstance(batches, Iterator):
            raise guest.refuse(
                f"batches is a {type(batches).__name__}, which is exhausted after one epoch: return a list, a loader, "
                "or a function of the epoch that makes it anew"
            )
    elif callable(batches):
        guest.takes("batches", batches, "epoch")
    else:
        raise guest.refuse(f"batches={batches!r:.80}: return a list, a loader, or a function of the epoch")
    guest.takes("loss", task.loss, "model", "batch")
    guest.takes("metric", task.metric, "model")
    if task.validation is not None:
        guest.takes("validation", task.validation, "model")
    for name in ("epochs", "iterations", "test_every"):
        value = getattr(task, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise guest.refuse(f"{name}={value!r}: must be a whole number from 1")
    if task.epochs is not None and task.iterations is not None:
        raise guest.refuse(f"epochs={task.epochs!r}, iterations={task.iterations!r}: return one of them")
    if task.schedule_unit not in ("epoch", "iteration"):
        raise guest.refuse(f"schedule_unit={task.schedule_unit!r}: must be 'epoch' or 'iteration'")
    if not (task.metric_name is None or (isinstance(task.metric_name, str) and task.metric_name.strip())):
        raise guest.refuse(f"metric_name={task.metric_name!r}: must be a word, such as 'test_error'")
    if not (task.higher_is_better is None or isinstance(task.higher_is_better, bool)):
        raise guest.refuse(f"higher_is_better={task.higher_is_better!r}: must be True or False")


def _check_model(model: Any, guest: Guest) -> None:
    if isinstance(model, type):
        raise guest.refuse(f"model is the class {model.__name__}: return an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise guest.refuse(f"model is {type(model).__name__}: return a torch.nn.Module")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise guest.refuse("model has lazy layers without weights yet: call it once on a batch before it is returned")
    if not any(p.requires_grad for p in model.parameters()):
        raise guest.refuse(f"model={type(model).__name__} has no parameters to train: return one that has")


@dataclass(frozen=True)
class Host:
    """Takes the parts of one run's task.

    Attributes:
        guest: whose code it is.
        seed: of the run.
        device: where the network is trained.
        rate: of the optimizer that is made where the task has none; None for ``DEFAULT_RATE``.
    """

    guest: Guest
    seed: int
    device: str = "cpu"
    rate: Any = None

    def trial(self, task: Task, *, layers_every: int, measure: str = "metric", length: int | None = None) -> Trial:
        """Make the trial of a task.

        Args:
            task: checked.
            layers_every: updates between two records of each layer's norms.
            measure: ``"metric"`` or ``"validation"``, the only one that is called.
            length: batches of an epoch, where it is known.

        Returns:
            The trial.

        Raises:
            UsageError: optimizer or scheduler cannot be used.
        """
        task.model.to(self.device)
        optimizer = self.optimizer(task)
        scheduler = self._scheduler(task, optimizer)
        every = task.test_every
        if every is None and task.iterations is not None:
            every = math.ceil(task.iterations / TESTS)
        return Trial(
            model=task.model,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule_unit=task.schedule_unit,
            batches=skipping(partial(self.epoch, task.batches)),
            loss=partial(self.loss, task.loss),
            evaluate=partial(self._evaluate, task, measure),
            iterations=task.iterations,
            epochs=task.passes,
            epoch_length=length_of(task.batches) or length,
            test_every=every,
            layers_every=layers_every,
            factors_every=1,
            prepare=partial(moved, device=self.device),
        )

    def optimizer(self, task: Task) -> torch.optim.Optimizer:
        """Give the base optimizer: the task's, the one that its function makes, or SGD."""
        refuse, optimizer = self.guest.refuse, task.optimizer
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        if optimizer is None:
            rate = DEFAULT_RATE if self.rate is None else self.rate
            with self.guest.at_work(f"torch.optim.SGD(lr={rate!r})"):
                return torch.optim.SGD(parameters, lr=rate, momentum=DEFAULT_MOMENTUM)
        if not isinstance(optimizer, torch.optim.Optimizer):
            self.guest.takes("optimizer", optimizer, "parameters")
            takes_model = next(iter(_arguments(optimizer)), "") == "model"
            with self.guest.at_work("optimizer"):
                optimizer = optimizer(task.model if takes_model else parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise refuse(f"optimizer is {type(optimizer).__name__}: return a torch.optim.Optimizer or what makes one")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in parameters):
            raise refuse("optimizer holds no parameter of model: make it of model.parameters()")
        if any("lr" not in group for group in optimizer.param_groups):
            raise refuse(f"optimizer {type(optimizer).__name__} has no rate 'lr' in its parameter groups")
        return optimizer

    def _scheduler(self, task: Task, optimizer: torch.optim.Optimizer) -> Any:
        scheduler = task.scheduler
        if scheduler is None:
            return None
        if isinstance(scheduler, type) or not hasattr(scheduler, "step"):
            self.guest.takes("scheduler", scheduler, "optimizer")
            with self.guest.at_work("scheduler"):
                scheduler = scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise self.guest.refuse(
                "scheduler ReduceLROnPlateau waits for a metric, so each arm would have a schedule of its own: return "
                "one that counts, such as CosineAnnealingLR"
            )
        if not all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")):
            raise self.guest.refuse(f"scheduler is {type(scheduler).__name__}: return one of torch.optim.lr_scheduler")
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise self.guest.refuse("scheduler is of another optimizer: make it of the one that is returned")
        return scheduler

    def source(self, batches: Any, number: int) -> Iterable[Any]:
        """Give what an epoch's batches are taken from; to be called in the epoch's stream of random numbers."""
        source = batches if isinstance(batches, Iterable) else batches(number)
        if not isinstance(source, Iterable):
            raise self.guest.refuse(f"batches({number}) returned {type(source).__name__}: return a list or a loader")
        return reseeded(source, self.seed, number)

    def begun(self, source: Iterable[Any]) -> Iterator[Any]:
        """Begin to go through batches; an object that cannot be pickled raises here."""
        if not getattr(source, "num_workers", 0):
            return iter(source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got pickle error")
            return iter(source)

    def epoch(self, batches: Any, number: int) -> Iterator[Any]:
        """Give the batches of an epoch, with random numbers that follow from seed and epoch alone.

        Args:
            batches: as the task returned it.
            number: of the epoch, from 1.

        Yields:
            The batches.

        Raises:
            UsageError: there is none, or the person's code raised something.
        """
        guest, stream = self.guest, Stream(seed_of(self.seed, "epoch", number))
        with stream, guest.at_work(f"batches of epoch {number}"):
            source = self.source(batches, number)
            iterator, count = self.begun(source), 0
        if isinstance(source, (list, tuple)):  # nothing is drawn any more, and a stream takes 0.2 ms
            yield from source
            count = len(source)
        while not isinstance(source, (list, tuple)):
            with stream, guest.at_work(f"batch {count + 1} of epoch {number}"):
                batch = next(iterator, _END)
            if batch is _END:
                break
            count += 1
            yield batch
        if count == 0:
            raise guest.refuse(
                f"batches has no batch in epoch {number}: return a list or a loader with at least one batch, or a "
                "function of the epoch that makes it anew"
            )

    def loss(self, function: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> torch.Tensor:
        """Compute the loss of a batch, and refuse what cannot be minimised."""
        with self.guest.at_work("loss"):
            value = function(model, batch)
        if not isinstance(value, torch.Tensor):
            raise self.guest.refuse(f"loss returned {type(value).__name__}: return a scalar tensor")
        if value.numel() != 1:
            raise self.guest.refuse(f"loss returned a tensor of shape {tuple(value.shape)}: return its .mean()")
        if not value.requires_grad:
            raise self.guest.refuse("loss has no gradient: compute it of model(...), not detached nor under no_grad")
        return value.reshape(())

    def _evaluate(self, task: Task, measure: str, model: nn.Module, stop: Callable[[], bool]) -> dict[str, float]:
        """Call the metric, or validation alone."""
        if stop():
            raise StoppedError
        if measure == "validation":
            return {"validation": self.validation(task, model)}
        values = self.metric(task, model)
        judged = next(iter(values))
        # Beside the judged one, a number that is not finite is no sign of divergence: it is left out.
        return {name: value for name, value in values.items() if name == judged or math.isfinite(value)}

    def metric(self, task: Task, model: nn.Module) -> dict[str, float]:
        """Call the metric: name -> number, the judged one first."""
        value = self._measured("metric", task.metric, model)
        if not isinstance(value, Mapping):
            name = task.metric_name or _name_of(task.metric)
            values = {name: self._number("metric", value)}
        else:
            values = {str(name): self._number(f"metric[{name!r}]", entry) for name, entry in value.items()}
            first = task.metric_name or next(iter(values), "")
            if first not in values:
                raise self.guest.refuse(
                    f"metric returned a dict with {', '.join(map(repr, values)) or 'nothing'}: it must hold "
                    f"{first or 'what is judged'!r}"
                )
            values = {first: values[first], **values}
        for name in values:
            if name in RESERVED:
                raise self.guest.refuse(f"metric {name!r} is a name that the lab uses itself: choose another")
        return values

    def validation(self, task: Task, model: nn.Module) -> float:
        """Call validation."""
        if task.validation is None:
            raise self.guest.refuse(
                "has no validation, which --tune needs: return validation, a function of the model that gives the "
                "metric on data that neither batches nor metric use"
            )
        return self._number("validation", self._measured("validation", task.validation, model))

    def _measured(self, name: str, function: Callable[[Any], Any], model: nn.Module) -> Any:
        """Call what measures the model: in evaluation mode, without gradients, and changing nothing of the training."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with Stream(seed_of(self.seed, name)), torch.no_grad(), self.guest.at_work(name):
                return function(model)
        finally:
            for module, training in modes:
                module.training = training

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, torch.Tensor):
            raise self.guest.refuse(f"{name} returned a tensor of shape {tuple(value.shape)}: return float(...) of one")
        if not isinstance(value, Real) or isinstance(value, bool):
            raise self.guest.refuse(f"{name} returned {type(value).__name__}: return a float")
        return float(value)


def length_of(batches: Any) -> int | None:
    """Give the number of batches of an epoch where they tell it."""
    try:
        return len(batches)
    except TypeError:  # a function, or a loader of a stream
        return None


def _arguments(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _name_of(function: Any) -> str:
    """Give the name of a function, "metric" where it has none of its own."""
    name = getattr(function, "__name__", "metric")
    return name if name.isidentifier() else "metric"
