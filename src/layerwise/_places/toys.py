"""Copies of an optimizer (twins) on a few small toy parameters, for trials that leave the real ones alone."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import random
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .._tensors import several_processes, slots_of
from .._writes import ScaledWrites
from ..apply import can_change

LARGEST = 2**16
"""The most elements that a tensor of a twin may have: copying larger ones would cost memory."""
SIDE = 4
"""The largest size of a toy in each dimension."""
WIDE = 64
"""The largest size of a wide toy in its first two dimensions: some steps join only matrices above a size."""
MOST_GROUPS = 16
"""The number of a twin's groups, where the optimizer has more."""
RATE = 0.01
"""The largest learning rate of a twin's groups; the other rates keep their ratio to it."""
COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


class CannotTryError(Exception):
    """An optimizer cannot be tried, for the reason given."""


class CommunicatesError(Exception):
    """A step starts to communicate with other processes."""

    def __init__(self, group: Any) -> None:
        super().__init__("its step communicates")
        self.group = group


class Guard(TorchDispatchMode):
    """Raises before a twin's step communicates, or touches the real weights.

    Args:
        real: The real weights.
    """

    def __init__(self, real: Sequence[Tensor]) -> None:
        super().__init__()
        self._real = {storage for t in real if (storage := _storage(t)) is not None}
        self.several = several_processes()
        self.stopped: Exception | None = None

    def look_at(self, tensor: Tensor) -> None:
        """Raise if a tensor is large or shares memory with the real weights."""
        if tensor.numel() > LARGEST:
            self.stop(CannotTryError("it holds large tensors of its own"))
        if _storage(tensor) in self._real:
            self.stop(CannotTryError("it reaches its parameters other than through its parameter groups"))

    def stop(self, reason: Exception) -> None:
        """Raise the reason, and keep it."""
        self.stopped = reason  # the step may catch what is raised here
        raise reason


