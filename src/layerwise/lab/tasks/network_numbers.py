"""What a task's network shows beside its updates: sharpness by role, spectra of weights, activations by width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from layerwise.lab.stats.wording import counted
from layerwise.layers import Layer, clean_name, make_layers
from layerwise.rules.heavy_tail import hill_alpha
from layerwise.rules.roles import roles_of
from layerwise.rules.shapes import largest_of
from layerwise.sinks import Record


@dataclass(frozen=True)
class RoleNumbers:
    """The layers of one role: how many, and their average sharpness by that of all weights."""

    role: str
    layers: int
    sharpness: float  # NaN where no update has finite gradients


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a layer's largest matrix: how many singular values, and the Hill estimate of its exponent."""

    layer: str
    count: int
    alpha: float


@dataclass(frozen=True)
class Activations:
    """The mean |output| of each module after some updates, by the values of one parameter of the task."""

    parameter: str
    values: Sequence[float]
    updates: int
    means: Mapping[str, Sequence[float]]  # module -> one for each value

    def exponent(self, module: str) -> float:
        """The slope of log mean |output| over the logarithm of the parameter."""
        points = [
            (math.log(v), math.log(mean)) for v, mean in zip(self.values, self.means[module], strict=True) if mean
        ]
        if len(points) < 2 or not all(math.isfinite(y) for _, y in points):
            return math.nan
        at, height = fmean(x for x, _ in points), fmean(y for _, y in points)
        return sum((x - at) * (y - height) for x, y in points) / sum((x - at) ** 2 for x, _ in points)


def layers_of(model: nn.Module, names: Sequence[str]) -> list[Layer]:
    """Give the layers of these names, a module each, as a monitor has them."""
    parameters = {clean_name(name): p for name, p in model.named_parameters()}
    by_name = {layer.name: layer for layer in make_layers(parameters, "module", model)}
    return [by_name[name] for name in names]


def sharpness(records: Sequence[Record], layers: Sequence[Layer]) -> list[RoleNumbers]:
    """Give the average sharpness of each role's weights by that of all weights, the median over updates.

    S_r = B ‖g_r‖² / n_r, B the size of a batch, g the gradient of the mean loss, n the number of weights. B is left
    out of the ratio. Wang et al. 2025, arXiv 2502.19002.
    """
    roles = roles_of(layers)
    members = {role: [at for at, own in enumerate(roles) if own == role] for role in roles}
    weights = {role: sum(p.numel() for at in own for p in layers[at].parameters) for role, own in members.items()}
    ratios: dict[str, list[float]] = {role: [] for role in members}
    for record in records:
        whole = math.fsum(norm * norm for norm in record.gradient_norm)
        if 0 < whole < math.inf:
            for role, own in members.items():
                share = math.fsum(record.gradient_norm[at] ** 2 for at in own) / whole
                ratios[role].append(share * sum(weights.values()) / weights[role])
    return [RoleNumbers(role, len(own), median(ratios[role] or [math.nan])) for role, own in members.items()]


def spectra(layers: Sequence[Layer]) -> list[Spectrum]:
    """Give the Hill exponent of each layer's largest parameter that is a matrix or a kernel; see `hill_alpha`."""
    found: list[Spectrum] = []
    for layer in layers:
        weight = largest_of(layer)[1]
        if weight.ndim > 1:
            count = min(weight.shape[:2]) * math.prod(weight.shape[2:])
            found.append(Spectrum(layer.name, count, hill_alpha(weight).item()))
    return found


class Outputs:
    """Keeps the mean |output| of each module that owns parameters, of its last evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self._means: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(partial(self._keep, clean_name(name)))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self._means[name] = output.detach().abs().mean()

    def read(self) -> dict[str, float]:
        """Give the means."""
        return {name: float(mean) for name, mean in self._means.items()}


def as_tables(roles: Sequence[RoleNumbers], spectrum: Sequence[Spectrum], activations: Activations | None) -> list[str]:
    """Write tables for a terminal, without what was not measured."""
    written: list[str] = []
    if roles:
        written += ["", f"{'sharpness':<12}of the weights of each role, by that of all weights"]
        written += [f"{'':<12}{one.role:<10}{counted(one.layers, 'layer'):>12}{one.sharpness:>10.3g}" for one in roles]
    if spectrum:
        written += ["", f"{'spectrum':<12}Hill exponent α of each matrix, and its number of singular values"]
        written += [f"{'':<12}{one.layer or '(root)':<28} {one.alpha:>7.3g} {one.count:>7,}" for one in spectrum]
    if activations is not None:
        name, values = activations.parameter, activations.values
        after = f"after {activations.updates} updates, by {name}, and the exponent of {name} in it"
        written += ["", f"{'activations':<12}mean |output| {after}"]
        written.append(f"{'':<12}{'module':<18}{''.join(f'{value:>9g}' for value in values)}{'exponent':>10}")
        for module, means in activations.means.items():
            numbers = "".join(f"{mean:>9.3g}" for mean in means)
            written.append(f"{'':<12}{module or '(root)':<18}{numbers}{activations.exponent(module):>10.2f}")
    return written
