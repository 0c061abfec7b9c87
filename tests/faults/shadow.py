"""What must be true of an attached optimizer, slow and explicit: `reference`, and a group a parameter.

The shadow trains a network of its own with a bare optimizer that has a group for every parameter. Before each step it
writes the products of the factors into gradients, decays and rates by hand, and after it into the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

import reference
from layerwise import rules

PHASES = [(1, False, 2.0), (3, True, 3.0), (4, False, 2.0), (7, True, 0.5)]
THRESHOLD, FREEZING = 0.3, 0.6
AMPLIFIED = [rules.Phase(*phase) for phase in PHASES]
CONSTANT = {"f*": 0.5, "*": 1.5}


@dataclass(frozen=True)
class RuleKind:
    """A rule, where its method puts the factor, and what it does with coupled decay."""

    make: Callable[[], Any]
    place: str | None
    decay: str = "scaled"
    layers: str = "module"


KINDS = {
    "layer-adaptive": RuleKind(rules.LayerAdaptive, "gradient"),
    "LARS": RuleKind(lambda: rules.LARS(0.1), "gradient", layers="parameter"),
    "LARC": RuleKind(lambda: rules.LARC(0.1), "gradient", layers="parameter"),
    "constant": RuleKind(lambda: rules.Constant(CONSTANT), None),
    "chain": RuleKind(lambda: rules.chain(rules.LayerAdaptive(), rules.Constant(CONSTANT)), "gradient"),
    "bounds": RuleKind(lambda: rules.bounds(rules.LayerAdaptive(), 0.5, 1.5), "gradient"),
    "all layers": RuleKind(lambda: rules.GradientAmplification(rules.AllLayers(), AMPLIFIED), "gradient", "plain"),
    "G": RuleKind(
        lambda: rules.GradientAmplification(rules.Directionality(threshold=THRESHOLD), AMPLIFIED), "gradient", "plain"
    ),
    "G_prime": RuleKind(
        lambda: rules.GradientAmplification(rules.Directionality("G_prime", THRESHOLD, "both"), AMPLIFIED),
        *("gradient", "plain"),
    ),
    "freezing": RuleKind(lambda: rules.LayerFreezing(FREEZING, every=2), "lr"),
}
CHOOSING = ("all layers", "G", "G_prime", "freezing")
PATTERNS = ["first*", "*"]


def by_start(name: str, parameter: Tensor) -> str | None:
    """Layers by the first part of the name; biases are in none."""
    return None if name.endswith("bias") else name.partition(".")[0]


SPECIFICATIONS: dict[str, Any] = {
    "auto": "auto",
    "module": "module",
    "parameter": "parameter",
    "patterns": PATTERNS,
    "callable": by_start,
}


def layer_of(specification: str, kind: str, name: str, parameter: Tensor) -> str | None:
    """Return the layer of a parameter by its name."""
    owner = name.rpartition(".")[0]
    if specification == "auto":
        specification = KINDS[kind].layers
    if specification == "callable":
        return by_start(name, parameter)
    if specification == "patterns":
        return next((q for q in PATTERNS if fnmatchcase(name, q) or fnmatchcase(owner, q)), None)
    return owner if specification == "module" else name


def automatic(kind: str, optimizer: optim.Optimizer) -> str:
    """Return where the factor acts by default."""
    group = optimizer.param_groups[0]
    if KINDS[kind].place != "gradient" or not isinstance(optimizer, optim.SGD):
        return "lr"
    with_decay = any(group["weight_decay"] for group in optimizer.param_groups)
    return "gradient" if group["momentum"] or (KINDS[kind].decay == "plain" and with_decay) else "lr"


@dataclass(eq=False)
class Attached:
    """What the shadow knows of one adapter."""

    kind: str
    specification: str
    place: str
    epoch: int = 1
    layers: dict[str, list[str]] = field(default_factory=dict)  # layer to names of parameters
    factors: dict[str, float] = field(default_factory=dict)  # of the last step, by layer
    selected: dict[str, bool] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: list[dict[str, np.ndarray]] = field(default_factory=list)  # gradients of an epoch of analysis

    @property
    def decay(self) -> str:
        return KINDS[self.kind].decay

    def analyses(self) -> bool:
        if self.kind == "freezing":
            return self.epoch % 2 == 1
        return self.kind in ("G", "G_prime") and self._what()[0] == "analysis"

    def _what(self) -> tuple[str, float]:
        return reference.schedule(PHASES, self.epoch)[-1]

    def resolve(self, held: Mapping[str, Tensor]) -> None:
        """Find the layers of the parameters that the optimizer holds, in the model's order."""
        self.layers = {}
        for name, p in held.items():
            layer = layer_of(self.specification, self.kind, name, p)
            if layer is not None:
                self.layers.setdefault(layer, []).append(name)
        self.factors = {layer: self.factors.get(layer, 1.0) for layer in self.layers}

    def excluded(self, layer: str, held: Mapping[str, Tensor]) -> bool:
        return self.kind in ("LARS", "LARC") and all(held[name].ndim <= 1 for name in self.layers[layer])

    def measure(self, held: Mapping[str, Tensor], group_of: Mapping[str, Mapping[str, Any]]) -> None:
        """Compute the factors of a step from the gradients as they arrived."""
        names = list(self.layers)
        arrays = {n: p.grad.numpy().copy() for n, p in held.items() if p.grad is not None}
        gradients = [[arrays[n] for n in self.layers[layer] if n in arrays] for layer in names]
        weights = [[held[n].detach().numpy() for n in self.layers[layer]] for layer in names]
        decays = [[group_of[n]["weight_decay"] for n in self.layers[layer]] for layer in names]
        rates = [max(group_of[n]["lr"] for n in self.layers[layer]) for layer in names]
        if self.kind in CHOOSING:
            factor = 0.0 if self.kind == "freezing" else self._what()[1]
            found = [factor if self.selected.get(layer) else 1.0 for layer in names]
            inside = {n: a for n, a in arrays.items() if any(n in members for members in self.layers.values())}
            if self.analyses() and 0 < sum(float(np.abs(a).sum()) for a in inside.values()) < math.inf:
                self.steps.append(inside)
        else:
            constant = reference.constant(names, CONSTANT)
            found = {
                "layer-adaptive": lambda: reference.layer_adaptive(gradients),
                "LARS": lambda: reference.lars(gradients, weights, decays, trust_coefficient=0.1),
                "LARC": lambda: reference.larc(gradients, weights, decays, rates, trust_coefficient=0.1),
                "constant": lambda: constant,
                "chain": lambda: reference.chain([reference.layer_adaptive(gradients), constant]),
                "bounds": lambda: reference.bounds(reference.layer_adaptive(gradients), 0.5, 1.5),
            }[self.kind]()
        self.factors = {n: 1.0 if self.excluded(n, held) else float(f) for n, f in zip(names, found, strict=True)}

    def end_epoch(self, held: Mapping[str, Tensor], chosen_there: Mapping[str, bool]) -> None:
        """Choose layers as the method's equations say; where z is at the threshold to rounding, as was chosen there."""
        trained = {layer: any(held[n].requires_grad for n in names) for layer, names in self.layers.items()}
        if self.analyses():
            live = [
                n for n in self.layers if trained[n] and any(p in step for step in self.steps for p in self.layers[n])
            ]
            epoch = [
                [[step.get(p, np.zeros(held[p].shape)) for p in self.layers[layer]] for layer in self.layers]
                for step in self.steps
            ]
            measure = "G_prime" if self.kind == "G_prime" else "G"
            values = dict(zip(self.layers, reference.directionality(epoch, measure), strict=True)) if epoch else {}
            if self.kind == "freezing":
                values = {layer: 1 - value for layer, value in values.items()}
            some = np.array([values[layer] for layer in live])
            spread = len(some) > 1 and some.std() > 1e-6 * max(abs(some))
            z = dict(zip(live, reference.z_scores(some) if spread else np.zeros(len(some)), strict=True))
            self.measured = {n: (values[n], z[n]) if n in z else (math.nan, math.nan) for n in self.layers}
            self.selected = {}
            for layer in self.layers:
                if layer in live and self.kind == "freezing":
                    margin = values[layer] - FREEZING
                elif layer in live:
                    margin = (abs(z[layer]) if self.kind == "G_prime" else z[layer]) - THRESHOLD
                else:
                    margin = -1.0
                self.selected[layer] = margin > 0 if abs(margin) > 1e-7 else chosen_there[layer]
        self.steps = []
        self.epoch += 1
        first_epochs = {until + 1 for until, _, _ in PHASES}
        if self.kind == "all layers" and self._what()[0] == "analysis" and self.epoch in first_epochs:
            self.selected = dict(trained)


