"""Step in backward: each layer is updated as soon as its gradients exist, and these are freed."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._arguments import StaysBehind
from ._hooks import OptimizerHooks, closure_of, followed, with_closure
from ._places.allowed import automatic_place
from ._tensors import (
    LARGE,
    holds_weights,
    return_freed_memory,
    runs_on_fakes,
    same_objects,
    several_processes,
    transferred,
)
from .adapter import STEPS_AS_BARE, circumstances_of, parameters_of, rates_of, requested, resolve
from .apply import OUTSIDE, Factors, Partition, make_place
from .layers import Layer, Model, as_module, flattened, named_parameters_of, warn_of_unmeasured
from .optimizers import damps_history, unwrap
from .rules.base import Rule, check_rule, finite_or_one, is_pair
from .rules.constant import Constant
from .rules.state import State, described
from .statistics import AS_NUMBERS, NOTHING, LayerStatistics, Statistics, check_needs


class Receiver(Protocol):
    """Who is told."""

    def arrived(self, parameter: Tensor) -> None:
        """Take note that the parameter's gradient is complete."""
        ...

    def end(self) -> None:
        """Take note that the backward has ended."""
        ...


class Arrival:
    """The hook on the parameters, and what the engine calls when a backward ends; keeps its receiver not alive."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = weakref.ref(receiver)

    def __call__(self, parameter: Tensor) -> None:
        """Tell the receiver that the parameter's gradient is complete."""
        receiver = self.receiver()
        if receiver is not None:
            receiver.arrived(parameter)

    def end(self) -> None:
        """Tell the receiver that the backward has ended."""
        receiver = self.receiver()
        if receiver is not None:
            receiver.end()


def are_received(parameters: Iterable[Tensor]) -> bool:
    """Tell whether any of the parameters has such a hook with a receiver that lives."""
    hooks = [hook for p in parameters for hook in (p._post_accumulate_grad_hooks or {}).values()]
    arrivals = [getattr(hook, "__wrapped__", None) for hook in hooks]  # torch.compiler.disable wraps them
    return any(isinstance(arrival, Arrival) and arrival.receiver() is not None for arrival in arrivals)


