"""A user's own task: one function in one file, which gives model, batches, loss and metric. See docs/compare.md.

Only the file that is named is read. Its bytes travel to the workers, and every process imports a copy of them, so a
file that is changed while a comparison is at work changes nothing of it. What the file imports must be installed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import math
import multiprocessing
import operator
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

from layerwise.lab.errors import UsageError, nearest
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.store import LARGEST_JSON, read_bytes
from layerwise.lab.runs.values import Value, equal, is_plain, kind_of, like
from layerwise.lab.tasks.task_module import TaskModule
from layerwise.lab.training.engine import random_state, set_random_state, skipping
from layerwise.lab.training.trial import StoppedError, Trial

REQUIRED = ("model", "batches", "loss", "metric")
DEFAULT_EPOCHS = 5
DEFAULT_RATE, DEFAULT_MOMENTUM = 0.1, 0.9

TESTS = 10  # calls of the metric in a run that is counted in iterations, where the task does not say how often
RECORDS = 40  # records of the layers' norms that a run has about, if that is fewer than one in 50 updates
LARGEST_INTERVAL = 50

RESERVED = ("training_loss", "seconds", "validation", "factor", "rate")  # quantities that the lab records itself
DIRECTIONS = {"accuracy": True, "error": False, "loss": False, "perplexity": False}
"""Word in the name of a metric -> whether higher is better."""

_END = object()


@dataclass(kw_only=True)
class Task:
    """What a task function returns; a dict with the same names will do.

    Attributes:
        model: the network, on the CPU; the lab moves it.
        batches: function of the epoch (from 1) that gives the epoch's batches; or a loader or list of them.
        loss: function of model and batch that gives a scalar tensor.
        metric: function of the model that gives what the arms are judged by: a float, or a dict of name -> float whose
            first entry is judged. Called in evaluation mode and without gradients.
        optimizer: the base optimizer of the model's parameters, or a function that makes it, of the model if its
            argument is called ``model``, else of the list of trainable parameters. None for SGD with momentum 0.9 and
            the task's own ``lr``, or 0.1.
        scheduler: of the optimizer's rate, or a function of the optimizer that makes it, or None.
        schedule_unit: when ``scheduler.step`` is called: after each ``"epoch"`` or each ``"iteration"``.
        epochs: passes over the batches; 5 where iterations are not given either.
        iterations: updates, instead of epochs.
        test_every: updates between two calls of the metric; None for each epoch's end, or ten calls of a run that is
            counted in iterations.
        validation: function of the model that gives the metric on data of its own; tuning looks at nothing else.
        metric_name: of what is judged; None for the name in the dict, or that of the function.
        higher_is_better: which way is better; None where the name says it, as "accuracy", "error" and "loss" do.
    """

    model: nn.Module
    batches: Callable[[int], Iterable[Any]] | Iterable[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    metric: Callable[[Any], float | Mapping[str, float]]
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None
    scheduler: Any = None
    schedule_unit: str = "epoch"
    epochs: int | None = None
    iterations: int | None = None
    test_every: int | None = None
    validation: Callable[[Any], float] | None = None
    metric_name: str | None = None
    higher_is_better: bool | None = None

    @property
    def passes(self) -> int | None:
        """Epochs of a run, or None if it is counted in iterations."""
        return self.epochs if self.epochs is not None or self.iterations is not None else DEFAULT_EPOCHS


class Stream:
    """Random numbers apart from all others: what is drawn inside goes on where the last time ended.

    Batches that draw from a stream of their epoch are the same whatever the training draws between them, so every arm
    sees the same batches, and a run that goes on in the middle of an epoch sees those that it would have seen.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: dict[str, Any] | None = None

    def __enter__(self) -> Stream:
        self._outer = random_state()
        if self._inner is None:
            _seed_everything(self._seed)
        else:
            set_random_state(self._inner)
        return self

    def __exit__(self, *_: object) -> None:
        self._inner = random_state()
        set_random_state(self._outer)


