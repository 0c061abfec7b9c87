"""Attach a rule to an optimizer."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._arguments import StaysBehind, check_choice, chosen
from ._fused import DealtStep, can_be_dealt
from ._hooks import OptimizerHooks, makes_state_only
from ._places.allowed import (
    automatic_place,
    check_groups,
    check_method,
    check_place,
    check_rows,
    no_effect,
    scales_writes,
    unfit_for_adam,
)
from ._places.averaging import compare_gradients
from ._places.known_groups import KnownGroups
from ._places.trial import try_again, verdict_of
from ._places.units import UnitFactors, UnitStatistics, UnitStep, check_units, with_units
from ._rows import renew, whole_of
from ._tensors import (
    can_be_measured,
    has_values,
    holds_weights,
    moved,
    runs_on_fakes,
    several_processes,
    warn_without_values,
)
from ._writes import HALF, is_compiled
from .apply import (
    Factors,
    FinishedStep,
    Partition,
    Place,
    PrivateStep,
    Split,
    Step,
    Writes,
    damps_history,
    make_place,
)
from .layers import (
    Exclusion,
    Layer,
    LayerSpecification,
    Model,
    SplitSpecification,
    as_module,
    as_specification,
    as_split,
    flattened,
    included_layers,
    make_layers,
    named_parameters,
    named_parameters_of,
    rows_of,
    warn_of_unmeasured,
)
from .optimizers import (
    PLACES,
    PlaceName,
    acting_optimizer,
    check_backward_is_over,
    has_capturable,
    is_being_captured,
    is_foreign,
    refuse,
    unwrap,
)
from .rules.base import Rule, Selection, check_rule, is_pair
from .rules.by_name import arguments_of, make_rule
from .rules.combine import Normalization, check_bounds, normalized
from .rules.combine import bounds as bounded
from .rules.elementwise import check_elementwise, is_elementwise
from .rules.replication import check_processes, refuse_stages
from .rules.roles import roles_of
from .rules.state import State, changed_tensors, check_saved, copied, copy_into, described
from .rules.unfreezing import FrozenLayers, is_trainable
from .sharding import absent, can_compare, find_shards
from .statistics import (
    AS_NUMBERS,
    NOTHING,
    OF_STEP,
    WEIGHT_NORMS,
    FiniteGradients,
    LayerStatistics,
    OnNonfinite,
    Statistics,
    check_alike,
    check_needs,
)

Decay = Literal["auto", "scaled", "plain"]
_params_of = itemgetter("params")
MOST_NUMBERS = 256
"""Layers up to which plain numbers cost less than tensor operations; on the CPU, for elementwise rules."""


class Request:
    """The arguments of `LayerwiseLR`, with `"auto"` replaced where the rule decides."""

    def __init__(
        self,
        rule: Rule,
        model: Model | None,
        *,
        layers: LayerSpecification | Literal["auto"] = "auto",
        apply: PlaceName | Literal["auto"] = "auto",
        decay: Decay = "auto",
        exclude: Exclusion | Literal["auto"] = "auto",
        split: SplitSpecification | None = None,
    ) -> None:
        self.rule, self.model = rule, as_module(model)
        self.split = as_split(split)
        self.apply: PlaceName | Literal["auto"] = apply
        given: LayerSpecification = as_specification(chosen(layers, rule.default_layers, "module"))
        self.units = given == "unit"
        self.layers: LayerSpecification = "parameter" if self.units else given
        if self.units:
            check_units(rule, self.split)
        self.exclude: Exclusion = chosen(exclude, rule.default_exclude, None)
        self.preferred: str = chosen("auto", rule.default_place, "lr")
        self.decay: str = chosen(decay, rule.default_decay, "scaled")
        self.decay_given = decay != "auto"


class Resolution:
    """The layers of an optimizer's parameters, and everything that follows from them.

    The factors act on the step of `optimizer`. `holder` has the groups with all parameters, where each process steps
    only some of them (ZeRO); else it is the same.
    """

    def __init__(self, optimizer: Optimizer, holder: Optimizer, request: Request) -> None:
        rule, groups = request.rule, holder.param_groups
        try_again(optimizer)
        refuse(optimizer)
        self.parameters = parameters_of(groups)
        refuse_stages(rule, self.parameters)
        named = named_parameters_of(holder, request.model, request.layers)
        shards = find_shards(self.parameters, request.model)
        layers = make_layers(named, request.layers, request.model, shards, request.split)
        self.rows = rows_of(layers)
        self.included = included_layers(layers, request.exclude)
        self.layers = [replace(layer, included=own) for layer, own in zip(layers, self.included, strict=True)]
        self.names = [layer.name for layer in layers]
        automatic = automatic_place(optimizer, request.preferred, request.decay)
        if request.units:
            self.layers = list(map(with_units, self.layers))
        if self.rows or request.units:
            automatic = check_rows(optimizer, holder, rule, request.apply, automatic, units=request.units)
        automatic = automatic if automatic in rule.places else rule.places[0]
        self.place: PlaceName = automatic if request.apply == "auto" else request.apply
        check_method(optimizer, rule, self.place, automatic=request.apply == "auto")
        check_place(optimizer, self.place, request.decay, decay_given=request.decay_given)
        if is_elementwise(rule):
            check_elementwise(rule)
        if {"learning_rate", *OF_STEP} & set(rule.needs) and any(group.get("lr") is None for group in groups):
            raise ValueError(f"{rule!r} needs the rate, and {type(optimizer).__name__} has no 'lr' in its groups")
        check_alike(self.layers, rule.needs)
        self.units = UnitStatistics(self.layers, rule.needs) if request.units else None
        self.statistics = statistics = self.units or LayerStatistics(self.layers, rule.needs)
        check_groups(optimizer, self.place, request.decay, statistics.layer_of)
        alone = statistics.device.type == "cpu" and statistics.sharing is None and set(rule.needs) <= AS_NUMBERS
        few = self.units is None and len(layers) <= MOST_NUMBERS
        self.in_numbers = rule if is_elementwise(rule) and alone and few else None
        # Whether factors follow from what the step has changed.
        self.afterwards = not OF_STEP.isdisjoint(rule.needs)
        if self.afterwards and optimizer is not holder and several_processes():
            raise ValueError(
                f"{described(rule)} needs what the step has changed, and each process of {type(holder).__name__} steps "
                "only some of the parameters: shard with FSDP, or use a rule that needs no direction_norm, such as LARS"
            )
        self.partition = Partition(statistics.layer_of, self.rows)
        self.inside = {id(whole_of(p)) for p in statistics.members}
        self.mask = None if all(self.included) else torch.tensor(self.included, device=statistics.device)
        group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self.first_group = [group_of[id(whole_of(layer.parameters[0]))] for layer in layers]
        self.measurable = sum(map(can_be_measured, self.parameters))
        self.dry = not self.measurable  # as in a dry run on the meta device
        self.circumstances = circumstances_of(groups, self.parameters, request)
        # Options of another package that are None: once set, they may turn parts of a step on, and it is tried anew.
        foreign = is_foreign(type(optimizer))
        self.unset = [[n for n, value in group.items() if value is None] for group in groups] if foreign else []

    @property
    def outside(self) -> int:
        """How many parameters belong to no layer, of those that could."""
        could = [p for p in self.parameters if holds_weights(p) and (self.dry or can_be_measured(p))]
        return len(could) - len(self.inside)

    def others(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Return the parameters that belong to no layer, by the model's names or by their place in the optimizer."""
        names = {} if model is None else {id(p): name for name, p in named_parameters(model)}
        return {
            names.get(id(p), f"parameter {i} of the optimizer"): p
            for i, p in enumerate(self.parameters)
            if id(p) not in self.inside
        }

    def renew_rows(self) -> None:
        """View the memory that the parameters have now; raise where the gradient of one has no rows."""
        renew(self.rows)
        for rows in self.rows:
            gradient = rows.whole.grad
            if gradient is not None and gradient.layout is not torch.strided:
                raise ValueError(
                    "split: the gradient of a parameter that is split is sparse, and parts are rows of a dense one; "
                    "use sparse=False in its module, or leave it out of split"
                )

    def holds(self, groups: Sequence[Mapping[str, Any]], request: Request) -> bool:
        """Return whether this is still true.

        It is not when a parameter was added, replaced, sharded by FSDP1, or moved to a device. Nor is it when a process
        group was made, or an option of a group has changed that was checked.
        """
        parameters = list(chain.from_iterable(map(_params_of, groups)))
        if self.measurable < len(self.parameters) and sum(map(can_be_measured, parameters)) != self.measurable:
            return False
        return (
            len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and self.statistics.members[0].device == self.statistics.device
            and circumstances_of(groups, parameters, request) == self.circumstances
            and (not self.unset or self._are_unset(groups))
        )

    def _are_unset(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        pairs = zip(groups, self.unset, strict=True)
        return all(group.get(name) is None for group, names in pairs for name in names)


def circumstances_of(groups: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], request: Request) -> Any:
    """Return what was checked at attachment, and can change while the parameters stay the same objects.

    They are: the number of processes; how each parameter is shared; which are trained; each group's size and options,
    since schedulers and checkpoints can bring momentum and weight decay.
    """
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 0
    # FSDP1 keeps the parameters and cuts what they hold; swap_tensors makes DTensors of them.
    shared = [(type(p), bool(getattr(p, "_fsdp_flattened", False))) for p in parameters] if processes else []
    asked = callable(request.layers) or callable(request.exclude)
    trained = list(map(is_trainable, parameters)) if asked else []
    options: list[Any] = []
    for group in groups:
        decay = group.get("weight_decay")
        unread = isinstance(decay, Tensor) and not (decay.is_cpu and has_values(decay))
        decays = unread or bool(decay)
        switches = map(bool, map(group.get, ("differentiable", "momentum", "nesterov")))
        options.append((len(group["params"]), decays, *switches))
    return processes, shared, trained, options


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [p for group in groups for p in group["params"]]


