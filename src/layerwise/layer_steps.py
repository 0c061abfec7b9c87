"""The optimizer's own step for one layer alone, with the factor that a rule gives it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from .apply import make_place
from .factors import Factors
from .layer_statistics import AS_NUMBERS, LayerStatistics
from .layers import Layer
from .model import Model
from .optimizers import damps_history
from .partition import OUTSIDE, Partition
from .places import automatic_place
from .resolution import circumstances_of, parameters_of, rates_of, requested, resolve
from .rules.base import State, finite_or_one
from .rules.questions import ended_state, is_pair, needs_of, renewed_state
from .rules.state import described
from .statistics import NOTHING, Statistics
from .tensors import holds_weights, runs_on_fakes, same_objects
from .transfer import transferred

BY_LAYER = AS_NUMBERS | {"normalisation_gain"}
"""The statistics that hold one number a layer."""


@dataclass(eq=False)
class Unit:
    """Parameters that step together: those of a layer, or one that is in none.

    Args:
        number: The layer's number, or `OUTSIDE`.
        parameters: Its parameters.
        groups: Numbers of the optimizer's parameter groups, each with the unit's parameters there.
        statistics: Of the layer, for rules that need some.
        expected: How many of the parameters will get a gradient in this backward, at most.
        arrived: How many have.
    """

    number: int
    parameters: tuple[Tensor, ...]
    groups: list[tuple[int, list[Tensor]]]
    statistics: LayerStatistics | None = None
    expected: int = 0
    arrived: int = 0
    partition: Partition = field(init=False)

    def __post_init__(self) -> None:
        self.partition = Partition({id(p): 0 for p in self.parameters})

    @property
    def size(self) -> int:
        """The bytes of all of its gradients."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    @property
    def waits(self) -> bool:
        """Whether a gradient of it has not been used."""
        return any(p.grad is not None for p in self.parameters)


