"""The solvers that recipes name: Caffe's, which Singh et al. 2015 used, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Constants
from layerwise.lab.training import caffe, policies

SOLVERS = {
    "caffe-sgd": "SGD",
    "caffe-nesterov": "NAG",
    "caffe-adagrad": "AdaGrad",
    "caffe-adadelta": "AdaDelta",
    "sgd": "PyTorch's SGD",
    "adamw": "PyTorch's AdamW",
}
"""Solver -> its name in tables."""


def _build(constants: Constants, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    rate, decay = constants.rate, constants.weight_decay
    delta = {} if constants.delta is None else {"delta": constants.delta}
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "caffe-sgd": lambda: caffe.SGD(groups, rate, momentum=constants.momentum, weight_decay=decay),
        "caffe-nesterov": lambda: caffe.Nesterov(groups, rate, momentum=constants.momentum, weight_decay=decay),
        "caffe-adagrad": lambda: caffe.AdaGrad(groups, rate, weight_decay=decay, **delta),
        "caffe-adadelta": lambda: caffe.AdaDelta(
            groups, rate, momentum=constants.momentum, weight_decay=decay, **delta
        ),
        "sgd": lambda: torch.optim.SGD(groups, rate, momentum=constants.momentum, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(groups, rate, weight_decay=decay),
    }
    return builders[constants.solver]()


def build(constants: Constants, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make the optimizer and the policy of its rate.

    Args:
        constants: which solver, its values and its policy.
        model: the network. With Caffe's solvers its ``multipliers`` give the rate and decay of each blob.

    Returns:
        The optimizer, and the scheduler, to be stepped once for each ``policy_unit``.

    Raises:
        UsageError: unknown solver or policy, or a value out of its range.
    """
    check(constants)
    multipliers: dict[str, tuple[float, float]] = {}
    if constants.solver.startswith("caffe-"):
        multipliers = getattr(model, "multipliers", {})
    groups = caffe.parameter_groups(model, multipliers)
    if not constants.solver.startswith("caffe-"):
        groups = [{"params": group["params"]} for group in groups]
    optimizer = _build(constants, groups)
    return optimizer, policies.scheduler(optimizer, constants.policy, **constants.policy_arguments)


def check(constants: Constants) -> None:
    """Refuse a solver or policy that is not known, or values that it does not take.

    Args:
        constants: of a run.

    Raises:
        UsageError: as said.
    """
    if constants.solver not in SOLVERS:
        raise UsageError(f"solver={constants.solver!r}: use one of {', '.join(SOLVERS)}")
    if constants.solver == "caffe-adagrad" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdaGrad: must be 0, as Caffe's AdaGrad demands")
    if constants.solver == "adamw" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdamW: must be 0; it has none of that name")
    policies.multiplier(constants.policy, 0, **constants.policy_arguments)