def _seed_of(*words: object) -> int:
    """Give a seed from 0 to 2³² - 1, the range of NumPy's, that follows from words and numbers."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:4], "big")


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@dataclass(frozen=True, kw_only=True)
class TriedTask:
    """What one try of a task's parts, untrained and at seed 0, found."""

    trial: Trial
    metric: str  # name of what is judged, and its value
    value: float
    higher_is_better: bool
    has_validation: bool
    metric_seconds: float
    spawned: str = ""  # why a loader's workers, which are forked here, cannot be spawned

    @property
    def layers_every(self) -> int:
        """Updates between two records of the layers' norms."""
        total = self.trial.total
        return LARGEST_INTERVAL if total is None else min(LARGEST_INTERVAL, max(1, total // RECORDS))

    @property
    def tests(self) -> int:
        """Calls of the metric in a run."""
        trial = self.trial
        if trial.test_every is None or trial.total is None:
            return trial.epochs or 1
        return trial.total // trial.test_every + 1


@dataclass(frozen=True)
class TaskFile(TaskModule):
    """A task function and the file that it is in, as it was when it was read."""

    parameters: tuple[str, ...] = ()  # names of the function's own keyword parameters
    defaults: Mapping[str, Value] = field(default_factory=dict)  # of those whose default is plain
    open: bool = False  # it takes parameters of any name
    values: Mapping[str, Value] = field(default_factory=dict)  # of the parameters, where they are not the defaults
    length: int | None = None  # batches of an epoch, where a try has found it; for the progress alone

    @property
    def settings(self) -> dict[str, Value]:
        """Parameters with the values that they have, the default where no other is given."""
        return {**self.defaults, **self.values}

    def with_values(self, values: Mapping[str, Value]) -> TaskFile:
        """Lay other values over those that the task has; a value that is the parameter's default is left out."""
        merged = dict(self.values)
        for name, value in values.items():
            if name not in self.parameters and (not self.open or name == "seed"):
                raise self.refuse(
                    f"{name}={value!r} is no parameter of the function: its own are "
                    f"{', '.join(self.parameters) or 'none'}; add one with def {self.function}(seed, {name}=...)."
                    f"{nearest(name, self.parameters)}"
                )
            merged[name] = like(value, self.defaults.get(name))
            if not is_plain(merged[name]):
                raise self.refuse(f"{name}={value!r}: must be a finite number, a word, True, False or None")
            kind = kind_of(self.defaults.get(name))
            if kind and merged[name] is not None and kind_of(merged[name]) != kind:
                raise self.refuse(f"{name}={value!r}: must be {kind}, as its default {self.defaults[name]!r} is")
        # A value that is the default is the same run as without it.
        kept = {name: v for name, v in merged.items() if not (name in self.defaults and equal(v, self.defaults[name]))}
        return replace(self, values=kept)

    def configuration(self, *, layers_every: int = 50, measure: str = "metric") -> dict[str, Any]:
        """Give what identifies runs of this task, for ``Configuration.trial``; the path is no part of it."""
        about = {"task": self.sha256, "function": self.function, "values": dict(self.values)}
        return {**about, "layers_every": layers_every, "measure": measure}

    def import_function(self, copies: Path | None = None) -> Callable[..., Any]:
        """Import the file anew and give the function; ``copies`` as ``imported`` takes it."""
        module = self.imported(copies)
        function = getattr(module, self.function, None)
        if callable(function):
            return function
        functions = [value for value in vars(module).values() if inspect.isfunction(value)]
        names = [each.__name__ for each in functions if each.__module__ == module.__name__]
        own = " or ".join(f"{self.path.name}:{name}" for name in names if name[0].isalpha())
        remedy = f"use {own}" if own else "write def task(seed, lr=0.1), as docs/compare.md says"
        problem = f"has no function {self.function!r}" if self.function else "names no function"
        raise UsageError(f"{self.path.name} {problem}: {remedy}")

    def build(self, seed: int, copies: Path | None = None) -> Task:
        """Import the file and call the function, with the global generators of torch, Python and NumPy at the seed."""
        _seed_everything(seed)
        function = self.import_function(copies)
        _seed_everything(seed)  # whatever the file itself has drawn
        with self.running(f"{self.function}(seed={seed})"):
            returned = function(seed=seed, **self.values)
        task = _task_of(returned, self)
        _check(task, self)
        return task

    def trial(self, configuration: Configuration, device: str = "cpu", copies: Path | None = None) -> Trial:
        """Make what a run trains, ready for its first update."""
        about = configuration.trial
        if (about.get("task"), about.get("function")) != (self.sha256, self.function):
            raise self.refuse(f"task={about.get('task')!r}: the run is of another file; lay out its plan anew")
        chosen = replace(self, values=about["values"])
        parts = _Parts(chosen, chosen.build(configuration.seed, copies), configuration.seed, device)
        trial = parts.trial(about["layers_every"], about["measure"])
        _seed_everything(configuration.seed)
        return trial

    def tried(self, device: str = "cpu", *, validation: bool = False, spawned: bool = False) -> TriedTask:
        """Build the task at seed 0 and try each part, with the global generators left as they were.

        ``validation`` must be there if it is tried; ``spawned`` draws a batch in a spawned worker where the loader's
        are forked.
        """
        with Stream(0):
            return _Parts(self, self.build(0), 0, device).tried(validation=validation, spawned=spawned)


def load(file_and_function: str, values: Mapping[str, Value] | None = None) -> TaskFile:
    """Read the task ``"file.py:function"``, and see that its function is there."""
    place, colon, function = file_and_function.rpartition(":")
    if not colon or not function.isidentifier():
        place, function = file_and_function, ""
    path = Path(place).expanduser()
    try:
        source = read_bytes(path, LARGEST_JSON, links=True)
    except (OSError, UsageError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"task={file_and_function!r}: {reason}; give FILE:FUNCTION, as my_task.py:task") from None
    task_file = TaskFile(path.resolve(), function, source)
    with Stream(0):
        found = task_file.import_function()
    with task_file.running("its signature"):
        parameters = dict(inspect.signature(found).parameters)
    seed = parameters.pop("seed", None)
    if seed is None or seed.kind not in (seed.POSITIONAL_OR_KEYWORD, seed.KEYWORD_ONLY):
        raise task_file.refuse(f"does not take the seed: write def {function}(seed, lr=0.1)")
    own = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for name, parameter in own.items():
        if parameter.default is parameter.empty or parameter.kind is parameter.POSITIONAL_ONLY:
            raise task_file.refuse(f"parameter {name!r} has no default: write {name}=..., which --tune can change")
    return replace(
        task_file,
        parameters=tuple(own),
        defaults={name: p.default for name, p in own.items() if is_plain(p.default)},
        open=any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
    ).with_values(values or {})


def _task_of(returned: Any, file: TaskModule) -> Task:
    if isinstance(returned, Task):
        return returned
    if not isinstance(returned, Mapping):
        kind = "nothing" if returned is None else type(returned).__name__
        raise file.refuse(f"returned {kind}: return a layerwise.lab.Task or a dict with {', '.join(REQUIRED)}")
    known = [entry.name for entry in fields(Task)]
    unknown = [name for name in returned if name not in known]
    missing = [f"without {name!r}" for name in REQUIRED if name not in returned]
    if unknown or missing:
        words = ", ".join([*(f"with {name!r}" for name in unknown), *missing])
        hint = nearest(unknown[0], known) if unknown else ""
        raise file.refuse(f"returned a dict {words}: use the names {', '.join(known)}.{hint}")
    return Task(**returned)


def _check(task: Task, file: TaskModule) -> None:
    """Refuse a task with a part of the wrong kind; nothing is called."""
    model, batches = task.model, task.batches
    if not isinstance(model, nn.Module):
        raise file.refuse(f"model={model!r:.80}: return an instance of torch.nn.Module")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise file.refuse("model has lazy layers without weights yet: call it once on a batch before it is returned")
    if not _trained(model):
        raise file.refuse(f"model={type(model).__name__} has no parameters to train: return one that has")
    if isinstance(batches, Iterator):
        kind = f"batches is a {type(batches).__name__}, exhausted after one epoch"
        raise file.refuse(f"{kind}: return a list, a loader, or a function of the epoch that makes it anew")
    for name, given in (("loss", "model and batch"), ("metric", "the model"), ("validation", "the model")):
        part = getattr(task, name)
        if isinstance(part, type) or not (callable(part) or (name == "validation" and part is None)):
            raise file.refuse(f"{name}={part!r:.80}: return a function of {given}")
    for name in ("epochs", "iterations", "test_every"):
        value = getattr(task, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise file.refuse(f"{name}={value!r}: must be a whole number from 1")
    if task.epochs is not None and task.iterations is not None:
        raise file.refuse(f"epochs={task.epochs!r}, iterations={task.iterations!r}: return one of them")
    if task.schedule_unit not in ("epoch", "iteration"):
        raise file.refuse(f"schedule_unit={task.schedule_unit!r}: must be 'epoch' or 'iteration'")
    if not (task.metric_name is None or (isinstance(task.metric_name, str) and task.metric_name.strip())):
        raise file.refuse(f"metric_name={task.metric_name!r}: must be a word, such as 'test_error'")
    if not (task.higher_is_better is None or isinstance(task.higher_is_better, bool)):
        raise file.refuse(f"higher_is_better={task.higher_is_better!r}: must be True or False")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class _Parts:
    """The parts of one run's task: each is called with random numbers of its own, and what it gives is checked."""

    file: TaskFile
    task: Task
    seed: int
    device: str

    def trial(self, layers_every: int, measure: str) -> Trial:
        task = self.task
        task.model.to(self.device)
        optimizer = self.optimizer()
        every = task.test_every
        if every is None and task.iterations is not None:
            every = math.ceil(task.iterations / TESTS)
        return Trial(
            model=task.model,
            optimizer=optimizer,
            scheduler=self.scheduler(optimizer),
            schedule_unit=task.schedule_unit,
            batches=skipping(self.batches),
            loss=self.loss,
            evaluate=partial(self.evaluate, measure),
            iterations=task.iterations,
            epochs=task.passes,
            epoch_length=_length_of(task.batches) or self.file.length,
            test_every=every,
            layers_every=layers_every,
            factors_every=1,
            prepare=partial(moved, device=self.device),
        )

    def optimizer(self) -> torch.optim.Optimizer:
        refuse, optimizer, parameters = self.file.refuse, self.task.optimizer, _trained(self.task.model)
        if optimizer is None:
            rate: Any = self.file.settings.get("lr")
            rate = DEFAULT_RATE if rate is None else rate
            with self.file.running(f"torch.optim.SGD(lr={rate!r})"):
                return torch.optim.SGD(parameters, lr=rate, momentum=DEFAULT_MOMENTUM)
        if not isinstance(optimizer, torch.optim.Optimizer):
            with self.file.running("optimizer"):
                of_model = next(iter(inspect.signature(optimizer).parameters), "") == "model"
                optimizer = optimizer(self.task.model if of_model else parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise refuse(f"optimizer is {type(optimizer).__name__}: return a torch.optim.Optimizer or what makes one")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in parameters):
            raise refuse("optimizer holds no parameter of model: make it of model.parameters()")
        if any("lr" not in group for group in optimizer.param_groups):
            raise refuse(f"optimizer {type(optimizer).__name__} has no rate 'lr' in its parameter groups")
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        refuse, scheduler = self.file.refuse, self.task.scheduler
        if scheduler is None:
            return None
        if isinstance(scheduler, type) or not hasattr(scheduler, "step"):
            with self.file.running("scheduler(optimizer)"):
                scheduler = scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise refuse("scheduler ReduceLROnPlateau waits for a metric: return one that counts, as CosineAnnealingLR")
        if not all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict", "load_state_dict")):
            raise refuse(f"scheduler is {type(scheduler).__name__}: return one of torch.optim.lr_scheduler")
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise refuse("scheduler is of another optimizer: make it of the one that is returned")
        return scheduler

    def source(self, epoch: int) -> Iterable[Any]:
        """Give what the batches of an epoch are taken from, in an order that follows from seed and epoch alone.

        A generator that was given to a loader goes on from epoch to epoch, so a run that goes on from a checkpoint
        would see other batches; it is seeded anew for each epoch. Workers that a loader keeps begin anew too.
        """
        source: Any = self.task.batches
        if callable(source) and not isinstance(source, Iterable):
            source = source(epoch)
        if not isinstance(source, Iterable) or isinstance(source, (str, Mapping)):
            kind = type(source).__name__
            raise self.file.refuse(f"batches gives {kind}: return a list, a loader, or a function of the epoch")
        if isinstance(source, DataLoader):
            vars(source)["persistent_workers"] = False  # as an attribute it is read-only
            samplers = [source.sampler, source.batch_sampler, getattr(source.batch_sampler, "sampler", None)]
            for holder in (source, *samplers):
                generator = getattr(holder, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(_seed_of(self.seed, "generator", epoch))
                set_epoch = getattr(holder, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epoch)
        return source

    def batches(self, epoch: int) -> Iterator[Any]:
        """Give the batches of an epoch, from 1, with random numbers that follow from seed and epoch alone."""
        stream = Stream(_seed_of(self.seed, "epoch", epoch))
        with stream, self.file.running(f"batches of epoch {epoch}"):
            source = self.source(epoch)
            iterator = _begun(source)
        # A list draws nothing any more, and a stream takes 0.2 ms.
        drawing = nullcontext() if isinstance(source, (list, tuple)) else stream
        for count in itertools.count(1):
            with drawing, self.file.running(f"batch {count} of epoch {epoch}"):
                batch = next(iterator, _END)
            if batch is not _END:
                yield batch
            elif count > 1:
                return
            else:
                raise self.file.refuse(
                    f"batches has no batch in epoch {epoch}: return at least one, or a function that makes it anew"
                )

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        with self.file.running("loss(model, batch)"):
            value: Any = self.task.loss(model, batch)
        if not isinstance(value, torch.Tensor):
            raise self.file.refuse(f"loss returned {type(value).__name__}: return a scalar tensor")
        if value.numel() != 1:
            raise self.file.refuse(f"loss returned a tensor of shape {tuple(value.shape)}: return its .mean()")
        if not value.requires_grad:
            raise self.file.refuse("loss has no gradient: compute it of model(...), not detached nor under no_grad")
        return value.reshape(())

    def evaluate(self, measure: str, model: nn.Module, stop: Callable[[], bool]) -> dict[str, float]:
        if stop():
            raise StoppedError
        if measure == "validation":
            return {"validation": self.validation(model)}
        values = self.metric(model)
        judged = next(iter(values))
        # Beside the judged one, a number that is not finite is no sign of divergence: it is left out.
        return {name: value for name, value in values.items() if name == judged or math.isfinite(value)}

    def metric(self, model: nn.Module) -> dict[str, float]:
        """Call the metric: name -> number, the judged one first."""
        value = self._measured("metric", self.task.metric, model)
        if not isinstance(value, Mapping):
            own = getattr(self.task.metric, "__name__", "")
            name = self.task.metric_name or (own if own.isidentifier() else "metric")  # a lambda's is none
            values = {name: self._number("metric", value)}
        else:
            values = {str(name): self._number(f"metric[{name!r}]", entry) for name, entry in value.items()}
            first = self.task.metric_name or next(iter(values), "")
            if first not in values:
                held = ", ".join(map(repr, values)) or "nothing"
                raise self.file.refuse(f"metric returned a dict with {held}: it must hold {first or 'a number'!r}")
            values = {first: values[first], **values}
        for name in values:
            if name in RESERVED:
                raise self.file.refuse(f"metric {name!r} is a name that the lab uses itself: choose another")
        return values

    def validation(self, model: nn.Module) -> float:
        if self.task.validation is None:
            raise self.file.refuse(
                "has no validation, which --tune needs: return the metric on data that neither batches nor metric use"
            )
        return self._number("validation", self._measured("validation", self.task.validation, model))

    def _measured(self, name: str, function: Callable[[Any], Any], model: nn.Module) -> Any:
        """Call what measures the model: in evaluation mode, without gradients, and changing nothing of the training."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with Stream(_seed_of(self.seed, name)), torch.no_grad(), self.file.running(f"{name}(model)"):
                return function(model)
        finally:
            for module, training in modes:
                module.training = training

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise self.file.refuse(f"{name} returned {type(value).__name__}: return a float, as float(tensor)")
        return float(value)

    def tried(self, *, validation: bool, spawned: bool) -> TriedTask:
        """Try batches, loss and metric, so that mistakes are found before anything is trained."""
        task, refuse = self.task, self.file.refuse
        with Stream(_seed_of(0, "epoch", 1)), self.file.running("batches of epoch 1"):
            source = self.source(1)
        trial = self.trial(1, "metric")
        trial.epoch_length = length = _length_of(source)
        batch = next(iter(self.batches(1)))
        if not same(batch, next(iter(self.batches(1)))):
            raise refuse(
                "batches gives other batches when epoch 1 begins again, so no run could resume: draw from a global "
                "generator, which is seeded for each epoch, or make one inside of batches(epoch), of seed and epoch"
            )
        if (trial.epochs or 0) > 1 or (task.iterations is not None and length and length < task.iterations):
            next(iter(self.batches(2)))
        self.loss(trial.model, trial.prepare(batch))
        began = time.perf_counter()
        name, value = next(iter(self.metric(trial.model).items()))
        seconds = time.perf_counter() - began
        _check_finite(name, value, self.file)
        better, named = task.higher_is_better, {better for word, better in DIRECTIONS.items() if word in name.lower()}
        if better is None and len(named) != 1:
            raise refuse(f"higher_is_better is not given, and the name {name!r} does not say it: return True or False")
        if validation:
            _check_finite("validation", self.validation(trial.model), self.file)
        return TriedTask(
            trial=trial,
            metric=name,
            value=value,
            higher_is_better=named.pop() if better is None else better,
            has_validation=task.validation is not None,
            metric_seconds=seconds,
            spawned=self.spawned(source) if spawned else "",
        )

    def spawned(self, source: Iterable[Any]) -> str:
        """Draw a batch with a spawned worker where a loader's workers are forked; return the error, or ""."""
        if not isinstance(source, DataLoader) or not source.num_workers:
            return ""
        context: Any = source.multiprocessing_context or multiprocessing
        if context.get_start_method() != "fork":
            return ""
        loader = copy.copy(source)
        loader.num_workers, loader.multiprocessing_context = 1, "spawn"
        try:
            with Stream(_seed_of(0, "epoch", 1)), self.file.running("a batch of a spawned worker"):
                next(_begun(loader))
        except UsageError as error:
            return str(error)
        return ""


def _check_finite(name: str, value: float, file: TaskModule) -> None:
    if not math.isfinite(value):
        raise file.refuse(f"{name} is {value} of the untrained model: return a finite one; later it is divergence")


def _begun(source: Iterable[Any]) -> Iterator[Any]:
    """Begin to go through batches; an object that cannot be pickled raises here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Got pickle error")
        return iter(source)


def _length_of(batches: Any) -> int | None:
    """Give the number of batches of an epoch; None for a function and for a loader of a stream."""
    return operator.length_hint(batches) or None


def moved(batch: Any, device: str) -> Any:
    """Put what a batch holds on a device: tensors, and whatever else has a ``to``."""
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


def same(one: Any, other: Any) -> bool:
    """Tell whether two batches are equal; what cannot be compared counts as equal."""
    (leaves, form), (others, other_form) = tree_flatten(one), tree_flatten(other)
    return form == other_form and all(map(_equal, leaves, others))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (torch.Tensor, numpy.ndarray)):
        try:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return False
        return True
    return one == other if isinstance(one, (str, int, float, bytes)) else True