class Shadow:
    """A network and a bare optimizer with one parameter in each group."""

    def __init__(self, model: nn.Module, kind: Callable[..., optim.Optimizer]) -> None:
        self.model, self._kind = model, kind
        self.optimizer: Any = None
        self.names: list[str] = []

    def add(self, parts: Sequence[Sequence[str]], options: Sequence[Mapping[str, Any]]) -> None:
        """Take parameters into the optimizer, with the options of each part."""
        named = dict(self.model.named_parameters())
        groups = [
            {"params": [named[name]], **group} for part, group in zip(parts, options, strict=True) for name in part
        ]
        if self.optimizer is None:
            self.optimizer = self._kind(groups)
        else:
            for group in groups:
                self.optimizer.add_param_group(group)
        self.names += [name for part in parts for name in part]

    def held(self) -> dict[str, Tensor]:
        """The parameters in the optimizer, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if name in self.names}

    def group_of(self) -> dict[str, dict[str, Any]]:
        return dict(zip(self.names, self.optimizer.param_groups, strict=True))

    def step(self, attached: Sequence[Attached]) -> None:
        """Take a step with these adapters."""
        held, group_of = self.held(), self.group_of()
        for adapter in attached:
            adapter.resolve(held)
            adapter.measure(held, group_of)
        before, moves = {}, {}
        kept = {name: (group["lr"], group["weight_decay"]) for name, group in group_of.items()}
        coupled = not isinstance(self.optimizer, optim.AdamW)
        with torch.no_grad():
            for name, p in held.items():
                before[name], moves[name] = p.clone(), 1.0
                for adapter in attached:
                    factor = next((adapter.factors[n] for n, q in adapter.layers.items() if name in q), 1.0)
                    if adapter.place == "lr":
                        group_of[name]["lr"] *= factor
                    elif adapter.place == "update":
                        moves[name] *= factor
                    else:
                        if p.grad is not None:
                            p.grad *= factor
                        if coupled and adapter.decay == "scaled":
                            group_of[name]["weight_decay"] *= factor
            self.optimizer.step()
            for name, p in held.items():
                group_of[name]["lr"], group_of[name]["weight_decay"] = kept[name]
                if moves[name] != 1:
                    p.copy_(before[name] + moves[name] * (p - before[name]))