def registered(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register the hook; on a frozen parameter too, for the day it is trained."""
    hooked: Any = parameter
    if parameter.requires_grad:
        return hooked.register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(True)
    try:
        return hooked.register_post_accumulate_grad_hook(hook)
    finally:
        parameter.requires_grad_(False)


# --- Checks ----------------------------------------------------------------------------------------------------------

_KINDS: tuple[Any, ...] = (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)
_STEPS = {inspect.unwrap(kind.step) for kind in _KINDS}

ACCUMULATED = (
    "a second backward() before optimizer.step(): step_in_backward has used and freed the gradients of the first one, "
    "so there is nothing to add these to; nothing has changed since the first. Call optimizer.step() after each "
    "backward(). To accumulate, run all but the last backward() inside `with handle.paused():`, which keeps the "
    "gradients; so do for the loss of another optimizer (a GAN's), before zero_grad(). Activation checkpoints need "
    "use_reentrant=False"
)
NESTED = (
    "a backward() inside another one, as activation checkpoints with use_reentrant=True run it: gradients of a weight "
    "that both reach would arrive apart, and step_in_backward may have used one of them; the layers above have been "
    "updated. Use use_reentrant=False, or run the whole inside `with handle.paused():`"
)
COMPILED = (
    "compiled autograd runs this backward, and does not tell step_in_backward of its end; no weight has changed. Turn "
    "it off (torch.compile of the model may stay), or use LayerwiseLR in place of step_in_backward"
)
CREATE_GRAPH = (
    "backward(create_graph=True) keeps a graph through the gradients, which step_in_backward frees and whose weights "
    "it changes; run it inside `with handle.paused():`, or detach()"
)
SCALED = (
    "a GradScaler is in use: whether a step is to be skipped is known only when all gradients exist, and "
    "step_in_backward has used the first of them by then. Use bfloat16 (torch.autocast without a scaler), or "
    "LayerwiseLR in place of step_in_backward"
)
ASKED = (
    "a GradScaler, or a trainer that would clip gradients, asks whether this optimizer unscales them; step_in_backward "
    "has used and freed them, and the weights have moved by what it was given. Use bfloat16 (torch.autocast without a "
    "scaler) and no clipping, or LayerwiseLR in place of step_in_backward"
)
ATTACHED_TOO = (
    "a LayerwiseLR or a monitor is attached to the same optimizer, and would find no gradient at step(): pass the rule "
    "to step_in_backward itself, or detach one of the two"
)


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Raise unless a part of the optimizer's parameters can step as all of them together would.

    Raises:
        ValueError: Another optimizer, a form of its step that cannot work so, sharded parameters, or gradients present.
    """
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in _STEPS:
        raise ValueError(
            f"optimizer={name}: step_in_backward steps one layer at a time, which is known to give the same numbers "
            "for torch.optim's SGD, Adagrad, Adam and AdamW; this step is another one. Use one of these, or LayerwiseLR"
        )
    check_options(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise ValueError(
            "this optimizer holds sharded parameters (DTensor), whose gradients are reduced only after they have "
            "accumulated; use LayerwiseLR"
        )
    present = sum(p.grad is not None for p in parameters)
    if present:
        raise ValueError(
            f"{present} of {len(parameters)} parameters hold a gradient already, which the next backward() would add "
            "to: call optimizer.zero_grad() first"
        )


def check_options(optimizer: optim.Optimizer) -> None:
    """Raise for a form of the optimizer's step that cannot take one layer at a time.

    Raises:
        ValueError: A group asks for it.
    """
    name = type(optimizer).__name__
    for option, reason in (
        ("differentiable", "keeps the gradients in a graph, and these are freed"),
        ("capturable", "is for CUDA graphs of the whole step, and no step of the whole is left"),
    ):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"{name}({option}=True) {reason}; use {option}=False with step_in_backward")


def check_own_layer(rule: Rule) -> None:
    """Raise unless each layer's factor follows from that layer alone.

    Raises:
        ValueError: The rule needs other layers, or does not say that it needs none.
    """
    if rule.needs_own_layer_only():
        return
    needs = set(rule.needs)
    if "counts" in needs:
        reason = "it counts the steps whose gradients are finite in every layer"
    elif "gradients" in needs:
        reason = "it compares the gradients of all layers"
    else:
        reason = "it does not say own_layer = True, that the factor of a layer follows from that layer alone"
    raise ValueError(
        f"rule={rule!r} cannot step in backward: {reason}. When a layer steps, the gradients of the layers below do "
        "not exist yet, and the layers above have moved. Rules that can: LayerAdaptive, LARS, LARC, Constant, "
        "LayerDecay, GradientAmplification of AllLayers or RandomLayers, chain and bounds of these, and every "
        "ElementwiseRule; for others use LayerwiseLR"
    )


def check_wrappers(parameters: Iterable[Tensor]) -> None:
    """Raise if a wrapper reduces the gradients of these parameters over processes, after the hooks have run.

    Raises:
        ValueError: One of them belongs to a DistributedDataParallel or FullyShardedDataParallel module.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # A wrapper leaves no mark on the parameters that can be read, so all that live are looked at, once.
    kinds: list[type] = [torch.nn.parallel.DistributedDataParallel]
    if "torch.distributed.fsdp" in sys.modules:
        kinds.append(sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel)
    ours = set(map(id, parameters))
    for wrapper in _alive(*kinds):
        if any(id(p) in ours for p in wrapper.parameters()):
            raise ValueError(
                f"the parameters belong to a {type(wrapper).__name__}, which averages gradients over the processes "
                "only after step_in_backward has used them, so the processes would drift apart; use LayerwiseLR"
            )


def check_engine() -> None:
    """Raise if compiled autograd runs the backward: it loses what is queued for the end.

    Raises:
        RuntimeError: It does.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(COMPILED)


def check_loss() -> None:
    """Raise if the loss of the running backward has been multiplied by a GradScaler.

    A scaler leaves no mark on its product but that the root of the graph is a product with a constant; so that is
    looked for where a scaler lives that has been used.

    Raises:
        RuntimeError: It has been, as far as can be told.
    """
    if any(map(_is_scaled, _roots())) and any(
        scaler.is_enabled() and scaler._scale is not None for scaler in _alive(torch.amp.GradScaler)
    ):
        raise RuntimeError(f"{SCALED}. No weight has changed")


class ScalerRefusal:
    """Stands where `GradScaler.step` asks an optimizer whether it unscales by itself, and answers that it must not."""

    def __bool__(self) -> bool:
        raise RuntimeError(ASKED)


def _alive(*kinds: type) -> list[Any]:
    gc.collect()  # so that unused ones are not found
    # Of the types, because isinstance would run the code of proxies.
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)]


