"""The solvers that recipes name: Caffe's, which Singh et al. 2015 used, and PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Constants
from layerwise.lab.training import caffe, policies

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
    options = {name: value for name in names if (value := getattr(constants, name)) is not None}
    optimizer = solver(groups, constants.rate, weight_decay=constants.weight_decay, **options)
    return optimizer, policies.scheduler(optimizer, constants.policy, **constants.policy_arguments)


def check(constants: Constants) -> None:
    """Refuse a solver or policy that is not known, or values that it does not take."""
    if constants.solver not in SOLVERS:
        raise UsageError(f"solver={constants.solver!r}: use one of {', '.join(SOLVERS)}")
    if constants.solver == "caffe-adagrad" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdaGrad: must be 0, as Caffe's AdaGrad demands")
    if constants.solver == "adamw" and constants.momentum:
        raise UsageError(f"momentum={constants.momentum!r} with AdamW: must be 0; it has none of that name")
    policies.multiplier(constants.policy, 0, **constants.policy_arguments)
