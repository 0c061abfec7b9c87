"""Everything that follows from an optimizer, its model and the arguments of an attachment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .arguments import chosen
from .gains import check_alike
from .late import Pieces, make_pieces
from .layer_statistics import AS_NUMBERS, LayerStatistics
from .layers import (
    Exclusion,
    Layer,
    LayerSpecification,
    as_specification,
    included_layers,
    make_layers,
    named_parameters_of,
)
from .model import Model, as_module, named_parameters
from .optimizers import PlaceName, refuse
from .partition import Partition
from .places import automatic_place, check_groups, check_place
from .replication import refuse_stages
from .rules.elementwise import ElementwiseRule, check_elementwise, is_elementwise
from .rules.questions import default, needs_of
from .sharding import find_pieces
from .tensors import can_be_measured, holds_weights, same_objects
from .trial import try_again

Decay = Literal["auto", "scaled", "plain"]
Circumstances = tuple[int, tuple[list[type], list[bool]], list[bool], list[tuple[bool, bool]]]
"""Number of processes, 0 without a process group; how each parameter is shared; which are trained; groups' options."""
MOST_NUMBERS = 256
"""Layers up to which plain numbers cost less than tensor operations; on the CPU, for elementwise rules."""


@dataclass(frozen=True)
class Request:
    """The arguments of `LayerwiseLR`, with `"auto"` replaced where the rule decides.

    Args:
        rule: The rule.
        model: The model, or None.
        layers: How parameters make up layers.
        exclude: Which layers stay at factor 1.
        apply: Where the factor acts, or `"auto"`.
        preferred: The place that the rule's method takes.
        decay: `"scaled"` or `"plain"`.
        decay_given: Whether the person chose it.
    """

    rule: Any
    model: nn.Module | None
    layers: LayerSpecification
    exclude: Exclusion
    apply: PlaceName | Literal["auto"]
    preferred: str
    decay: str
    decay_given: bool


def requested(
    rule: Any,
    model: Model | None,
    *,
    layers: LayerSpecification | Literal["auto"] = "auto",
    apply: PlaceName | Literal["auto"] = "auto",
    decay: Decay = "auto",
    exclude: Exclusion | Literal["auto"] = "auto",
) -> Request:
    """Return the request; the arguments are those of `LayerwiseLR`."""
    return Request(
        rule=rule,
        model=as_module(model),
        layers=as_specification(chosen(layers, default(rule, "layers"), "module")),
        exclude=chosen(exclude, default(rule, "exclude"), None),
        apply=apply,
        preferred=chosen("auto", default(rule, "place"), "lr"),
        decay=chosen(decay, default(rule, "decay"), "scaled"),
        decay_given=decay != "auto",
    )


