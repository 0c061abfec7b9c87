"""Every optimizer of `torch.optim`, with every option and form it has; tests run over this table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim

MUON = getattr(optim, "Muon", None)  # since torch 2.9
OPTIONS: dict[type, list[dict[str, Any]]] = {
    optim.SGD: [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "maximize": True},
    ],
    optim.Adagrad: [
        {"lr": 0.1},
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.1, "eps": 1e-8},
        {"lr": 0.1, "maximize": True},
    ],
    optim.Adam: [
        {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6},
        {"lr": 0.1, "weight_decay": 0.05, "amsgrad": True},
        {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True},
        {"lr": 0.1, "maximize": True},
    ],
    optim.AdamW: [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.05, "amsgrad": True}, {"lr": 0.1, "maximize": True}],
    optim.Adamax: [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.05}, {"lr": 0.1, "maximize": True}],
    optim.NAdam: [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.05, "momentum_decay": 1e-2},
        {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True},
        {"lr": 0.1, "maximize": True},
    ],
    optim.RAdam: [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.05},
        {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True},
        {"lr": 0.1, "maximize": True},
    ],
    optim.RMSprop: [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "centered": True, "weight_decay": 0.05, "alpha": 0.9},
        {"lr": 0.1, "maximize": True},
    ],
    optim.Adadelta: [{"lr": 1.0}, {"lr": 1.0, "rho": 0.8, "weight_decay": 0.05}, {"lr": 1.0, "maximize": True}],
    optim.ASGD: [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.05, "t0": 3.0, "lambd": 1e-2},
        {"lr": 0.1, "maximize": True},
    ],
    optim.Rprop: [
        {"lr": 0.1},
        {"lr": 0.1, "etas": (0.6, 1.1), "step_sizes": (1e-4, 1.0)},
        {"lr": 0.1, "maximize": True},
    ],
    optim.SparseAdam: [{"lr": 0.1}, {"lr": 0.1, "maximize": True}],
    optim.Adafactor: [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.05, "d": 2.0}, {"lr": 0.1, "maximize": True}],
}
if MUON is not None:
    OPTIONS[MUON] = [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.05, "nesterov": False}]
REFUSED = {optim.LBFGS: "LBFGS"}
LATE = (optim.ASGD, optim.Rprop)
ALL = {c for c in vars(optim).values() if isinstance(c, type) and issubclass(c, optim.Optimizer)} - {optim.Optimizer}


@dataclass(frozen=True)
class Case:
    """One optimizer class with one setting of its options and one form of its step."""

    optimizer: type[optim.Optimizer]
    options: dict[str, Any]
    form: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any) -> optim.Optimizer:
        """Return the optimizer."""
        return self.optimizer(params, **self.options, **self.form)

    def aspects(self) -> tuple[Any, ...]:
        """Return what `pairwise` pairs: the class, which of its settings this is, and the form."""
        return self.optimizer, settings(self.optimizer).index(self.options), tuple(self.form.items())

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "lr")
        form = ",".join(f"{k}" for k in self.form) or "default"
        return f"{self.optimizer.__name__}({options})-{form}"


def forms(optimizer: type[optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """Yield the forms of the step that the class has on the CPU."""
    names = inspect.signature(optimizer.__init__).parameters
    yield {}
    if "foreach" in names:
        yield {"foreach": False}
        yield {"foreach": True}
    if "fused" in names:
        yield {"fused": True}


def known(optimizer: type[optim.Optimizer], options: dict[str, Any]) -> bool:
    """Tell whether this version of torch has the options: `decoupled_weight_decay` is younger than others."""
    return set(options) <= set(inspect.signature(optimizer.__init__).parameters)


def settings(optimizer: type[optim.Optimizer]) -> list[dict[str, Any]]:
    """Return the settings of a class that this version of torch has."""
    return [options for options in OPTIONS[optimizer] if known(optimizer, options)]


CASES = [Case(c, options, form) for c in OPTIONS for options in settings(c) for form in forms(c)]


class Embedded(nn.Module):
    """Three linear layers; with `sparse`, two tables whose gradients are sparse."""

    def __init__(self, optimizer: type[optim.Optimizer], dtype: torch.dtype) -> None:
        super().__init__()
        self.sparse = optimizer is optim.SparseAdam
        bias = optimizer is not MUON  # which takes matrices only
        if self.sparse:
            self.first = nn.EmbeddingBag(11, 6, sparse=True, mode="sum", dtype=dtype)
            self.second = nn.EmbeddingBag(7, 6, sparse=True, mode="sum", dtype=dtype)
        else:
            self.first = nn.Linear(5, 6, bias=bias, dtype=dtype)
            self.second = nn.Linear(6, 4, bias=bias, dtype=dtype)
            self.third = nn.Linear(4, 3, bias=bias, dtype=dtype)

    def loss(self, step: int) -> Tensor:
        """Return a loss whose gradients change from step to step."""
        generator = torch.Generator().manual_seed(1000 + step)
        if self.sparse:
            rows = torch.randint(0, 7, (4, 3), generator=generator)
            return (self.first(rows) * self.second(rows)).pow(2).sum() + self.second(rows).pow(2).mean()
        x = torch.randn(8, 5, generator=generator, dtype=self.first.weight.dtype)
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return (self.third(hidden) - 0.3 * step).pow(2).mean()


def network(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Embedded:
    """Return the network for a case, with the same weights each time."""
    torch.manual_seed(seed)
    return Embedded(case.optimizer, dtype)


def take_step(model: Embedded, optimizer: optim.Optimizer, step: int) -> None:
    """Take one training step."""
    optimizer.zero_grad()
    model.loss(step).backward()
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    """Raise unless the tensors are equal to the bit."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def relative_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest weight."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(first, second, strict=True))
