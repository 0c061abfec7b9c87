"""What is trained in one process and in several: networks, ways to share them out, rules and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import layerwise
from layerwise.rules import (
    LARC,
    LARS,
    BackMatching,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    Phase,
    RandomLayers,
    Rule,
    bounds,
    chain,
)
from rule_cases import RULES

STEPS = 6
LAYERS = ["embed", "norm", "up", "middle", "head"]
BATCH = 12  # of 2, 3 and 4 processes each gets as many


class Network(nn.Module):
    """Layers whose rows two, three and four processes cannot share evenly; the last has too few for four."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 7, bias=False)
        self.middle = nn.Linear(7, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers for each row."""
        x = self.norm(torch.tanh(self.embed(x)))
        return self.head(torch.tanh(self.middle(torch.tanh(self.up(x)))))


def network() -> Network:
    """Return the same network each time, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Network().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def loss_of(model: nn.Module, step: int, part: int = 0, parts: int = 1) -> Tensor:
    """Return the loss on one of `parts` equal parts of a batch."""
    x, y = (half.chunk(parts)[part] for half in batch(step))
    return (model(x) - y).square().mean()


@dataclass(frozen=True)
class Case:
    """A rule on an optimizer, and the epochs of three steps that the rule may count."""

    rule: Callable[[], Any]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1)


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05)


def amplification(measure: Any) -> Callable[[], Any]:
    choice = Directionality(measure, threshold=1.0, sides="both", kinds=None)
    return lambda: GradientAmplification(choice, [Phase(2, True, 3.0)])


class Spread(Rule):
    """Factors of both moments, in sizes that gradients of any scale give."""

    needs = ("gradient_mean", "gradient_std")
    compares_layers = False

    def factors(self, statistics: Any, state: Any) -> tuple[Tensor, Any]:
        mean, deviation = statistics.gradient_mean, statistics.gradient_std
        return 1 + mean / (mean.abs() + deviation), state


CASES = {
    "LayerAdaptive, momentum": Case(LayerAdaptive, momentum),
    "LayerAdaptive, Nesterov, in the gradient": Case(LayerAdaptive, nesterov, {"apply": "gradient"}),
    "LayerAdaptive, momentum, on the rate": Case(LayerAdaptive, momentum, {"apply": "lr"}),
    "LayerAdaptive, momentum, on the update": Case(LayerAdaptive, momentum, {"apply": "update"}),
    "LayerAdaptive, AdamW": Case(LayerAdaptive, adamw),
    "LayerAdaptive, AdamW, by parameter": Case(LayerAdaptive, adamw, {"layers": "parameter", "apply": "update"}),
    "LayerAdaptive, Adagrad, patterns": Case(LayerAdaptive, adagrad, {"layers": ["embed", "m*", "head"]}),
    "LARS, momentum": Case(lambda: LARS(0.1), momentum),
    "LARS, momentum, plain decay": Case(lambda: LARS(0.1), nesterov, {"decay": "plain", "apply": "gradient"}),
    "LARC, AdamW": Case(lambda: LARC(0.5), adamw),
    "chain, bounded": Case(lambda: bounds(chain(LayerAdaptive(), BackMatching()), 0.5, 4), momentum),
    "moments": Case(Spread, momentum),
    "moments by parameter": Case(Spread, adamw, {"layers": "parameter"}),
    "amplification by G": Case(amplification("G"), momentum),
    "amplification by G'": Case(amplification("G_prime"), nesterov),
    "amplification at random": Case(lambda: GradientAmplification(RandomLayers(0.5), [Phase(9, True)]), adamw),
    **{name: Case(partial(case.make, LAYERS), momentum) for name, case in RULES.items() if case.sharded},
}


def attach(case: Case, model: nn.Module, optimizer: Any) -> layerwise.LayerwiseLR:
    """Attach the case's rule."""
    return layerwise.LayerwiseLR(optimizer, case.rule(), model, **case.arguments)


def train_alone(case: Case) -> tuple[dict[str, Tensor], list[dict[str, float]], Any]:
    """Return the weights, the factors of each step, and the last selection, of training in this process."""
    model = network()
    optimizer = case.optimizer(model.parameters())
    adapter = attach(case, model, optimizer)
    factors = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        factors.append(adapter.get_last_factors())
        if step % 3 == 2:
            adapter.end_epoch()
    return {name: p.detach() for name, p in model.named_parameters()}, factors, selection_of(adapter)


def selection_of(adapter: layerwise.LayerwiseLR) -> list[tuple[float, float, bool]] | None:
    """Return the last selection, or None."""
    try:
        return [tuple(one) for one in adapter.get_last_selection().values()]
    except ValueError:
        return None