def _roots() -> Iterator[Any]:
    """Yield what backward was called on, in whichever thread: on accelerators hooks run in another one."""
    run = torch.autograd.graph._engine_run_backward.__code__
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is run:
                yield from frame.f_locals["t_outputs"]
            frame = frame.f_back


def _is_scaled(root: Any) -> bool:
    node = root.grad_fn if isinstance(root, Tensor) else root.node
    return node is not None and node.name() == "MulBackward0" and node.next_functions[1][0] is None


# --- The step of a layer ---------------------------------------------------------------------------------------------

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
        self._needs = [name for name in rule.needs if name in BY_LAYER] if rule is not None else []
        self._request = requested(Constant({"*": 1.0}) if rule is None else rule, model)
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
        if self.rule is not None:
            self._state = self.rule.end_epoch(self._state)

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
            self._state = self.rule.renewed(layers, device, self._state, self.names())
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


# --- The public class ------------------------------------------------------------------------------------------------

logger = logging.getLogger("layerwise")


def step_in_backward(optimizer: Any, model: Model | None, rule: Any = None) -> StepInBackward:
    """Update each layer inside `backward()`, as soon as its gradients exist, and free them.

    The gradients of the whole network then never exist together, which saves about their size in memory. The weights
    are those of the optimizer alone, or with `LayerwiseLR(optimizer, rule, model)`, to the bit. The loop stays as it
    is: `optimizer.step()` finds nothing left to do, and tells schedulers, and this, that the iteration is over. The
    optimizer's parameter groups, state and checkpoints are as ever.

    There is one backward for each `optimizer.step()`. What cannot be done so is refused: accumulating gradients,
    gradient scalers, `create_graph`. **Clipping after backward finds no gradients, and nothing can tell of it.** A
    backward that fails half-way has updated the layers it had reached.

    Args:
        optimizer: `torch.optim`'s SGD, Adagrad, Adam or AdamW, or a wrapper of Accelerate or Fabric around one.
        model: Names the layers, as in `LayerwiseLR`. None takes the names of an optimizer built from
            `model.named_parameters()`.
        rule: A rule for which each layer needs nothing but itself; its layers and the place where it acts are those
            that `LayerwiseLR` takes. None steps with the optimizer's own rates.

    Returns:
        The handle, which need not be kept.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer or the rule cannot step layer by layer, an adapter or a monitor is attached, a wrapper
            reduces the gradients over processes, or a parameter holds a gradient already.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> handle = step_in_backward(optimizer, model)
        >>> before = model[2].bias.detach().clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> model[2].bias.grad is None, model[2].bias - before
        (True, tensor([-0.1000], grad_fn=<SubBackward0>))
        >>> optimizer.step()
    """
    return StepInBackward(optimizer, model, rule)