def _look_at_operation(self: Guard, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Look at the operation before it runs."""
    kwargs = kwargs or {}
    if self.several and func.namespace in COLLECTIVES:
        self.stop(CommunicatesError(_process_group(args)))
    for value in (*args, *kwargs.values()):
        for tensor in cast(Any, value if isinstance(value, (list, tuple)) else (value,)):
            if isinstance(tensor, Tensor):
                self.look_at(tensor)
    return func(*args, **kwargs)


# Defined outside the class, where PyTorch would wrap it and import the compiler, which takes seconds.
Guard.__torch_dispatch__ = cast(Any, _look_at_operation)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except Exception:  # a tensor subclass without one storage
        return None


def _process_group(args: Any) -> Any:
    """Return the process group among the arguments of a collective; None for the default one."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            with contextlib.suppress(Exception):
                return torch.distributed.ProcessGroup.unbox(cast(Any, value))
    return None


class Workshop:
    """Makes twins of an optimizer, all with equal toy parameters and gradients.

    Args:
        optimizer: The optimizer, which is only read.
        dtype: The type of floating-point toys; None keeps that of each parameter.
        construct: Whether twins are built by the constructor, as state that it makes requires, and not by copying.
        way: How steps are called: `"plain"`, with a `"closure"`, or after a backward pass that creates a `"graph"`.
        side: The largest size of a toy in its first two dimensions.
    """

    def __init__(
        self, optimizer: Optimizer, dtype: torch.dtype | None, *, construct: bool, way: str, side: int = SIDE
    ) -> None:
        self.optimizer, self.construct, self.way, self._dtype = optimizer, construct, way, dtype
        sizes = [min(side, *p.shape[:2]) for p in parameters_of(optimizer) if p.ndim]
        self.side = max([SIDE, *sizes])
        self._numbers = _representatives(optimizer.param_groups)
        self._sources = groups = [optimizer.param_groups[number] for number in self._numbers]
        most = SIDE if len(groups) <= 8 else 2
        self._positions = [_chosen(group["params"], most) for group in groups]
        self.real = [group["params"][i] for group, found in zip(groups, self._positions, strict=True) for i in found]
        self._generator = torch.Generator().manual_seed(0)
        self._start = [self._values(p) for p in self.real]
        self._gradients: list[list[Tensor | None]] = []
        self._copies = self._find_copies()
        rates = [float(rate) for group in groups if (rate := group.get("lr")) is not None]
        self._scale = RATE / max(map(abs, rates), default=1.0) if any(rates) else None

    def _values(self, p: Tensor, *, zero_mean: bool = False) -> Tensor:
        """Return random values of a toy's shape."""
        drawn = torch.randn(_toy_shape(p, self.side), generator=self._generator, dtype=torch.float64, device="cpu")
        if zero_mean and drawn.numel() > 1:
            drawn -= drawn.mean()
        return drawn.to(device="cpu" if p.device.type == "meta" else p.device, dtype=self._kept(p.dtype))

    def _kept(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of the toys that hold real or complex numbers."""
        return {t.dtype for t in self._start if t.is_floating_point() or t.is_complex()}

    def _gradients_at(self, step: int) -> list[Tensor | None]:
        """Return the toys' gradients at a step. Their mean is zero, so they are orthogonal to a shift."""
        while len(self._gradients) <= step:
            self._gradients.append(
                [0.1 * self._values(p, zero_mean=True) if p.requires_grad else None for p in self.real]
            )
        return self._gradients[step]

    def twin(self, *, decay: bool) -> tuple[Any, list[Tensor]]:
        """Return a new twin and its toys.

        Args:
            decay: Whether weight decay is on.
        """
        toys: list[Any] = []
        for p, start in zip(self.real, self._start, strict=True):
            toy: Any = nn.Parameter(start.clone(), requires_grad=p.requires_grad)
            marks = {name: mark for name, mark in p.__dict__.items() if isinstance(mark, (bool, int, float, str))}
            toy.__dict__.update(marks)
            toys.append(toy)
        groups = self._groups(toys, decay)
        made = self._constructed(groups) if self.construct else self._copied(groups, toys)
        if callable(getattr(made, "train", None)):  # schedule-free optimizers step in this mode only
            made.train()
        return made, toys

    def step(
        self, twin: Any, toys: Sequence[Tensor], number: int, gradient: float, writes: Sequence[float] | None
    ) -> None:
        """Take a step of a twin.

        Args:
            twin: The twin.
            toys: Its parameters.
            number: The number of the step, which determines its gradients and random numbers.
            gradient: A factor on the gradients.
            writes: Factors of the toys, by which what the step writes into them is multiplied.
        """
        for p, g in zip(toys, self._gradients_at(number), strict=True):
            p.grad = None
            if g is not None and self.way == "graph":
                # Convex, so that second derivatives exist.
                (g * gradient * p + 0.005 * (p - p.detach()).pow(2)).sum().backward(create_graph=True)
            elif g is not None:
                p.grad = g * gradient
        _seed(number, toys)
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(number)
            return torch.ones(())

        with contextlib.nullcontext() if writes is None else _scaled_writes(twin, toys, writes):
            bare_step(type(twin))(twin, *([closure] if self.way == "closure" else []))
        if len(calls) > 1:
            raise CannotTryError("it evaluates its closure several times a step")

    def _groups(self, toys: Sequence[Tensor], decay: bool) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        left = iter(toys)
        shared: dict[int, Any] = {}  # defaults are one object for all groups
        for source, positions in zip(self._sources, self._positions, strict=True):
            group: dict[str, Any] = {}
            for name, value in source.items():
                if name == "params":
                    group[name] = [next(left) for _ in positions]
                elif name == "lr" and value is not None:
                    group[name] = value * 0 + RATE if self._scale is None else value * self._scale
                elif name in ("weight_decay", "wd") and not decay and not isinstance(value, bool):
                    group[name] = 0.0
                else:
                    made = _option(value, len(source["params"]), positions)
                    group[name] = shared.setdefault(id(value), made) if can_change(value) else made
            groups.append(group)
        return groups

    def _constructed(self, groups: list[dict[str, Any]]) -> Any:
        kind: Any = type(self.optimizer)
        accepted = inspect.signature(kind.__init__).parameters
        options = {name: copy.deepcopy(value) for name, value in self.optimizer.defaults.items() if name in accepted}
        if groups and groups[0].get("lr") is not None and "lr" in accepted:
            options["lr"] = groups[0]["lr"]
        built = kind([{"params": group["params"]} for group in groups], **options)
        for made, group in zip(built.param_groups, groups, strict=True):
            made.update({name: value for name, value in group.items() if name in made or name not in options})
        return built

    def _copied(self, groups: list[dict[str, Any]], toys: Sequence[Tensor]) -> Any:
        source = self.optimizer
        twin: Any = object.__new__(type(source))
        state = defaultdict[Any, Any](dict)
        memo: dict[int, Any] = {id(source): twin, id(source.state): state, id(source.param_groups): groups}
        memo.update(zip(map(id, self._sources), groups, strict=True))
        memo.update(zip(map(id, self.real), toys, strict=True))
        for p in parameters_of(source):  # all of them, since attributes may list every parameter
            if id(p) not in memo:
                memo[id(p)] = nn.Parameter(torch.zeros(1), requires_grad=False)
        for copied, number, dtype in self._copies:
            if copied not in memo:
                memo[copied] = toys[number].detach().clone().to(self._kept(dtype))
        made: dict[str, Any] = {}
        for name, value in attributes_of(source).items():
            if type(value) in (list, tuple) and len(value) == len(source.param_groups) > len(groups):
                value = type(value)(value[number] for number in self._numbers)  # an entry for each group
            if name.endswith("_hooks"):
                made[name] = OrderedDict[int, Any]()
            elif name != "step":
                made[name] = _with_keys(copy.deepcopy(value, memo), memo)
        own = vars(source)
        made |= {name: value for name, value in (("state", state), ("param_groups", groups)) if name in own}
        for name, value in made.items():
            object.__setattr__(twin, name, value)
        return twin

    def _find_copies(self) -> list[tuple[int, int, torch.dtype]]:
        """Return for each copy of a real weight in the attributes its id, the number of the toy, and its type."""
        found: list[tuple[int, int, torch.dtype]] = []
        for tensor in tensors_in(attributes_of(self.optimizer), 4):
            for number, real in enumerate(self.real):
                alike = tensor is not real and tensor.shape == real.shape and tensor.device == real.device
                if alike and real.numel() > 1 and torch.equal(real.detach(), tensor.detach().to(real.dtype)):
                    found.append((id(tensor), number, tensor.dtype))
        return found


@contextlib.contextmanager
def _scaled_writes(optimizer: Any, toys: Sequence[Tensor], factors: Sequence[float]) -> Generator[None]:
    """Scale writes, seen as in training: without the guard, which shows more, and without compiled steps."""
    mode = ScaledWrites(toys, optimizer.state)
    mode.scale(zip(toys, factors, strict=True))
    with _disable_current_modes(), _stance("fail_on_recompile"):
        mode.begin()
        try:
            yield
            mode.end()
        finally:
            mode.remove()


def _stance(name: Any) -> Any:
    """Set how compiled steps run, without importing the compiler, which takes seconds."""
    return torch.compiler.set_stance(name) if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def bare_step(kind: Any) -> Any:
    """Return a class's `step` without PyTorch's wrapper for hooks."""
    step: Any = kind.step
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def attributes_of(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's attributes, including those in `__slots__`, but not its state and its groups."""
    attributes: dict[str, Any] = {**vars(optimizer), **slots_of(optimizer)}
    return {name: value for name, value in attributes.items() if name not in ("state", "param_groups")}


def _two_of_each(kinds: Iterable[Any], most: int) -> list[int]:
    """Return the positions of the first two of each kind, at most so many; a kind of None is left out."""
    count = Counter[Any]()
    found: list[int] = []
    for position, kind in enumerate(kinds):
        count[kind] += 1
        if kind is not None and count[kind] <= 2 and len(found) < most:
            found.append(position)
    return found


def _representatives(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the groups to make: all, or of many two of each kind, so that hundreds cost as few do."""
    if len(groups) <= MOST_GROUPS:
        return list(range(len(groups)))

    def kind(group: Mapping[str, Any]) -> Any:
        options = [
            (name, repr(value) if isinstance(value, (bool, int, str)) else type(value).__name__)
            for name, value in group.items()
        ]
        return (*options, *{(_toy_shape(p), p.requires_grad) for p in group["params"][:SIDE]})

    return _two_of_each(map(kind, groups), MOST_GROUPS)


def _chosen(parameters: Sequence[Tensor], most: int) -> list[int]:
    """Return the positions of the parameters that get a toy: two of each toy shape, then the first others."""
    found = _two_of_each((_toy_shape(p) if p.requires_grad else None for p in parameters), most)
    found += [position for position in range(len(parameters)) if position not in found][: most - len(found)]
    return sorted(found)


def _toy_shape(parameter: Tensor, side: int = SIDE) -> tuple[int, ...]:
    return tuple(max(1, min(side if i < 2 else SIDE, size)) for i, size in enumerate(parameter.shape))


def tensors_in(value: Any, depth: int) -> Generator[Tensor]:
    """Yield the tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        held = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else cast("Sequence[Any]", value)
        for one in held:
            yield from tensors_in(one, depth - 1)


def _option(value: Any, count: int, positions: Sequence[int]) -> Any:
    """Return a copy of a group's option. A list with an entry for each parameter keeps the toys' entries."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple) and len(value) == count > SIDE:
        return type(value)(value[i] for i in positions)
    return copy.deepcopy(value)


def _with_keys(value: Any, memo: Mapping[int, Any]) -> Any:
    """Replace the keys of a dictionary keyed by `id(parameter)` with the ids of the toys."""
    if type(value) is dict:
        entries = cast("dict[Any, Any]", value)
        if entries and all(type(key) is int and key in memo for key in entries):
            return {id(memo[key]): entry for key, entry in entries.items()}
    return cast(Any, value)


def _seed(number: int, parameters: Sequence[Tensor]) -> None:
    torch.default_generator.manual_seed(number)  # torch.manual_seed records the call stack, which is slow
    if parameters and parameters[0].device.type == "cuda":
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)


# Generators, console and log are the whole program's: two threads at a time would put back each other's.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def undisturbed(parameters: Sequence[Tensor]) -> Generator[Guard]:
    """Protect the real weights and the random generators, silence output, and run compiled steps eagerly."""
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    _one_at_a_time.acquire()
    own, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    guard = Guard(parameters)
    data = [p.data for p in parameters]
    logged = logging.root.manager.disable
    try:
        with (
            torch.random.fork_rng(devices=devices),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _stance("force_eager"),
            torch.enable_grad(),
            guard,
        ):
            warnings.simplefilter("ignore")
            logging.disable()
            yield guard
    finally:
        logging.disable(logged)
        random.setstate(own)
        if numpy and drawn is not None:
            numpy.random.set_state(drawn)
        for p, before in zip(parameters, data, strict=True):
            if _storage(p) != _storage(before):  # the guard does not see `p.data = …`
                p.data = before
        _one_at_a_time.release()
