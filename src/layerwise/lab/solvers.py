"""The three solvers of Singh et al. 2015, Table I, in PyTorch's form.

How this differs from Caffe, where the paper was run: Caffe's SGD and Nesterov solvers keep the learning rate
inside the velocity, ``h <- mu h + rate d; w <- w - h``, while ``torch.optim.SGD`` keeps it outside, ``h <- mu
h + d; w <- w - rate h``. With a constant rate both give the same weights. Under the ``inv`` policy PyTorch
rescales old velocity by the new rate and Caffe does not: the rate falls by a factor of 0.99993 an iteration,
so the difference is far below the spread between seeds. AdaGrad is the same in both (Caffe adds its delta
outside the root, as PyTorch its eps).

There is no LeNet solver file for Nesterov or AdaGrad in Caffe: both use the values of lenet_solver.prototxt,
AdaGrad without momentum, which reproduces the paper's baseline columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

BASE_RATE = 0.01
"""base_lr, Caffe lenet_solver.prototxt."""

MOMENTUM = 0.9
"""momentum, Caffe lenet_solver.prototxt."""

WEIGHT_DECAY = 0.0005
"""weight_decay (L2, on weights and biases: no decay_mult is given), Caffe lenet_solver.prototxt."""

GAMMA = 0.0001
"""gamma of lr_policy "inv", Caffe lenet_solver.prototxt."""

POWER = 0.75
"""power of lr_policy "inv", Caffe lenet_solver.prototxt."""

BIAS_RATE_MULTIPLIER = 2.0
"""lr_mult of every bias; that of the weights is 1. Caffe lenet_train_test.prototxt."""

ADAGRAD_DELTA = 1e-8
"""delta, Caffe caffe.proto (default of SolverParameter)."""

SOLVERS = {"sgd": "SGD", "nag": "NAG", "adagrad": "AdaGrad"}
"""Solver -> its name in the paper, in the order of Table I."""


def inv_policy(iteration: int) -> float:
    """Give the multiplier of the base rate under Caffe's policy ``inv``.

    t(k) / t(0) = (1 + gamma k)^(-power); Singh et al. 2015, eq. 4.

    Args:
        iteration: k, the number of updates already done, from 0.

    Returns:
        The multiplier, 1 at k = 0.
    """
    return (1.0 + GAMMA * iteration) ** -POWER


def _sgd(groups: list[dict[str, object]], nesterov: bool) -> torch.optim.Optimizer:
    # foreach=False: with eight small tensors on one thread the plain loop was the faster form.
    return torch.optim.SGD(
        groups, lr=BASE_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=nesterov, foreach=False
    )


def _adagrad(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=BASE_RATE, weight_decay=WEIGHT_DECAY, eps=ADAGRAD_DELTA, foreach=False)


_BUILDERS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: _sgd(groups, nesterov=False),
    "nag": lambda groups: _sgd(groups, nesterov=True),
    "adagrad": _adagrad,
}


def build(
    solver: str, model: nn.Module, rate_factor: float = 1.0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Make a solver and its rate policy.

    Args:
        solver: a key of ``SOLVERS``.
        model: the network; its biases learn at twice the rate of its weights.
        rate_factor: multiplies the base rate; 1 except in the control.

    Returns:
        The optimizer with two groups, weights then biases, and the scheduler of policy ``inv``; call the
        scheduler's ``step`` after each update.

    Raises:
        ValueError: unknown solver.
    """
    if solver not in _BUILDERS:
        raise ValueError(f"solver={solver!r}: use one of {', '.join(SOLVERS)}")
    named = list(model.named_parameters())
    base = BASE_RATE * rate_factor
    groups: list[dict[str, object]] = [
        {"params": [item for item in named if not item[0].endswith("bias")], "lr": base},
        {"params": [item for item in named if item[0].endswith("bias")], "lr": base * BIAS_RATE_MULTIPLIER},
    ]
    optimizer = _BUILDERS[solver](groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, inv_policy)
