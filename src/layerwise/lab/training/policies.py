"""Caffe's rate policies: what multiplies the base rate at each iteration.

The rate of update k, from 0, is base_lr times the multiplier of k: a pure function of k, so that a resumed run has
the rates of one that was never interrupted. Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::GetLearningRate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layerwise.lab.errors import UsageError
from layerwise.rules.base import is_number


def _fixed(iteration: int) -> float:
    return 1.0


def _inv(iteration: int, *, gamma: float, power: float) -> float:
    return (1.0 + gamma * iteration) ** -power  # Singh et al. 2015, eq. 4


def _step(iteration: int, *, gamma: float, stepsize: int) -> float:
    return float(gamma) ** (iteration // stepsize)


def _multistep(iteration: int, *, gamma: float, stepvalues: Sequence[int]) -> float:
    return float(gamma) ** bisect_right(stepvalues, iteration)


def _poly(iteration: int, *, power: float, max_iter: int) -> float:
    return (1.0 - iteration / max_iter) ** power


_POLICIES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "fixed": (_fixed, ()),
    "inv": (_inv, ("gamma", "power")),
    "step": (_step, ("gamma", "stepsize")),
    "multistep": (_multistep, ("gamma", "stepvalues")),
    "poly": (_poly, ("power", "max_iter")),
}

POLICIES: Mapping[str, tuple[str, ...]] = {name: arguments for name, (_, arguments) in _POLICIES.items()}
"""Policy -> its arguments, all of them required."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite_from_0(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _is_rising(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_count, value)):
        return False
    return all(earlier < later for earlier, later in pairwise(value))


_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "gamma": ("a finite number from 0", _is_finite_from_0),
    "power": ("a finite number from 0", _is_finite_from_0),
    "stepsize": ("a whole number from 1", _is_count),
    "stepvalues": ("a list of rising whole numbers from 1", _is_rising),
    "max_iter": ("a whole number from 1", _is_count),
}
"""Argument -> its range in words, and whether a value is inside."""


def _policy(name: str, arguments: Mapping[str, Any]) -> Callable[[int], float]:
    """Check a policy and its arguments, and give the function of the iteration."""
    if name not in _POLICIES:
        raise UsageError(f"policy={name!r}: use one of {', '.join(_POLICIES)}")
    function, needed = _POLICIES[name]
    takes = f"policy {name!r} takes {', '.join(needed) or 'no argument'}"
    for argument, value in arguments.items():
        if argument not in needed:
            raise UsageError(f"{argument}={value!r}: {takes}; leave {argument} out")
    for argument in needed:
        if argument not in arguments:
            raise UsageError(f"{argument} is missing: {takes}; give all of them")
        words, inside = _LIMITS[argument]
        if not inside(arguments[argument]):
            raise UsageError(f"{argument}={arguments[argument]!r}: policy {name!r} takes {words}")
    return partial(function, **arguments)


def multiplier(name: str, iteration: int, **arguments: Any) -> float:
    """Give t(k) / base_lr of update k under one of ``POLICIES``."""
    return _policy(name, arguments)(iteration)


def scheduler(optimizer: Optimizer, name: str, **arguments: Any) -> LambdaLR:
    """Make the scheduler of a policy; its ``state_dict`` holds no policy, so it is made again before it is loaded.

    It sets ``group["lr"]``, so that Caffe's lr_mult of a group and the factors of an adapter multiply the rate anew
    at each update.
    """
    return LambdaLR(optimizer, _policy(name, arguments))