class StepInBackward(StaysBehind):
    """What `step_in_backward` returns: what it did last, and how to pause or end it."""

    _copy_remedy = (
        "it belongs to one optimizer, whose hooks are not copied either: call step_in_backward with the copy's "
        "optimizer and model"
    )

    def __init__(self, optimizer: Any, model: Model | None, rule: Any) -> None:
        inner = unwrap(optimizer)
        check_optimizer(inner)
        parameters = parameters_of(inner.param_groups)
        if are_received(parameters):
            raise ValueError("these parameters step in backward already: call detach() on the first handle before")
        if OptimizerHooks.has_any(inner):
            raise ValueError(ATTACHED_TOO)
        if rule is not None:
            check_needs(check_rule(rule).needs)
            check_own_layer(rule)
        check_wrappers(parameters)
        self._steps = LayerSteps(inner, model, rule)
        warn_of_unmeasured(named_parameters_of(inner, as_module(model)), STEPS_AS_BARE)
        self.enabled = True
        self._optimizer = weakref.ref(inner)
        self._attached = True
        self._task: int | None = None  # not -1, which the backwards of a compiled autograd may have
        self._begun = self._finished = self._proven = False
        self._several = several_processes()
        self._running: weakref.ref[Any] | None = None
        # The gradients of a model on several accelerators arrive in several threads.
        self._lock = threading.RLock()
        self._on_parameters: dict[int, RemovableHandle] = {}
        # Traced, as in a compiled function that calls backward, steps of layers would be silently wrong.
        outside_graph = cast(Callable[[Any], Any], torch.compiler.disable)
        # The optimizer owns this object, and the parameters know it weakly: it lives as long as the optimizer.
        arrival = Arrival(self)
        self._on_arrival, self._on_end = outside_graph(arrival), outside_graph(arrival.end)
        self._watch(parameters)
        self._on_optimizer = (
            inner.register_step_pre_hook(outside_graph(self._before_step)),
            inner.register_step_post_hook(outside_graph(self._after_step)),
        )
        self._scaling = {name: value for name, value in vars(inner).items() if name == _SCALING}
        vars(inner)[_SCALING] = ScalerRefusal()
        outside = self._steps.outside()
        if rule is not None:
            layers = self._steps.layers
            for message in flattened(layers, self._steps.specification) + rule.doubts(layers):
                warnings.warn(message, UserWarning, stacklevel=3)
        if outside and rule is not None:
            logger.warning(f"{outside} of the optimizer's {len(parameters)} parameters are in no layer: factor 1")

    # --- What a person asks -------------------------------------------------------------------------------------------

    @property
    def rule(self) -> Any:
        """The rule, or None."""
        return self._steps.rule

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return self._steps.names()

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer in the last backward; 1 before the first. Waits for the device.

        Those of the last backward remain after `detach()`.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        self._check_current()
        return dict(zip(self.layers, self._steps.last_factors(), strict=True))

    def get_last_lr(self) -> dict[str, float]:
        """Return the rate of each layer in the last backward, `lr · f_l`. Waits for the device.

        The base rate is that of the parameter group of the layer's first parameter, its weight as a rule.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        self._check_current()
        return dict(zip(self.layers, self._steps.last_rates(), strict=True))

    def end_epoch(self) -> None:
        """Tell a rule that counts epochs that one has ended; the first is epoch 1.

        The epoch is not in any checkpoint: after resuming, call this once for each epoch that was done.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        self._check_current()
        self._steps.end_epoch()

    @contextlib.contextmanager
    def paused(self) -> Generator[StepInBackward]:
        """Let backward keep the gradients, and the optimizer step alone, inside a `with` block.

        Gradients that it leaves are added to by the next backward, or used by the next `optimizer.step()`, with the
        rule. So gradients accumulate over all but the last backward inside the block, or are clipped after it.

        Example:
            >>> from torch import nn
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with step_in_backward(optimizer, model).paused():
            ...     model(torch.ones(1, 2)).sum().backward()
            >>> model.bias.grad
            tensor([1.])
        """
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the hooks off; the optimizer is then as it was, to the bit. A second call does nothing."""
        self._watch([])
        for hook in self._on_optimizer:
            hook.remove()
        optimizer = self._optimizer()
        if self._attached and optimizer is not None:
            del vars(optimizer)[_SCALING]
            vars(optimizer).update(self._scaling)
        self._attached = False

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        gone = "an optimizer that no longer exists" if self._attached else "detached"
        name = type(optimizer).__name__ if self._attached and optimizer is not None else gone
        steps = self._steps
        parts = [name if self.rule is None else f"{described(self.rule)} on {name}", f"{len(steps.layers)} layers"]
        if self.rule is not None:
            parts += [f"apply={steps.place!r}"] + [f"decay={steps.decay!r}"] * (steps.place == "gradient")
        excluded = sum(not layer.included for layer in steps.layers)
        outside = steps.outside()
        parts += [f"{excluded} excluded"] * bool(excluded) + [f"{outside} parameters in no layer"] * bool(outside)
        return f"StepInBackward({', '.join(parts + ['paused'] * (not self.enabled))})"

    def _check_current(self) -> None:
        if self._attached and self._optimizer() is None:
            raise RuntimeError(
                "the optimizer of this StepInBackward no longer exists; call step_in_backward with the one in use"
            )

    # --- What the hooks call ------------------------------------------------------------------------------------------

    def arrived(self, parameter: Tensor) -> None:
        """Step the parameter's layer if this was the last of its gradients."""
        optimizer = self._optimizer()
        if not self.enabled or optimizer is None:
            return
        with self._lock:
            task = torch._C._current_graph_task_id()
            if task != self._task:
                try:
                    self._begin(optimizer, task)
                except Exception:
                    parameter.grad = None  # nothing is left for optimizer.step() of a backward that is refused
                    raise
            unit = self._steps.unit_of.get(id(parameter))
            if unit is None:
                return  # it has left the optimizer
            unit.arrived += 1
            if unit.arrived == unit.expected:
                self._steps.step(optimizer, unit)
                # In the first backward states come to lie between freed gradients, whose gaps fit no other one.
                if not self._proven and unit.size >= LARGE:
                    return_freed_memory()

    def _begin(self, optimizer: Optimizer, task: int) -> None:
        """Begin a backward, unless it must be refused."""
        check_engine()
        if self._begun and self._finished:
            raise RuntimeError(ACCUMULATED)
        if self._running is not None and self._running() is not None:
            raise RuntimeError(NESTED)
        if torch.is_grad_enabled():
            raise RuntimeError(CREATE_GRAPH)
        if OptimizerHooks.has_any(optimizer):
            raise RuntimeError(ATTACHED_TOO)
        check_options(optimizer)  # a state that was loaded may bring others
        if not self._proven or self._several != several_processes():
            check_wrappers(parameters_of(optimizer.param_groups))
            check_loss()
            self._several = several_processes()
        if self._begun:
            logger.warning("the last backward failed half-way; the layers that it had reached have been updated")
        if self._steps.prepare(optimizer):
            self._watch(parameters_of(optimizer.param_groups))
        self._task, self._begun, self._finished = task, True, False
        end = partial(self._on_end)  # which the engine keeps as long as this backward runs
        self._running = weakref.ref(end)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def end(self) -> None:
        """End a backward: step the layers of which some parameters got no gradient."""
        optimizer = self._optimizer()
        if optimizer is None or not self._attached:
            return
        with self._lock:
            self._step_rest(optimizer)
            self._finished = True

    @torch.no_grad()
    def _step_rest(self, optimizer: Optimizer) -> None:
        for unit in self._steps.units:
            if unit.waits:
                self._steps.step(optimizer, unit)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step with gradients that did not come from a backward, such as those that the user has set."""
        closure = closure_of(args, kwargs)
        if closure is not None:
            return with_closure(args, kwargs, followed(closure, _evaluate, self, optimizer))
        self.step_present(optimizer)
        return args, kwargs

    def step_present(self, optimizer: Optimizer) -> None:
        """Step with the gradients that are there."""
        if self._attached and self.enabled and any(p.grad is not None for p in parameters_of(optimizer.param_groups)):
            if self._steps.prepare(optimizer):
                self._watch(parameters_of(optimizer.param_groups))
            self._step_rest(optimizer)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._proven = self._proven or self._begun
        self._begun = False

    def _watch(self, parameters: list[Tensor]) -> None:
        """Register the hook on these parameters, and on no others."""
        wanted = {id(p): p for p in parameters if p.is_floating_point() or p.is_complex()}
        for number in self._on_parameters.keys() - wanted.keys():
            self._on_parameters.pop(number).remove()
        for number in wanted.keys() - self._on_parameters.keys():
            self._on_parameters[number] = registered(wanted[number], self._on_arrival)


def _evaluate(handle: StepInBackward, optimizer: Optimizer, closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    loss = closure(*args, **kwargs)
    handle.step_present(optimizer)
    return loss


_SCALING = "_step_supports_amp_scaling"
