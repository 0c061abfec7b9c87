"""The solvers that recipes name, Caffe's, which Singh et al. 2015 used, and PyTorch's; and policies of the rate.

The rate of update k, from 0, is base_lr times the multiplier of k: a pure function of k, so that a resumed run has
the rates of one that was never interrupted. Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::GetLearningRate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Constants
from layerwise.lab.training import caffe

SOLVERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "caffe-sgd": (caffe.SGD, ("momentum",)),
    "caffe-nesterov": (caffe.Nesterov, ("momentum",)),
    "caffe-adagrad": (caffe.AdaGrad, ("delta",)),
    "caffe-adadelta": (caffe.AdaDelta, ("momentum", "delta")),
    "sgd": (torch.optim.SGD, ("momentum",)),
    "adamw": (torch.optim.AdamW, ()),
}
"""Solver -> its class, and the constants that it takes besides rate and weight decay."""


def build(constants: Constants, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make the optimizer, and the scheduler of its rate, which is stepped once for each ``policy_unit``.

    With Caffe's solvers the network's ``multipliers`` give the rate and decay of each blob.
    """
    check(constants)
    solver, names = SOLVERS[constants.solver]
    if constants.solver.startswith("caffe-"):
        groups = caffe.parameter_groups(model, getattr(model, "multipliers", {}))
    else:
        groups = [{"params": list(model.named_parameters())}]
    options: dict[str, Any] = {name: value for name in names if (value := getattr(constants, name)) is not None}
    if constants.beta2 is not None:
        options["betas"] = (0.9, constants.beta2)
    optimizer = solver(groups, constants.rate, weight_decay=constants.weight_decay, **options)
    return optimizer, scheduler(optimizer, constants.policy, **constants.policy_arguments)


def check(constants: Constants) -> None:
    """Refuse a solver or policy that is not known, or values that it does not take."""
    if constants.solver not in SOLVERS:
        raise UsageError(f"solver={constants.solver!r}: use one of {', '.join(SOLVERS)}")
    if constants.solver == "caffe-adagrad" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdaGrad: must be 0, as Caffe's AdaGrad demands")
    if constants.beta2 is not None and constants.solver != "adamw":
        raise UsageError(f"beta2={constants.beta2!r} of solver={constants.solver!r}: leave it out, or use 'adamw'")
    if constants.beta2 is not None and not constants.beta2 < 1.0:
        raise UsageError(f"beta2={constants.beta2!r}: must be below 1, as 0.95")
    if constants.solver == "adamw" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdamW: must be 0; it has none of that name")
    multiplier(constants.policy, 0, **constants.policy_arguments)


_FORMULAS: dict[str, Callable[..., float]] = {
    "fixed": lambda k: 1.0,
    "inv": lambda k, gamma, power: (1.0 + gamma * k) ** -power,  # Singh et al. 2015, eq. 4
    "step": lambda k, gamma, stepsize: float(gamma) ** (k // stepsize),
    "multistep": lambda k, gamma, stepvalues: float(gamma) ** bisect_right(stepvalues, k),
    "poly": lambda k, power, max_iter: (1.0 - k / max_iter) ** power,
    "cosine": lambda k, max_iter: 0.5 * (1.0 + math.cos(math.pi * k / max_iter)),  # Loshchilov and Hutter 2017, eq. 5
    # Up in a line, which update ``warmup`` ends, then down to ``floor`` by half a cosine.
    "warmup-cosine": lambda k, warmup, floor, max_iter: (
        (k + 1) / warmup
        if k < warmup
        else floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (k - warmup) / (max_iter - warmup)))
    ),
}

POLICIES = {name: tuple(signature(formula).parameters)[1:] for name, formula in _FORMULAS.items()}
"""Policy -> its arguments, all of them required."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rising(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_count, value)):
        return False
    return all(earlier < later for earlier, later in pairwise(value))


def _policy(name: str, arguments: Mapping[str, Any]) -> Callable[[int], float]:
    """Check a policy and its arguments, and give the function of the iteration."""
    if name not in POLICIES:
        raise UsageError(f"policy={name!r}: use one of {', '.join(POLICIES)}")
    needed = POLICIES[name]
    takes = f"policy {name!r} takes {', '.join(needed) or 'no argument'}"
    for argument, value in arguments.items():
        if argument not in needed:
            raise UsageError(f"{argument}={value!r}: {takes}; leave {argument} out")
    for argument in needed:
        if argument not in arguments:
            raise UsageError(f"{argument} is missing: {takes}; give all of them")
    stepsize, stepvalues = arguments.get("stepsize", 1), arguments.get("stepvalues", (1,))
    if not _is_count(stepsize):
        raise UsageError(f"stepsize={stepsize!r}: policy {name!r} takes a whole number from 1")
    if not _is_rising(stepvalues):
        raise UsageError(f"stepvalues={stepvalues!r}: policy {name!r} takes a list of rising whole numbers from 1")
    if name == "warmup-cosine" and not arguments["warmup"] < arguments["max_iter"]:
        raise UsageError(
            f"warmup={arguments['warmup']!r}: must be below the length of the run, {arguments['max_iter']!r}"
        )
    if name == "warmup-cosine" and not arguments["floor"] <= 1.0:
        raise UsageError(f"floor={arguments['floor']!r}: must be at most 1, the share of the rate that is left")
    return partial(_FORMULAS[name], **arguments)


def multiplier(name: str, iteration: int, **arguments: Any) -> float:
    """Give t(k) / base_lr of update k under one of ``POLICIES``."""
    return _policy(name, arguments)(iteration)


def scheduler(optimizer: torch.optim.Optimizer, name: str, **arguments: Any) -> LambdaLR:
    """Make the scheduler of a policy; its ``state_dict`` holds no policy, so it is made again before it is loaded.

    It sets ``group["lr"]``, so that Caffe's lr_mult of a group and the factors of an adapter multiply the rate anew
    at each update.
    """
    return LambdaLR(optimizer, _policy(name, arguments))