def rates_of(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return each group's rate; a tensor is copied, since schedulers write into it."""
    rates: list[Any] = []
    for group in groups:
        rate = group.get("lr")
        rates.append(rate.detach().clone() if isinstance(rate, Tensor) else rate)
    return rates


# --- The rule on its optimizer ---------------------------------------------------------------------------------------

INDEPENDENT = WEIGHT_NORMS | {"learning_rate"}
"""Statistics that do not depend on gradients."""
STEPS_AS_BARE = "steps are those of the optimizer alone, and factors are 1, until they do"


class AttachedRule:
    """Measures the layers at each step, lets the rule's factors act, and follows the optimizer where it changes.

    `enabled` says whether it takes part in steps, `found` what the layers are and `state` what the rule remembers.
    `factors` are those of the last step and `rates` the rates of its parameter groups; both are None before the first.
    `finite` raises before a step whose gradients are not finite; with None the step is taken.
    """

    def __init__(self, holder: Optimizer, request: Request, finite: FiniteGradients | None) -> None:
        optimizer = acting_optimizer(holder)
        self.enabled = self.attached = True
        self.state: State = {}
        self.has_stepped = False
        self._frozen_layers = FrozenLayers()
        self._request, self._rule, self._finite = request, request.rule, finite
        self._idle = self._dry = self._measured = False
        self._now: list[dict[str, Any]] = []
        self._holder, self._optimizer = weakref.ref(holder), weakref.ref(optimizer)
        verdict = verdict_of(optimizer)
        replaces = verdict is not None and verdict.replaces
        self._known = KnownGroups(holder.param_groups) if replaces else None
        self._take(Resolution(optimizer, self._source, request))
        self._check_beside(OptimizerHooks.members_of(optimizer))
        # The other processes wait for it, so one in which the rule is paused compares too.
        self._compares = (
            verdict is not None
            and verdict.communicates
            and bool(set(self._rule.needs) - INDEPENDENT)
            and several_processes()
            and can_compare()
        )
        self._process_group = verdict.process_group if verdict is not None else None
        OptimizerHooks.add(optimizer, self)
        self.update_requires_grad()
        if self._rule.trained(self.state) is not None:
            weakref.finalize(optimizer, self._frozen_layers.freeze, [], None)
        # ZeRO recreates its inner optimizer when a group is added.
        self._follows = None if optimizer is holder else holder.register_step_pre_hook(self._follow)

    def _check_beside(self, others: Sequence[Any]) -> None:
        """Raise where a rule of the finished step would measure, and undo, what another adapter has scaled."""
        for other in others:
            if self.found.afterwards or other.found.afterwards:
                raise ValueError(
                    f"{described(self._rule)} beside {described(other.rule)} on one optimizer: one follows from the "
                    "finished step, and would measure the other's factors; attach chain(…) of both, or detach() one"
                )
            if self.found.rows and other.found.rows:
                raise ValueError(
                    f"{described(self._rule)} beside {described(other.rule)} on one optimizer, each with split=: "
                    "attach chain(…) of both, or detach() one"
                )

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._rule

    @property
    def layers(self) -> list[Layer]:
        """The layers."""
        return self.found.layers

    @property
    def place(self) -> PlaceName:
        """Where the factors act."""
        return self.found.place

    @property
    def route(self) -> str:
        """How the factors act under `"lr"` and `"update"`, in a step that is not compiled."""
        if self.found.afterwards:
            return "factors of the finished step"
        if self._scales:
            return "scaled writes"
        return "divided groups" if self.place == "lr" else "interpolation"

    @property
    def attached_to(self) -> str:
        """The name of the optimizer whose groups hold all parameters, or what has become of it."""
        if not self.attached:
            return "detached"
        holder = self._holder()
        return "an optimizer that no longer exists" if holder is None else type(holder).__name__

    def check_current(self) -> None:
        """Raise if training no longer uses the optimizer or the parameters, unless this is detached."""
        if not self.attached:
            return
        self._required()
        model = self._request.model
        used = set[int]() if model is None else set(map(id, model.parameters()))
        if used and not any(id(whole_of(p)) in used for layer in self.layers for p in layer.parameters):
            raise RuntimeError(
                "the model has other parameters now than the optimizer of this LayerwiseLR, whose steps do not change "
                "the model; make an optimizer of model.parameters() and attach to it"
            )

    def last_factors(self) -> list[float]:
        """Return each layer's factor at the last step, 1 before the first; waits for the device."""
        return [1.0] * len(self.found.layers) if self.factors is None else self.factors.last()

    def last_rates(self) -> list[float]:
        """Return each layer's rate at the last step; NaN where a group has none. Waits for the device."""
        factors = self.last_factors()
        by_group = self.rates if self.rates is not None else rates_of(self._groups)
        rates = [by_group[group] for group in self.found.first_group]
        return [float("nan") if rate is None else float(rate) * f for rate, f in zip(rates, factors, strict=True)]

    def update_requires_grad(self) -> None:
        """Set `requires_grad` where the rule does, and only while it takes part in steps."""
        acts = self.attached and self.enabled
        self._frozen_layers.freeze(self.found.layers, self._rule.trained(self.state) if acts else None)

    def end_epoch(self) -> None:
        """Let the rule go on to the next epoch."""
        if self.has_values():
            self.state = self._rule.end_epoch(self.state)
            self.update_requires_grad()

    def save(self) -> Any:
        """Return a copy of the rule's state."""
        return copied(self.state)

    def has_values(self) -> bool:
        """Return whether the parameters' values exist."""
        first = self.found.layers[0].parameters[0]
        return has_values(first) and not runs_on_fakes(first)

    def load(self, saved: Any) -> None:
        """Go on with a saved state of the rule."""
        self.state = self._rule.load(saved, self.state)
        self._last_raw, self._compared, self.has_stepped = None, False, True
        self.update_requires_grad()

    def detach(self) -> None:
        """Take the hooks off; a second call does nothing."""
        optimizer = self._optimizer()
        if self.attached and optimizer is not None:
            OptimizerHooks.remove(optimizer, self)
            # A new place keeps nothing of a step that failed.
            self._place = self._new_place()
            self._finished = FinishedStep(self.found.statistics.members)
        if self._follows is not None:
            self._follows.remove()
        self.attached = False
        self.update_requires_grad()

    # --- What the optimizer's hooks call ------------------------------------------------------------------------------

    def prepare(self, optimizer: Any) -> None:
        """See what has changed since the last step, and raise before anything else does if a gradient is not finite."""
        if torch._C._current_graph_task_id() != -1:
            check_backward_is_over(optimizer)
        self.has_stepped = True
        holder = self._holder()
        self._now = groups = self._groups if holder is None or self._known is not None else holder.param_groups
        if self.found.rows:
            self.found.renew_rows()
        if not self.found.holds(groups, self._request):
            self._frozen_layers.freeze([], None)  # callables may ask for requires_grad
            self._take(Resolution(optimizer, self._source, self._request))
            self.update_requires_grad()
            self._now = self._groups
        if self.found.units is not None:
            self.found.units.check_dense()
        faked = torch._C._len_torch_dispatch_stack() > 0 and runs_on_fakes(self.found.layers[0].parameters[0])
        dry = faked or not self.found.measurable
        if dry and not self._dry:
            self.factors = self.rates = None
            if not self.found.dry or self._measured:  # else the constructor has warned
                warn_without_values(STEPS_AS_BARE, 2)
        self._dry, self._measured = dry, self._measured or not dry
        self._idle = dry or (not optimizer.state and makes_state_only(optimizer.param_groups))
        if self._idle:
            return
        if not self._compared:
            check_processes(self._rule, self.state, self.found.layers, self.found.statistics)
            self._compared = True
        if self._finite is not None:
            with absent(not self.enabled):
                self._finite.check(getattr(optimizer, "found_inf", None))
        if self._compares:
            self._compares = False
            compare_gradients(optimizer, self._process_group)

    def measure(self, optimizer: Any) -> bool:
        """Compute this step's factors from the gradients as they arrived; return whether any of them may not be 1."""
        groups, self._now = self._now, []
        if self._before is not None:  # of a step that failed
            self._before = None
            self._finished.forget()
        if self._idle:
            return False
        found, grad_scale = self.found, getattr(optimizer, "grad_scale", None)
        if not self.enabled:
            self._stand_by(optimizer)
            return False
        if found.in_numbers is not None:
            numbers = found.in_numbers.numbers(found.statistics.numbers(groups, grad_scale))
            self.factors = Factors(numbers, found.included, found.mask)
            self.rates = rates_of(groups)
            return not self.factors.neutral
        statistics = NOTHING
        if self._rule.asks(self.state):
            found_inf = getattr(optimizer, "found_inf", None)
            statistics = found.statistics.compute(groups, grad_scale, found_inf)
            if found.afterwards:
                self.rates = rates_of(groups)
                if is_being_captured(found.statistics.device):
                    self._check_replays_of_finished(statistics)
                self._before = statistics
                return True
        self._ask(statistics)
        self.rates = rates_of(groups)
        return self.factors is None or not self.factors.neutral

    @torch.no_grad()
    def _ask(self, statistics: Statistics) -> None:
        """Let the rule make factors of the statistics."""
        found, result = self.found, self._rule.factors(statistics, self.state)
        if not is_pair(result):
            raise TypeError(
                f"{described(self._rule)}.factors returned {type(result).__name__}; it must return (factors, state)"
            )
        raw, state = result
        if is_being_captured(found.statistics.device):
            changed = self._changed_tensors(state)
            raw = raw.clone() if isinstance(raw, Tensor) else raw  # it may be a tensor of the old state
            copy_into(changed)
            if self._rule.counts_epochs():
                logger.warning(
                    "%s counts epochs, and replays keep the factors of this one: capture anew after each end_epoch()",
                    described(self._rule),
                )
        else:
            self.state = state
        if not isinstance(raw, Tensor) or raw.shape != (found.statistics.count,):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(
                f"{described(self._rule)} returned factors of shape {shape}; return a tensor of shape "
                f"({found.statistics.count},), one factor for each layer"
            )
        if found.statistics.paused is not None:
            # Bounds and rules of one's own may make another number than 1 of NaN.
            paused = found.statistics.paused
            raw = torch.where(moved(paused, raw.device), 1.0, raw)
        if self._last_raw is None or self._last_raw[0] is not raw or self._last_raw[1] != raw._version:
            units = found.units
            self.factors = Factors(raw, found.included, found.mask) if units is None else UnitFactors(raw, units)
            self._last_raw = (raw, raw._version)

    def _changed_tensors(self, new: State) -> list[tuple[Tensor, Tensor]]:
        """Return what a step that a CUDA graph captures changes in the rule's state; raise if replays would not."""
        try:
            return changed_tensors(self.state, new)
        except ValueError as error:
            raise ValueError(
                f"{described(self._rule)} counts in Python ({error} at this step), and replays of a CUDA graph would "
                "repeat this step's factors: call optimizer.step() outside of the graph, or if only the first steps "
                "count, before the capture"
            ) from None

    @torch.no_grad()
    def _check_replays_of_finished(self, before: Statistics) -> None:
        """Raise before the step where `_changed_tensors` would after it, as if the step moved nothing."""
        statistics = self.found.statistics
        after = statistics.after(before, statistics.squares([]), self._groups, rates_of(self._groups))
        self._changed_tensors(self._rule.factors(after, self.state)[1])

    def _scale_finished(self) -> None:
        """Ask the rule for the factors of the finished step, and let them act."""
        statistics, before, self._before = self.found.statistics, self._before, None
        assert before is not None
        assert self.rates is not None
        squares = statistics.changed_squares(self._finished.old)
        self._ask(statistics.after(before, squares, self._groups, self.rates))
        factors = self.factors
        assert factors is not None
        layers = [statistics.layer_of[id(p)] for p in statistics.members]
        if isinstance(factors, UnitFactors):
            self._finished.scale(factors.of_members())
        elif factors.numbers is None and has_capturable(self._source):
            each = {dtype: factors.tensor.to(dtype).unbind() for dtype in {p.dtype for p in statistics.members}}
            pairs = zip(layers, statistics.members, strict=True)
            self._finished.scale([moved(each[p.dtype][number], p.device) for number, p in pairs])
        else:
            numbers = factors.read()
            self._finished.scale([numbers[n] for n in layers])

    def _stand_by(self, optimizer: Any) -> None:
        """Enter the collectives that the other processes enter, which may not be paused; change no weight.

        Their statistics are NaN then, and so is what the rule makes of them. Its state goes on as theirs does, since it
        may count the steps after which they measure again.
        """
        found, statistics = self.found, NOTHING
        if found.statistics.sharing is None:
            return
        with absent(), torch.no_grad():
            if self._rule.asks(self.state):
                statistics = found.statistics.compute(self._groups)
                if found.afterwards:
                    squares = found.statistics.squares([])
                    statistics = found.statistics.after(statistics, squares, self._groups, rates_of(self._groups))
            result = self._rule.factors(statistics, self.state)
        if "gradients" not in self._rule.needs:  # else the rule's own collective leaves the step out of its sums
            self.state = result[1]

    @property
    def comes_first(self) -> bool:
        """Whether it acts before members that multiply weight decay too, which may add it to the gradients."""
        return self._request.decay == "plain"

    @property
    def takes_part(self) -> bool:
        """Whether it has something to do in a step: also while paused, where a collective may follow."""
        return self.enabled or self.found.statistics.sharing is not None or self._compares

    def act(self, view: Any, *, private: bool, writes: Writes) -> list[Split]:
        """Let this step's factors act on the view."""
        if self._before is not None:
            self._finished.keep()
            return []
        assert self.factors is not None  # measured
        acting = view if self._known is None else self._known
        scales = writes if self._scales and not is_compiled() else None
        kind = UnitStep if self.found.units is not None else PrivateStep if private else Step
        if kind is PrivateStep and scales is None and view.param_groups[0].get("fused") and can_be_dealt(view):
            kind = DealtStep
        return self._place.act(kind(acting, self.found.partition, self.factors, scales))

    def finish(self) -> None:
        """Act after the step."""
        if self.found.rows:  # the step may have replaced memory
            self.found.renew_rows()
        self._place.finish()
        if self._before is not None:
            self._scale_finished()

    @property
    def _source(self) -> Any:
        """What holds the groups with all parameters."""
        holder = self._required()
        if self._known is None:
            return holder
        self._known.update(holder.param_groups)
        return self._known

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The groups with all parameters."""
        return self._source.param_groups

    # --- How it is put together ---------------------------------------------------------------------------------------

    def _take(self, found: Resolution) -> None:
        """Go on with these layers, and with what is still true of the rule's state."""
        before = self.found.names if self.state else []
        self.state = self._rule.renewed(found.layers, found.statistics.device, self.state, before)
        self.found = found
        if self._finite is not None:
            self._finite.look_at(found.layers, found.others(self._request.model), self._request.model)
        self._place = self._new_place()
        self._finished = FinishedStep(found.statistics.members)
        self._before: Statistics | None = None
        self._scales = found.units is None and scales_writes(self._optimizer(), found.place)
        self._compared = False
        self._last_raw: tuple[Tensor, int] | None = None
        self.rates: list[Any] | None = None
        self.factors: Factors | None = None

    def _new_place(self) -> Place:
        dampens = self._request.apply == "auto" and damps_history(self._optimizer())
        return make_place(self.place, self._request.decay, dampens=dampens)

    def _follow(self, holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inner, hooked = acting_optimizer(holder), self._optimizer()
        if inner is not hooked:
            OptimizerHooks.add(inner, self)
            self._optimizer = weakref.ref(inner)

    def _required(self) -> Optimizer:
        holder = self._holder()
        if holder is None:
            raise RuntimeError(
                "the optimizer of this LayerwiseLR no longer exists; attach to the one in use, after each time that it "
                "is created. To continue training, carry the state over with state_dict() and load_state_dict(). To "
                "keep the last values, call detach() while the optimizer exists"
            )
        return holder


# --- The public class ------------------------------------------------------------------------------------------------

logger = logging.getLogger("layerwise")


class LayerwiseLR(StaysBehind):
    """Gives each layer of a network its own learning rate, on any optimizer.

    `lr_l = lr · f_l`, where the rule says how large the layer's factor f_l is at each step and `apply` where it acts.

    Attaching registers hooks; the optimizer's `param_groups`, `state_dict()`, `step` and type stay as they are, so that
    schedulers, gradient scalers, clipping and checkpoints work as without it. A copy or a pickle of the optimizer has
    no hooks, and one of a module that holds the adapter has None in its place, with a warning: attach again there, and
    carry the state over with `state_dict()`. Where an optimizer is recreated, attach to the new one; the adapter of one
    that is gone raises, and only its `state_dict()` can still be read.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper of Accelerate or Fabric around one. Its parameters may be
            sharded (FSDP, tensor parallel): the layers' statistics are those of the whole layers, with one collective a
            step for each distinct mesh.
        rule: How large the factors are; one of `layerwise.rules`, or a `Rule` of your own.
        model: Names the layers. A list or dictionary of modules counts as one model, whose names begin with the index
            or the key. None takes the names of an optimizer built from `model.named_parameters()`.
        layers: `"module"` (the module that directly owns the parameters: weight and bias together; a MultiheadAttention
            or a convolution of PyTorch Geometric as a whole), `"parameter"`, `"unit"`, a list of fnmatch patterns, a
            callable `(name, parameter) -> layer name or None`, or a dictionary of layer names and lists of tensors,
            such as `{"log_alpha": [log_alpha]}`, which needs no model. `"auto"`: what the rule's paper took. A
            parameter without a layer keeps factor 1. `"unit"` is `"parameter"` with a factor for each output row of
            parameters of two or more dimensions, on the gradient or the update; `get_last_factors()` has their mean.
        apply: Where the factor acts. `"gradient"`: `g ← f g` before the optimizer sees it, so inside the momentum; the
            gradient is left so. `"lr"`: this step's rate. `"update"`: `w ← w_old + f (w_new − w_old)`. `"auto"`: what
            the rule's paper did for this optimizer.
        decay: Whether under `"gradient"` the factor multiplies coupled weight decay too: `"scaled"` or `"plain"`.
        exclude: Layers left at factor 1: None, fnmatch patterns of layer names, or a callable
            `(parameter name, parameter) -> bool`, which must hold for all of the layer's parameters.
        bounds: `(low, high)`, a clamp of the factors.
        split: Parts of parameters that are layers of their own: fnmatch patterns of parameter names, and for each into
            how many equal parts of rows it is cut, `{"*.qkv.weight": 3}`, their sizes, `(768, 256, 256)`, or their
            names, `("q", "k", "v")`. Rows are outputs. A part is named `"attn.qkv.weight[q]"`; its factor acts on the
            gradient or the update.
        normalize: Divides the factors by their mean over the layers, so that they are no larger rate: `"mean"`,
            `"harmonic"`, `"weighted"` (over weights), `"max"` (by the largest); None for not. Before `bounds`.
        on_nonfinite: What a gradient with NaN or infinity in it does. `"ignore"`: the step is taken, and rules that
            read gradients give its layer factor 1. `"raise"`: `FloatingPointError`, which names layer and step, before
            parameters, states or this adapter's factors change; not where a gradient scaler skips such steps. It reads
            the gradients once more and waits for the device (one more collective, if sharded) at each step.

    Warns:
        UserWarning: All parameters are one layer because their names hold no modules, or the rule is in doubt about
            the layers, such as `LayerDecay` about their depths.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the combination would give wrong numbers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> from layerwise.rules import Constant
        >>> adapter = LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> adapter.get_last_lr()
        {'0': 0.2, '2': 0.1}
    """

    _copy_remedy = (
        "it belongs to one optimizer, whose hooks are not copied either: attach a new one to the copy's optimizer, and "
        "carry the state over with state_dict() and load_state_dict()"
    )

    def __init__(
        self,
        optimizer: Any,
        rule: Any,
        model: Model | None = None,
        *,
        layers: LayerSpecification | Literal["auto"] = "auto",
        apply: PlaceName | Literal["auto"] = "auto",
        decay: Decay = "auto",
        exclude: Exclusion | Literal["auto"] = "auto",
        split: SplitSpecification | None = None,
        bounds: tuple[float, float] | None = None,
        normalize: Normalization | None = None,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        holder = unwrap(optimizer)
        inner = acting_optimizer(holder)
        refuse(inner)
        check_needs(check_rule(rule).needs)
        check_choice("apply", apply, ("auto", *PLACES))
        check_choice("decay", decay, ("auto", "scaled", "plain"))
        check_choice("on_nonfinite", on_nonfinite, ("ignore", "raise"))
        rule = rule if normalize is None else normalized(rule, normalize)
        rule = rule if bounds is None else bounded(rule, *check_bounds(bounds))
        self._request = Request(rule, model, layers=layers, apply=apply, decay=decay, exclude=exclude, split=split)
        finite = FiniteGradients() if on_nonfinite == "raise" else None
        named = named_parameters_of(holder, self._request.model, self._request.layers)
        warn_of_unmeasured(named, STEPS_AS_BARE)
        self._attached = AttachedRule(holder, self._request, finite)
        self._epoch = 1
        self._has_warned = False
        try:
            for message in self._remarks(inner):
                logger.warning(message)
            found = self._attached.found.layers
            for message in flattened(found, self._request.layers) + rule.doubts(found):
                warnings.warn(message, UserWarning, stacklevel=2)
        except BaseException:  # warnings may be errors
            self._attached.detach()
            raise

    # --- Questions and answers ----------------------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """The rule; attach another adapter for another one."""
        return self._request.rule

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return self._attached.found.names

    @property
    def roles(self) -> dict[str, str]:
        """The role of each layer in the network, as rules such as `ByRole` read it from classes and names."""
        return dict(zip(self.layers, roles_of(self._attached.layers), strict=True))

    @property
    def apply(self) -> PlaceName:
        """Where the factors act: `"gradient"`, `"lr"` or `"update"`."""
        return self._attached.place

    @property
    def decay(self) -> str:
        """Whether coupled weight decay is `"scaled"` with the gradient or `"plain"`."""
        return self._request.decay

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1 by `end_epoch()`."""
        return self._epoch

    @property
    def counts_epochs(self) -> bool:
        """Whether the rule counts epochs, so that `end_epoch()` is to be called."""
        return self.rule.counts_epochs()

    @property
    def enabled(self) -> bool:
        """Whether the factors act; not inside `paused()`."""
        return self._attached.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._attached.enabled = value
        self._attached.has_stepped = True  # a step while it is paused is not seen
        self._attached.update_requires_grad()

    def layer_table(self) -> list[Layer]:
        """The layers themselves, with their parameters."""
        return list(self._attached.layers)

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer at the last step; 1 before the first. Waits for the device.

        With `layers="unit"` it is the mean over the layer's rows. Those of the last step remain after `detach()`.

        Raises:
            RuntimeError: The optimizer no longer exists, or the model has other parameters now.
        """
        self._attached.check_current()
        return dict(zip(self.layers, self._attached.last_factors(), strict=True))

    def get_last_lr(self) -> dict[str, float]:
        """Return the rate of each layer at the last step, `lr · f_l`, f_l of this adapter alone. Waits for the device.

        The base rate is that of the parameter group of the layer's first parameter, its weight as a rule.

        Raises:
            RuntimeError: The optimizer no longer exists, or the model has other parameters now.
        """
        self._attached.check_current()
        return dict(zip(self.layers, self._attached.last_rates(), strict=True))

    def get_last_selection(self) -> dict[str, Selection]:
        """Return what a rule that chooses layers found of each: its value, its ẑ, and whether it is chosen.

        Value and ẑ are NaN where nothing has been measured: before the end of the first epoch of analysis, for layers
        that received no gradient, and for choices at random. Before the first `end_epoch()` the log says so, once.

        Raises:
            ValueError: The rule chooses no layers.
            RuntimeError: The optimizer no longer exists, or the model has other parameters now.
        """
        self._attached.check_current()
        selection = self.rule.get_selection(self._attached.state)
        if selection is None:
            raise ValueError(
                f"{described(self.rule)} chooses no layers; attach a rule that does, such as GradientAmplification"
            )
        chosen_none = self._attached.rates is not None and not any(one.selected for one in selection)
        if self._epoch == 1 and chosen_none and not self._has_warned:
            logger.warning("nothing is chosen yet, since no epoch has ended: call end_epoch() after each epoch")
            self._has_warned = True
        return dict(zip(self.layers, selection, strict=True))

    def end_epoch(self) -> None:
        """Tell rules that count epochs that one has ended; the first is epoch 1. May wait for the device.

        Where no step has been taken until then, the log says so, once.

        Raises:
            RuntimeError: The optimizer no longer exists, or the model has other parameters now.
        """
        self._attached.check_current()
        if not self._attached.has_stepped and self._attached.attached:
            self._attached.has_stepped = True  # one line is enough
            logger.warning(
                "end_epoch() is called, and %s has taken no step with this LayerwiseLR: attach to the optimizer whose "
                "step() the loop calls",
                self._attached.attached_to,
            )
        self._attached.end_epoch()
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's state: names, numbers and tensors, which `torch.load(weights_only=True)` reads."""
        return {
            "version": 1,
            "rule": self.rule.rule_kind,
            "arguments": described(self.rule),
            "layers": self.layers,
            "epoch": self._epoch,
            "state": copied(self._attached.state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of another adapter with the same rule and layers.

        A rule with other arguments goes on with its own, and the log names both.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is of another version, or of other layers; nothing is changed then.
        """
        check_saved(state_dict, self.rule, self.layers)
        self._attached.load(state_dict["state"])
        self._epoch = state_dict["epoch"]

    @contextlib.contextmanager
    def paused(self) -> Generator[LayerwiseLR]:
        """Let the optimizer step alone inside a `with` block.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> from layerwise.rules import LayerAdaptive
            >>> with LayerwiseLR(optimizer, LayerAdaptive(), model).paused():
            ...     optimizer.step()
        """
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the hooks off; the optimizer is then as it was, to the bit. A second call does nothing."""
        self._attached.detach()

    def __repr__(self) -> str:
        found, attached = self._attached.found, self._attached.attached_to
        excluded = found.included.count(False)
        place = f"apply={self.apply!r}"
        place += f", decay={self.decay!r}" if self.apply == "gradient" else f" by {self._attached.route}"
        units = "" if found.units is None else f", {found.units.count:,} units"
        parts = [f"{described(self.rule)} on {attached}", f"{len(found.layers)} layers{units}", place]
        if self.counts_epochs:
            parts.append(f"epoch {self._epoch}")
        if excluded:
            parts.append(f"{excluded} excluded")
        if found.outside:
            parts.append(f"{found.outside} parameters in no layer")
        return f"LayerwiseLR({', '.join(parts)})"

    def _remarks(self, optimizer: Optimizer) -> list[str]:
        """Return what the log says about this attachment."""
        found = self._attached.found
        remarks = [no_effect(optimizer, self.apply, self.rule) or unfit_for_adam(optimizer, self.rule)]
        if found.outside:
            among = len(found.parameters)
            remarks.append(f"{found.outside} of the optimizer's {among} parameters are in no layer: factor 1")
        half = {p.dtype for layer in found.layers for p in layer.parameters}.intersection(HALF)
        if found.afterwards and half:
            remarks.append(
                f"{described(self.rule)} reads the finished step from weights of {', '.join(map(str, half))}, which "
                "round small steps, so its factors are inexact; keep the weights in float32 (autocast)"
            )
        if len(OptimizerHooks.members_of(optimizer)) > 1:
            remarks.append(
                f"{type(optimizer).__name__} has another LayerwiseLR attached already: their factors multiply, and "
                "each reports only its own; detach() the first if it was meant to be replaced"
            )
        return [remark for remark in remarks if remark] + self.rule.remarks(found.layers)


_OF_ADAPTER = ("layers", "apply", "decay", "exclude", "split", "bounds", "normalize", "on_nonfinite")


def attach(optimizer: Any, rule: Any, model: Model | None = None, **arguments: Any) -> LayerwiseLR:
    """Attach a rule by its name.

    Args:
        optimizer: As for `LayerwiseLR`.
        rule: A rule, its name (`"lars"`, `"layer_decay"`; `layerwise.rules.list()` prints all), a mapping such as
            `{"name": "lars", "trust_coefficient": 0.01}`, or a list of these, which are chained.
        model: As for `LayerwiseLR`.
        **arguments: Those of a rule that is given by its name, and those of `LayerwiseLR`. Where both have one, such as
            `decay` for `LayerDecay`, it is the rule's.

    Returns:
        The adapter.

    Raises:
        TypeError: As `LayerwiseLR` does, or `rule` is none of these.
        ValueError: As `LayerwiseLR` does, or the rule is unknown, or does not take an argument.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> attach(torch.optim.SGD(model.parameters(), lr=0.1), "lars", model, trust_coefficient=0.01).rule
        LARS(trust_coefficient=0.01, eps=1e-08)
    """
    own = arguments_of(rule)
    of_rule = {name: value for name, value in arguments.items() if name in own or name not in _OF_ADAPTER}
    of_adapter = {name: value for name, value in arguments.items() if name not in of_rule}
    return LayerwiseLR(optimizer, make_rule(rule, of_rule), model, **of_adapter)
