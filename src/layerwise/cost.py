"""What a step takes with a rule attached and without, measured on copies."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import statistics
import time
import warnings
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.optim.optimizer as optimizer_hooks
from torch import Tensor
from torch.optim import Optimizer

from .adapter import LayerwiseLR
from .model import Model
from .rules.state import is_state
from .tensors import has_values

logger = logging.getLogger("layerwise")

SECONDS = 1.0
"""Of measuring, where nobody has said how long."""

MOST_BYTES = 2**30
"""Of copies that are made where nobody has asked for them: more might not fit beside the training."""

MOST_PAIRS = 200
"""Beyond, the medians hardly move."""


@dataclass(frozen=True)
class Cost:
    """What was measured.

    Args:
        bare: Seconds of the optimizer's own step, median.
        attached: Seconds of the step with the rule attached, median.
        pairs: Number of pairs of steps.
        made_up: Whether the gradients were random numbers, since there were none.
    """

    bare: float
    attached: float
    pairs: int
    made_up: bool

    @property
    def ratio(self) -> float:
        """How many times as long the attached step takes."""
        return self.attached / self.bare

    def __str__(self) -> str:
        gradients = ", random gradients" if self.made_up else ""
        return (
            f"a step takes {self.ratio:.2f} times as long: {1000 * self.attached:.3g} ms, bare "
            f"{1000 * self.bare:.3g} ms (medians of {self.pairs} pairs on copies{gradients})"
        )


@dataclass(frozen=True)
class Failure:
    """The error with which a step with the rule attached ended, where the bare one went well.

    Args:
        error: Its type and its text.
    """

    error: str

    def __str__(self) -> str:
        return "the step failed on a copy with the rule attached, and not on one without"


def measured_cost(
    optimizer: Optimizer, model: Model | None, rule: Any, seconds: float | None = None, **arguments: Any
) -> Cost | Failure | str:
    """Time steps of an optimizer with a rule and without, in turn, on copies of its tensors.

    Model, optimizer, rule, gradients and the states of the random generators stay as they are, to the bit. For the time
    of the measurement there is a copy of model, gradients and optimizer state.

    Args:
        optimizer: The optimizer.
        model: Its model, as for `LayerwiseLR`.
        rule: The rule.
        seconds: About the longest time it takes, but for two warm-up steps and one pair of steps; 0 measures nothing.
            None takes `SECONDS`, unless the copies would take more than `MOST_BYTES`.
        **arguments: As for `LayerwiseLR`.

    Returns:
        The cost, how an attached step failed, or why the cost is not known.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> measured_cost(optimizer, model, None, 0)
        'seconds=0'
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reason = reason_not_to(optimizer, parameters, seconds)
    if reason:
        return reason
    with undisturbed(parameters):
        # Each may raise whatever a model that cannot be copied, or an optimizer of another package, raises.
        try:
            pair = Pair(optimizer, model, rule, parameters, arguments)
        except Exception as error:
            return f"no copy could be made ({_named(error)})"
        try:
            pair.step(pair.bare)  # makes the state
        except Exception as error:
            return f"a copy of the bare optimizer could not take a step ({_named(error)})"
        try:
            return pair.timed(SECONDS if seconds is None else seconds)
        except Exception as error:
            return Failure(_named(error))


def _named(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def reason_not_to(optimizer: Optimizer, parameters: Sequence[Tensor], seconds: float | None) -> str:
    """Return why nothing is to be measured, or ""."""
    if seconds == 0:
        return "seconds=0"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "steps of several processes wait for one another, and only this one measures"
    if not all(map(has_values, parameters)):
        return "tensors on the device 'meta', or fake ones, hold no numbers"
    if optimizer_hooks._global_optimizer_pre_hooks or optimizer_hooks._global_optimizer_post_hooks:
        return "hooks on all optimizers would see the steps"
    if seconds is None:
        state = [value for held in optimizer.state.values() if is_state(held) for value in held.values()]
        tensors = [*parameters, *parameters, *(value for value in state if isinstance(value, Tensor))]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size > MOST_BYTES:
            return f"the copies would take {size / 2**30:.1f} GiB; seconds={SECONDS:g} makes them"
    return ""


@contextlib.contextmanager
def undisturbed(parameters: Sequence[Tensor]) -> Generator[None]:
    """Keep the states of the random generators, and keep the log and the warnings quiet."""
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    own, silent = random.getstate(), logger.disabled
    logger.disabled = True  # attaching has warned already, where it is described
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = silent
        random.setstate(own)


class Pair:
    """Two copies of an optimizer, one with a rule attached, that share copies of parameters and state."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: Model | None,
        rule: Any,
        parameters: Sequence[Tensor],
        arguments: dict[str, Any],
    ) -> None:
        # Hooks belong to who registered them, and a scheduler replaces `step` by one that counts.
        own = {name: v for name, v in vars(optimizer).items() if not name.endswith("_hooks") and name != "step"}
        memo: dict[int, Any] = {}
        layers = arguments.get("layers", "auto")
        model, rule, own, layers = copy.deepcopy((model, rule, own, layers), memo)
        self.copies = [memo[id(p)] for p in parameters]
        self.gradients = [p.grad for p in parameters]
        self.made_up = all(gradient is None for gradient in self.gradients)
        if self.made_up:
            self.gradients = [random_like(p, seed) if p.requires_grad else None for seed, p in enumerate(parameters)]
        self.bare, self.attached = (self._twin(optimizer, own) for _ in range(2))
        LayerwiseLR(self.attached, rule, model, **(arguments | {"layers": layers}))
        self.synchronised = any(p.device.type != "cpu" for p in parameters)

    @staticmethod
    def _twin(optimizer: Optimizer, own: dict[str, Any]) -> Optimizer:
        twin = object.__new__(type(optimizer))
        hooks = {name: OrderedDict[int, Any]() for name in vars(optimizer) if name.endswith("_hooks")}
        vars(twin).update(own | hooks)
        return twin

    def timed(self, seconds: float) -> Cost:
        """Time pairs of steps, in turn this one first and that one first; at least one pair."""
        self.step(self.attached)
        times: dict[Optimizer, list[float]] = {self.bare: [], self.attached: []}
        began, pairs = time.perf_counter(), 0
        while pairs < MOST_PAIRS and (not pairs or time.perf_counter() - began < seconds):
            for twin in (self.bare, self.attached)[:: -1 if pairs % 2 else 1]:
                times[twin].append(self.step(twin))
            pairs += 1
        bare, attached = (statistics.median(times[twin]) for twin in (self.bare, self.attached))
        return Cost(bare, attached, pairs, self.made_up)

    def step(self, twin: Optimizer) -> float:
        """Give fresh gradients, as a factor may have scaled the last ones, take a step, and return its seconds."""
        for p, gradient in zip(self.copies, self.gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self._wait()
        began = time.perf_counter()
        twin.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.synchronised:
            torch.accelerator.synchronize()


def random_like(parameter: Tensor, seed: int) -> Tensor:
    """Return small random numbers for a gradient; the global generators are not asked.

    Args:
        parameter: The parameter.
        seed: Another one for each parameter: equal gradients would give equal factors, and those share a group.
    """
    generator = torch.Generator(parameter.device).manual_seed(seed)
    shape = cast(Any, parameter.shape)
    drawn = torch.randn(shape, generator=generator, dtype=parameter.dtype, device=parameter.device)
    return drawn.mul_(0.01)


def check_seconds(seconds: object) -> None:
    """Refuse what is no time.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.
    """
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"seconds={seconds!r} must be a number of seconds from 0, or None")
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds={seconds!r} must be finite and at least 0; 0 measures nothing")
