"""A person's own task: one function in one file, which gives model, batches, loss and metric. See docs/compare.md.

Only the file that is named is read. Its bytes travel to the workers, and every process imports a copy of them, so a
file that is changed while a comparison is at work changes nothing of it. What the file imports must be installed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.lab.errors import UsageError, nearest
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.store import LARGEST_JSON, read_bytes
from layerwise.lab.runs.values import Value, equal, is_plain, kind_of, like
from layerwise.lab.tasks import hosting, looking, sources, task_files
from layerwise.lab.tasks.guests import Guest, Stream, seed_everything
from layerwise.lab.tasks.looking import Look
from layerwise.lab.training.trial import Trial

REQUIRED = ("model", "batches", "loss", "metric")
DEFAULT_EPOCHS = 5


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


def _checked(make: Callable[..., None]) -> Callable[..., None]:
    """Let a task that is made with other names than its fields say which they are."""

    @functools.wraps(make)
    def checked(self: Task, **given: Any) -> None:
        known = [entry.name for entry in fields(Task)]
        for name in given:
            if name not in known:
                raise TypeError(f"Task has no {name!r}: its names are {', '.join(known)}.{nearest(name, known)}")
        missing = [name for name in REQUIRED if name not in given]
        if missing:
            raise TypeError(f"Task needs {', '.join(missing)} too: give {', '.join(REQUIRED)}")
        make(self, **given)

    return checked


Task.__init__ = _checked(Task.__init__)


def _task_of(returned: Any, guest: Guest) -> Task:
    """Read what the function returned."""
    wanted = f"return a layerwise.lab.Task or a dict with {', '.join(REQUIRED)}"
    if isinstance(returned, Task):
        return returned
    if returned is None:
        raise guest.refuse(f"returned nothing: {wanted}")
    if not isinstance(returned, Mapping):
        raise guest.refuse(f"returned {type(returned).__name__}: {wanted}")
    known = [entry.name for entry in fields(Task)]
    unknown = [name for name in returned if name not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise guest.refuse(f"returned a dict with {unknown[0]!r}: use the names {', '.join(known)}.{hint}")
    missing = [name for name in REQUIRED if name not in returned]
    if missing:
        raise guest.refuse(f"returned a dict without {', '.join(map(repr, missing))}: {wanted}")
    return Task(**returned)


@dataclass(frozen=True)
class TaskFile:
    """A task function and the file that it is in, as it was when it was read.

    Attributes:
        path: of the file.
        function: its name.
        source: the file's bytes.
        parameters: names of the function's own keyword parameters.
        defaults: of those whose default is a number, a word, True, False or None.
        open: whether it takes parameters of any name.
        values: of the parameters, where they are not the defaults.
        length: batches of an epoch, where a look at the task has found it; for the progress alone.
    """

    path: Path
    function: str
    source: bytes = field(repr=False)
    parameters: tuple[str, ...] = ()
    defaults: Mapping[str, Value] = field(default_factory=dict)
    open: bool = False
    values: Mapping[str, Value] = field(default_factory=dict)
    length: int | None = None

    @property
    def label(self) -> str:
        """What messages and pages call it, without the folder."""
        return f"{self.path.name}:{self.function}"

    @property
    def sha256(self) -> str:
        """Checksum of the file, by which a changed file is another task."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def guest(self) -> Guest:
        """Whose code it is."""
        return Guest(self.label, str(self.path), f"{task_files.stem_of(self.source)}.py")

    def with_values(self, values: Mapping[str, Value]) -> TaskFile:
        """Give the same task with other values of its parameters, those of a parameter's default left out.

        Args:
            values: name -> number, word, True, False or None; laid over those that it has.

        Raises:
            UsageError: a name that is no parameter of the function, or a value that is none of these.
        """
        merged = dict(self.values)
        for name, value in values.items():
            if name not in self.parameters and (not self.open or name == "seed"):
                raise self.guest.refuse(
                    f"{name}={value!r} is no parameter of the function: its own are "
                    f"{', '.join(self.parameters) or 'none'}; add one with def {self.function}(seed, {name}=...)."
                    f"{nearest(name, self.parameters)}"
                )
            merged[name] = like(value, self.defaults.get(name))
            if not is_plain(merged[name]):
                raise self.guest.refuse(f"{name}={value!r}: must be a finite number, a word, True, False or None")
            kind = kind_of(self.defaults.get(name))
            if kind and merged[name] is not None and kind_of(merged[name]) != kind:
                raise self.guest.refuse(f"{name}={value!r}: must be {kind}, as its default {self.defaults[name]!r} is")
        # A value that is the default is the same run as without it.
        kept = {name: v for name, v in merged.items() if not (name in self.defaults and equal(v, self.defaults[name]))}
        return replace(self, values=kept)

    def settled(self, name: str) -> Value:
        """Give the value that a parameter has, its default where no other is given; None where there is none."""
        return {**self.defaults, **self.values}.get(name)

    def configuration(self, *, layers_every: int = 50, measure: str = "metric") -> dict[str, Any]:
        """Give what tells runs of this task from others, for ``Configuration.trial``; the path is no part of it.

        Args:
            layers_every: updates between two records of each layer's norms.
            measure: ``"metric"``, or ``"validation"`` for runs that never see the metric.
        """
        about = {"task": self.sha256, "function": self.function, "values": dict(self.values)}
        return {**about, "layers_every": layers_every, "measure": measure}

    def build(self, seed: int, copies: Path | None = None) -> Task:
        """Import the file and call the function, with the global generators of torch, Python and NumPy at the seed.

        Args:
            seed: of the run.
            copies: folder of the file's copy; None for one that ends with this process.

        Returns:
            The task, checked.

        Raises:
            UsageError: the code raised something, or what it returned cannot be used.
        """
        seed_everything(seed)
        function = self.found(copies)
        seed_everything(seed)  # whatever the file itself has drawn
        with self.guest.at_work(f"{self.function}(seed={seed})"):
            returned = function(seed=seed, **self.values)
        task = _task_of(returned, self.guest)
        hosting.check(task, self.guest)
        return task

    def trial(self, configuration: Configuration, device: str = "cpu", copies: Path | None = None) -> Trial:
        """Make what a run trains.

        Args:
            configuration: of the run; its ``trial`` is what ``configuration()`` gave.
            device: where the network is trained.
            copies: as ``build`` takes it.

        Returns:
            The trial, ready for its first update.

        Raises:
            UsageError: the task cannot be used, or the configuration is of another file.
        """
        about = configuration.trial
        if (about.get("task"), about.get("function")) != (self.sha256, self.function):
            raise self.guest.refuse(f"task={about.get('task')!r}: the run is of another file; lay out its plan anew")
        chosen = replace(self, values=about["values"])
        task = chosen.build(configuration.seed, copies)
        host = hosting.Host(self.guest, configuration.seed, device=device, rate=chosen.settled("lr"))
        trial = host.trial(task, layers_every=about["layers_every"], measure=about["measure"], length=self.length)
        seed_everything(configuration.seed)
        return trial

    def look(self, device: str = "cpu", *, validation: bool = False, spawned: bool = False) -> Look:
        """Build the task once, at seed 0, and try each part; the global generators are left as they were.

        Args:
            device: where the network is put.
            validation: whether ``validation`` is tried too.
            spawned: whether a batch is drawn by a spawned worker too, where the loader's are forked.

        Returns:
            What was found.

        Raises:
            UsageError: a part is not as it must be.
        """
        with Stream(0):
            host = hosting.Host(self.guest, 0, device=device, rate=self.settled("lr"))
            return looking.look(self.build(0), host, validation=validation, spawned=spawned)

    def found(self, copies: Path | None = None) -> Callable[..., Any]:
        """Import the file anew, so that no run leaves anything to the next, and give the function.

        Args:
            copies: as ``build`` takes it.

        Raises:
            OSError: the copy cannot be written.
            UsageError: the file raises something, or the function is not in it.
        """
        name = task_files.keep(self.source, self.path, copies)
        with self.guest.at_work("the file"):
            module = task_files.import_anew(name)
        function = getattr(module, self.function, None)
        if not callable(function):
            offered = sources.functions(self.path, self.source)
            raise UsageError(f"{self.path.name} has no function {self.function!r}: {offered}")
        return function


def load(file_and_function: str, values: Mapping[str, Value] | None = None) -> TaskFile:
    """Read a task, and see that its function is there.

    Args:
        file_and_function: ``"file.py:function"``.
        values: of the function's own parameters.

    Returns:
        The task.

    Raises:
        UsageError: not of this form, no such file or function, or the file cannot be executed.
    """
    place, colon, function = file_and_function.rpartition(":")
    if not colon or not function.isidentifier():
        place, function = file_and_function, ""
    path = Path(place).expanduser()
    try:
        source = read_bytes(path, LARGEST_JSON, links=True)
    except (OSError, UsageError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"task={file_and_function!r}: {reason}; give FILE:FUNCTION, as my_task.py:task") from None
    if not function:
        raise UsageError(f"task={file_and_function!r} names no function: {sources.functions(path, source)}")
    sources.check(path, source)
    task_file = TaskFile(path.resolve(), function, source)
    with Stream(0):
        own, taking_any = sources.parameters(task_file.found(), task_file.guest, function)
    defaults = {name: value for name, value in own.items() if is_plain(value)}
    return replace(task_file, parameters=tuple(own), defaults=defaults, open=taking_any).with_values(values or {})