class LayerSteps:
    """Steps of single layers, which together are the optimizer's step with a `LayerwiseLR` of the same rule.

    Args:
        optimizer: An optimizer whose step treats each parameter by itself.
        model: Names the layers, or None.
        rule: A rule for which each layer needs nothing but itself, or None.
    """

    def __init__(self, optimizer: Optimizer, model: Model | None, rule: Any) -> None:
        self.rule = rule
        self._needs = [name for name in needs_of(rule) if name in BY_LAYER] if rule is not None else []
        self._request = requested(rule, model)
        self.decay, self.specification = self._request.decay, self._request.layers
        self.layers: list[Layer] = []
        self._state: State = {}
        self._raw: tuple[Tensor, int] | None = None
        self._known: list[float] | None = None
        self._last: dict[int, Factors] = {}
        self._rates = rates_of(optimizer.param_groups)
        self._choice: tuple[str, bool] | None = None
        # Without the wrappers around it, whose hooks are for the step of the whole.
        self._step = inspect.unwrap(type(optimizer).step)
        self._resolve(optimizer)
        self._choose_place(optimizer)

    def names(self) -> list[str]:
        """Return the layers' names."""
        return [layer.name for layer in self.layers]

    def prepare(self, optimizer: Optimizer) -> bool:
        """Read what holds for all layers of one backward; return whether parameters have come or gone.

        Those are the rates, where a factor acts, and the factors of rules that know them without the gradients.
        """
        groups = optimizer.param_groups
        changed = len(groups) != len(self._grouped) or not all(
            same_objects(group["params"], known) for group, known in zip(groups, self._grouped, strict=True)
        )
        changed = changed or circumstances_of(groups, parameters_of(groups), self._request) != self._circumstances
        if changed or self.layers[0].parameters[0].device != self._device:
            self._resolve(optimizer)
        self._rates = rates_of(groups)
        self._last = {}
        self._dry = self._without_values or runs_on_fakes(self.layers[0].parameters[0])
        if self._dry:
            self._known = None
        if self.rule is not None:
            self._choose_place(optimizer)
            if not self._needs and not self._dry:
                self._know()
        for unit in self.units:
            unit.arrived, unit.expected = 0, sum(p.requires_grad for p in unit.parameters)
        return changed

    def step(self, optimizer: Optimizer, unit: Unit) -> None:
        """Update the unit's parameters as `optimizer.step()` would, and free their gradients; without grad mode."""
        view: Any = object.__new__(type(optimizer))
        view.__dict__.update(optimizer.__dict__)
        groups = optimizer.param_groups
        view.param_groups = [{**groups[number], "params": parameters} for number, parameters in unit.groups]
        for group in view.param_groups:
            group.pop("param_names", None)
        acts = False
        if self.rule is not None and not self._dry and unit.number != OUTSIDE and self.layers[unit.number].included:
            factors = self._last[unit.number] = self._factors(unit, view)
            acts = not factors.neutral
            if acts:
                self._place.act(view, unit.partition, factors)
        self._step(view)
        if acts:
            self._place.finish()
        for p in unit.parameters:
            p.grad = None

    def last_factors(self) -> list[float]:
        """Return each layer's factor at its last step; waits for the device."""
        known = self._known or [1.0] * len(self.layers)
        return [
            self._last[i].read()[0] if i in self._last else (factor if layer.included else 1.0)
            for i, (layer, factor) in enumerate(zip(self.layers, known, strict=True))
        ]

    def last_rates(self) -> list[float]:
        """Return each layer's rate at its last step; the rate before the factor is that of its first parameter."""
        rates = [float(self._rates[number]) for number in self._first_group]
        return [rate * factor for rate, factor in zip(rates, self.last_factors(), strict=True)]

    def outside(self) -> int:
        """Return how many parameters are in no layer, of those that could be."""
        return sum(unit.number == OUTSIDE and holds_weights(unit.parameters[0]) for unit in self.units)

    def end_epoch(self) -> None:
        """Tell a rule that counts epochs that one has ended."""
        self._state = ended_state(self.rule, self._state)

    def _factors(self, unit: Unit, view: Any) -> Factors:
        if not self._needs:
            return Factors([cast(list[float], self._known)[unit.number]], (True,), None)
        statistics = cast(LayerStatistics, unit.statistics)
        # A person may have set a scale of the loss; a gradient scaler is refused.
        groups, grad_scale = view.param_groups, getattr(view, "grad_scale", None)
        if self._in_numbers is not None:
            return Factors(self._in_numbers.numbers(statistics.numbers(groups, grad_scale)), (True,), None)
        own = statistics.compute(groups, grad_scale)
        # What stands for the other layers does not matter.
        every = {name: getattr(own, name).expand(len(self.layers)) for name in self._needs}
        raw, _ = self._checked(self.rule.factors(Statistics(**every), self._state))
        return Factors(raw.narrow(0, unit.number, 1), (True,), None)

    def _know(self) -> None:
        """Take down the factors of a rule that needs no statistics; read only when they have changed."""
        raw, self._state = self._checked(self.rule.factors(NOTHING, self._state))
        if self._raw is None or self._raw[0] is not raw or self._raw[1] != raw._version:
            self._known, self._raw = transferred(finite_or_one(raw)), (raw, raw._version)

    def _checked(self, result: Any) -> tuple[Tensor, State]:
        if is_pair(result) and isinstance(result[0], Tensor) and result[0].shape == (len(self.layers),):
            return result
        raise TypeError(
            f"{described(self.rule)}.factors must return (factors, state), factors of shape [{len(self.layers)}]"
        )

    def _resolve(self, optimizer: Optimizer) -> None:
        """Find the layers, and everything that follows from them; change nothing if that fails."""
        found = resolve(optimizer, optimizer, self._request)
        layers, device = found.layers, found.statistics.device
        self._without_values = found.dry
        if self.rule is not None:
            self._state = renewed_state(self.rule, layers, device, self._state, self.names())
        groups = [group["params"] for group in optimizer.param_groups]
        group_of = {id(p): number for number, parameters in enumerate(groups) for p in parameters}
        members = [(i, layer.parameters) for i, layer in enumerate(layers)]
        inside = {id(p) for layer in layers for p in layer.parameters}
        members += [(OUTSIDE, (p,)) for parameters in groups for p in parameters if id(p) not in inside]
        self.units = [Unit(i, parameters, _by_group(parameters, group_of)) for i, parameters in members]
        if self._needs:
            for unit, layer in zip(self.units, layers, strict=False):  # those outside come last
                unit.statistics = LayerStatistics([layer], self._needs)
        self.unit_of = {id(p): unit for unit in self.units for p in unit.parameters}
        self.layers, self._device, self._circumstances = layers, device, found.circumstances
        self._grouped = [list(parameters) for parameters in groups]
        self._first_group, self._in_numbers = found.first_group, found.in_numbers
        self._raw = self._known = None

    def _choose_place(self, optimizer: Optimizer) -> None:
        """Choose where a factor acts as for the whole, again at each backward, since schedulers can bring momentum."""
        chosen_now = (automatic_place(optimizer, self._request.preferred, self.decay), damps_history(optimizer))
        if chosen_now != self._choice:
            self._choice = chosen_now
            self.place: str = chosen_now[0]
            self._place = make_place(chosen_now[0], self.decay, automatic=chosen_now[1])
            self._place.reads = False  # a reading for each layer would wait in the middle of backward


def _by_group(parameters: Sequence[Tensor], group_of: dict[int, int]) -> list[tuple[int, list[Tensor]]]:
    groups: dict[int, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(group_of[id(p)], []).append(p)
    return sorted(groups.items())