@dataclass(frozen=True, eq=False)
class Resolution:
    """What was found.

    Args:
        parameters: The optimizer's parameters, group by group.
        sizes: How many there are in each group.
        layers: The layers.
        statistics: Measures them.
        partition: Which parameters of which group belong to which layer.
        place: Where the factors act.
        in_numbers: The rule, where plain numbers are to be used instead of tensors.
        pieces: Layers that can be measured just before they are updated; None where they cannot.
        included: Which layers are not excluded.
        mask: The same as a tensor; None if all are included.
        first_group: The group of each layer's first parameter.
        circumstances: What else it follows from.
        measurable: How many of the parameters can be measured, as those on the meta device cannot.
    """

    parameters: list[Tensor]
    sizes: list[int]
    layers: list[Layer]
    statistics: LayerStatistics
    partition: Partition
    place: PlaceName
    in_numbers: ElementwiseRule | None
    pieces: Pieces | None
    included: list[bool]
    mask: Tensor | None
    first_group: list[int]
    circumstances: Circumstances
    measurable: int

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [layer.name for layer in self.layers]

    @property
    def dry(self) -> bool:
        """Whether no parameter can be measured, as in a dry run."""
        return not self.measurable

    @property
    def outside(self) -> int:
        """How many parameters belong to no layer, of those that could."""
        could = [p for p in self.parameters if holds_weights(p) and (self.dry or can_be_measured(p))]
        return len(could) - len(self.statistics.layer_of)

    def others(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Return the parameters that belong to no layer, by the model's names or by their place in the optimizer."""
        names = {} if model is None else {id(p): name for name, p in named_parameters(model)}
        return {
            names.get(id(p), f"parameter {i} of the optimizer"): p
            for i, p in enumerate(self.parameters)
            if id(p) not in self.statistics.layer_of
        }

    def holds(self, groups: Sequence[Mapping[str, Any]], request: Request) -> bool:
        """Return whether this is still true.

        It is not when a parameter was added, replaced, cut up by FSDP1, or moved to a device, when a process group was
        made, or when an option of a group has changed that was checked.
        """
        parameters = parameters_of(groups)
        if self.measurable < len(self.parameters) and sum(map(can_be_measured, parameters)) != self.measurable:
            return False
        if not same_objects(self.parameters, parameters) or self.statistics.moved_away():
            return False
        if sizes_of(groups) != self.sizes:
            return False
        return circumstances_of(groups, parameters, request) == self.circumstances


def resolve(optimizer: Optimizer, holder: Optimizer, request: Request) -> Resolution:
    """Find the layers, and everything that follows from them.

    Args:
        optimizer: The optimizer whose step the factors act on.
        holder: The one whose groups hold all parameters, where each process steps only some (ZeRO); else the same.
        request: What was asked for.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the combination would give wrong numbers.
    """
    rule, groups = request.rule, holder.param_groups
    try_again(optimizer)
    refuse(optimizer)
    refuse_stages(rule, parameters_of(groups))
    named = named_parameters_of(holder, request.model, request.layers)
    parameters = parameters_of(groups)
    layers = make_layers(named, request.layers, request.model, find_pieces(parameters, request.model))
    included = included_layers(layers, request.exclude)
    layers = [replace(layer, included=inside) for layer, inside in zip(layers, included, strict=True)]
    automatic = automatic_place(optimizer, request.preferred, request.decay)
    place = automatic if request.apply == "auto" else request.apply
    check_place(optimizer, place, request.decay, decay_given=request.decay_given)
    needs = needs_of(rule)
    elementwise = cast(ElementwiseRule, rule) if is_elementwise(rule) else None
    if elementwise is not None:
        check_elementwise(elementwise)
    if "learning_rate" in needs and any(group.get("lr") is None for group in groups):
        raise ValueError(f"{rule!r} needs the rate, and {type(optimizer).__name__} has no 'lr' in its groups")
    check_alike(layers, needs)
    statistics = LayerStatistics(layers, needs)
    check_groups(optimizer, place, request.decay, statistics.layer_of)
    if statistics.device.type != "cpu" or statistics.sharing is not None or not set(needs) <= AS_NUMBERS:
        elementwise = None
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    return Resolution(
        parameters=parameters,
        sizes=sizes_of(groups),
        layers=layers,
        statistics=statistics,
        partition=Partition(statistics.layer_of),
        place=place,
        in_numbers=elementwise if len(layers) <= MOST_NUMBERS else None,
        pieces=None if elementwise is None else make_pieces(layers, elementwise),
        included=included,
        mask=None if all(included) else torch.tensor(included, device=statistics.device),
        first_group=[group_of[id(layer.parameters[0])] for layer in layers],
        circumstances=circumstances_of(groups, parameters, request),
        measurable=sum(map(can_be_measured, parameters)),
    )


def circumstances_of(
    groups: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], request: Request
) -> Circumstances:
    """Return what was checked at attachment, and can change while the parameters stay the same objects."""
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 0
    # FSDP1 keeps the parameters and cuts what they hold; swap_tensors makes DTensors of them.
    several: Sequence[Tensor] = parameters if processes else ()
    shared = (list(map(type, several)), [bool(getattr(p, "_fsdp_flattened", False)) for p in several])
    asked = callable(request.layers) or callable(request.exclude)
    trained = [p.requires_grad for p in parameters] if asked else []
    options = [
        (isinstance(decay := group.get("weight_decay"), Tensor) or bool(decay), bool(group.get("differentiable")))
        for group in groups
    ]
    return processes, shared, trained, options


def sizes_of(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how many parameters each group has."""
    return [len(group["params"]) for group in groups]


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in groups for p in group["params"]]


def rates_of(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return each group's rate; a tensor is copied, since schedulers write into it."""
    return [rate.detach().clone() if isinstance(rate := group.get("lr"), Tensor) else rate for group in groups]
