"""Calling a person's own code: with random numbers of its own, and with errors that point into its file."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import random
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.tasks import task_files
from layerwise.lab.training.trial import StoppedError


def seed_of(*words: object) -> int:
    """Give a seed from 0 to 2³² - 1, the range of NumPy's, that follows from words and numbers."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _states() -> list[Any]:
    """Give the states of the global generators."""
    states: list[Any] = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()]
    return [*states, torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else states


def _restore(states: list[Any]) -> None:
    """Put the global generators into states that ``_states`` gave."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
    if len(states) > 3:
        torch.cuda.set_rng_state_all(states[3])


class Stream:
    """Random numbers apart from all others: what is drawn inside goes on where the last time ended.

    Batches that draw from a stream of their epoch are the same whatever the training draws between them, so every arm
    sees the same batches, and a run that goes on in the middle of an epoch sees those that it would have seen.

    Args:
        seed: of the stream, from 0 to 2³² - 1.

    Example:
        >>> stream = Stream(1)
        >>> with stream:
        ...     first = torch.rand(2)
        >>> torch.manual_seed(1) is not None and bool((first == torch.rand(2)).all())
        True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: list[Any] | None = None
        self._outer: list[Any] = []

    def __enter__(self) -> Stream:
        self._outer = _states()
        if self._inner is None:
            seed_everything(self._seed)
        else:
            _restore(self._inner)
        return self

    def __exit__(self, *_: object) -> None:
        self._inner = _states()
        _restore(self._outer)


ORIGINAL = "Original Traceback (most recent call last):"
"""Line before the traceback of a loader's worker in the message of its error."""

PICKLED = (
    "A spawned worker of a loader receives the data set and the functions by pickle: define them at the top level of "
    "{}, without lambdas, and open files in the worker; or give the loader multiprocessing_context='fork' or "
    "num_workers=0"
)

LAYERWISE = os.path.realpath(Path(layerwise.__file__).parents[1])
"""The folder that this package is imported from."""


@lru_cache(maxsize=64)
def _importable(places: tuple[str, ...], hidden: tuple[str, ...]) -> list[str]:
    """Leave folders out of ``sys.path``, except those that installed packages added to it.

    What ``python -m``, PYTHONPATH or a program adds stands before the standard library; what the package of an editable
    installation adds stands after it.
    """
    library = sysconfig.get_path("stdlib")
    end = places.index(library) if library in places else len(places)
    folders = {os.path.realpath(folder) for folder in hidden}
    # An empty place is the working directory.
    kept = [place and (number > end or os.path.realpath(place) not in folders) for number, place in enumerate(places)]
    return [place for place, keep in zip(places, kept, strict=True) if keep]


@contextmanager
def only_installed(*hidden: str) -> Iterator[None]:
    """Let only installed modules be found, and none that merely lies in one of these folders.

    A change of such a module would go unnoticed, as only the person's file is fingerprinted.

    Args:
        *hidden: the folders.
    """
    before = list(sys.path)
    seen = _importable(tuple(before), hidden)
    sys.path[:] = [*seen, *task_files.folders]
    try:
        yield
    finally:
        # What the code inside added stays, before or after what was there.
        now, count = [place for place in sys.path if place not in task_files.folders], len(seen)
        start = next((start for start in range(len(now)) if now[start : start + count] == seen), None)
        if start is None:
            sys.path[:] = [place for place in before if place not in seen] + now
        else:
            sys.path[:] = now[:start] + before + now[start + count :]


@dataclass(frozen=True)
class Guest:
    """Whose code it is.

    Attributes:
        label: what messages call the file and its function.
        filename: of the file.
        copy: name of its copy, without the folder.
    """

    label: str
    filename: str = field(repr=False)
    copy: str = field(repr=False)

    @property
    def folders(self) -> tuple[str, ...]:
        """The file's own folder, and the working directory: where modules may lie that are not installed."""
        found = [os.path.dirname(self.filename)]
        with suppress(OSError):  # the working directory was removed
            found.append(os.getcwd())
        # A loader's worker, which is given this sys.path, needs layerwise.
        return tuple(folder for folder in found if os.path.realpath(folder) != LAYERWISE)

    def refuse(self, problem: str) -> UsageError:
        """Make the error that names the task and what is wrong with it."""
        return UsageError(f"{self.label}: {problem}")

    @contextmanager
    def at_work(self, doing: str) -> Iterator[None]:
        """Turn what the person's code raises into an error with the lines of their file alone.

        Modules that merely lie in the working directory or beside the file are not found meanwhile.

        Args:
            doing: what was called, for the message.

        Raises:
            UsageError: the code inside raised something; the first line says all, the lines of the file follow.
        """
        try:
            with only_installed(*self.folders):
                yield
        except (UsageError, StoppedError):
            raise
        except (Exception, SystemExit) as error:
            raise self.refuse(f"{doing} raised {self.described(error)}{self._beside(error)}") from error

    def _beside(self, error: BaseException) -> str:
        """Say why a module that a person sees was not found, or ""."""
        name = (getattr(error, "name", None) or "").partition(".")[0]
        places = [Path(folder) / file for folder in self.folders for file in (f"{name}.py", name)]
        beside = next((place for place in places if place.exists()), None)
        if not name or beside is None or not isinstance(error, ModuleNotFoundError):
            return ""
        own = Path(self.filename)
        where = "beside it" if beside.parent == own.parent else "in the working directory"
        return (
            f"\n{beside.name} lies {where}, but only {own.name} is read and fingerprinted: put the code into "
            f"{own.name}, or install {name} as a package, whose changes are then not noticed"
        )

    def described(self, error: BaseException) -> str:
        """Describe an exception in one line, and by the lines of the person's file that led to it."""
        words = str(error).strip()
        text = f"{type(error).__name__}: {words}".partition("\n")[0] if words else type(error).__name__
        frames = [
            (frame.lineno, frame.name, frame.line)
            for frame in traceback.extract_tb(error.__traceback__)
            if os.path.basename(frame.filename) == self.copy
        ]
        if ORIGINAL in words:  # a loader's worker raised it, and torch quotes its traceback
            text = words.splitlines()[-1]
            frames += re.findall(rf'^ *File ".*{self.copy}", line (\d+), in (.*)\n *(.*)', words, re.MULTILINE)
        text = text.replace(f"{task_files.__name__}.{Path(self.copy).stem}", Path(self.filename).name)
        if not frames:
            return text + self._of_workers(error)
        lines = [f'  File "{self.filename}", line {number}, in {name}\n    {line}' for number, name, line in frames]
        return "\n".join([f"{text} (line {frames[-1][0]})", *lines]) + self._of_workers(error)

    def _of_workers(self, error: BaseException) -> str:
        """Say why a loader's worker could not start, or ""."""
        words = str(error).lower()
        if isinstance(error, pickle.PicklingError) or "pickle" in words or "can't get local object" in words:
            return f"\n{PICKLED.format(Path(self.filename).name)}"
        return ""

    def takes(self, name: str, function: Any, *arguments: str) -> None:
        """Refuse what cannot be called with so many arguments.

        Args:
            name: of what was returned.
            function: the value.
            *arguments: what it is called with, in words.

        Raises:
            UsageError: it is no function, a class that was not called, or takes other arguments.
        """
        wanted = f"return a function of {' and '.join(arguments)}"
        if not callable(function):
            raise self.refuse(f"{name}={function!r:.80} is no function: {wanted}")
        if isinstance(function, type) and name not in ("optimizer", "scheduler"):
            raise self.refuse(f"{name} is the class {function.__name__}: {wanted}")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions written in C do not tell
            return
        try:
            signature.bind(*arguments)
        except TypeError:
            shown = getattr(function, "__name__", type(function).__name__)
            raise self.refuse(f"{name} is {shown}{signature}: {wanted}") from None


def reseeded(batches: Any, seed: int, epoch: int) -> Any:
    """Let the order of a loader follow from seed and epoch alone, as torch's distributed samplers do.

    A generator that was given to a loader goes on from epoch to epoch, so a run that goes on from a checkpoint would
    see other batches; it is seeded anew for each epoch. So are workers that a loader keeps: they begin anew.

    Args:
        batches: a loader, or anything else, which is left alone.
        seed: of the run.
        epoch: from 1.

    Returns:
        ``batches``.
    """
    if isinstance(batches, torch.utils.data.DataLoader):
        vars(batches)["persistent_workers"] = False  # as an attribute it is read-only
        samplers = [batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None)]
        for holder in (batches, *samplers):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed_of(seed, "generator", epoch))
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(epoch)  # type: ignore[union-attr]
    return batches


def moved(batch: Any, device: str) -> Any:
    """Put the tensors of a batch on a device: a tensor, what has a ``to``, or lists, tuples and dicts of them."""
    if isinstance(batch, torch.Tensor) or (hasattr(batch, "to") and callable(batch.to)):
        return batch.to(device)
    if isinstance(batch, dict):
        return type(batch)({name: moved(value, device) for name, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def same(one: Any, other: Any) -> bool:
    """Tell whether two batches are equal; what cannot be compared counts as equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(((one == other) | (one != one)).all())
    if isinstance(one, numpy.ndarray) and isinstance(other, numpy.ndarray):
        return bool(numpy.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other if isinstance(one, (str, int, float, bytes)) else True
