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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._arguments import StaysBehind
from ._hooks import OptimizerHooks, closure_of, followed, with_closure
from ._places.allowed import automatic_place
from ._tensors import LARGE, return_freed_memory, runs_on_fakes
from .adapter import STEPS_AS_BARE, Request, Resolution, parameters_of, rates_of
from .apply import Factors, Partition, Step, damps_history, make_place
from .layers import Model, as_module, flattened, named_parameters_of, warn_of_unmeasured
from .optimizers import unwrap
from .rules.base import Rule, check_rule, is_pair
from .rules.constant import Constant
from .rules.state import State, described
from .statistics import NOTHING, LayerStatistics, Statistics, check_needs

logger = logging.getLogger("layerwise")

ACCUMULATED = (
    "a second backward() before optimizer.step(): step_in_backward has used and freed the gradients of the first one. "
    "No weight has changed since. Call optimizer.step() after each backward(). To accumulate, run all but the last "
    "backward() inside `with handle.paused():`, which keeps the gradients; do the same for the loss of another "
    "optimizer (a GAN's), before zero_grad(). Activation checkpoints need use_reentrant=False"
)
NESTED = (
    "a backward() inside another one, as activation checkpoints with use_reentrant=True run it: a weight that both "
    "reach gets two gradients, and step_in_backward may have used the first alone. The layers above have been updated. "
    "Use use_reentrant=False, or run both inside `with handle.paused():`"
)
COMPILED = (
    "compiled autograd runs this backward and does not report its end, which step_in_backward needs; no weight has "
    "changed. Turn it off (torch.compile of the model may stay), or use LayerwiseLR"
)
CREATE_GRAPH = (
    "backward(create_graph=True) keeps a graph through the gradients, which step_in_backward frees, and through the "
    "weights, which it changes; run it inside `with handle.paused():`, or detach()"
)
SCALED = (
    "a GradScaler has scaled this loss. It skips a step or not once all gradients exist, and step_in_backward uses the "
    "first of them before. No weight has changed. Use bfloat16 (torch.autocast without a scaler), or LayerwiseLR"
)
UNSCALES = (
    "a GradScaler and gradient clipping do not work with step_in_backward, because the weights have moved before they "
    "run. Use bfloat16 (torch.autocast without a scaler) and no clipping, or LayerwiseLR"
)
ATTACHED_TOO = (
    "a LayerwiseLR or a monitor is attached to the same optimizer, and would find no gradient at step(): pass the rule "
    "to step_in_backward itself, or detach one of the two"
)
AMP_FLAG = "_step_supports_amp_scaling"
"""The optimizer's attribute that `GradScaler.step` and trainers read before they unscale or clip gradients."""

# Which handle steps each parameter, by its id.
_STEPPED: weakref.WeakValueDictionary[int, StepInBackward] = weakref.WeakValueDictionary()
# Traced by torch.compile, steps of layers would be silently wrong.
_outside_graph = cast(Callable[[Callable[..., Any]], Callable[..., Any]], torch.compiler.disable)


def step_in_backward(optimizer: Any, model: Model | None, rule: Any = None) -> StepInBackward:
    """Update each layer inside `backward()`, as soon as its gradients exist, and free them.

    The gradients of the whole network then never exist together, which saves about their size in memory. The weights
    are those of the optimizer alone, or with `LayerwiseLR(optimizer, rule, model)`, to the bit. The loop stays as it
    is: `optimizer.step()` finds nothing left to do, and marks the end of the iteration for schedulers and for this
    function. The optimizer's parameter groups, state and checkpoints do not change.

    Each `optimizer.step()` takes one backward. Accumulating gradients, gradient scalers and `create_graph` are refused.
    **Clipping after backward finds no gradients, and this cannot be detected.** A backward that fails half-way has
    updated the layers it had reached.

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


def _of_one_layer(factor: Tensor | list[float]) -> Factors:
    return Factors(factor, (True,), None)


NEUTRAL = _of_one_layer([1.0])


@dataclass(eq=False)
class _Unit:
    """Parameters that step together: those of a layer, or one that is in none."""

    layer: int | None  # its number
    parameters: Sequence[Tensor]
    groups: list[tuple[int, list[Tensor]]]  # numbers of parameter groups, each with the unit's parameters there
    partition: Partition
    statistics: LayerStatistics | None = None  # for a rule that needs some, and a layer that is not excluded
    factors: Factors = NEUTRAL
    missing: int = 0  # gradients that this backward may still bring


class StepInBackward(StaysBehind):
    """What `step_in_backward` returns: what it did last, and how to pause or end it."""

    _copy_remedy = (
        "it belongs to one optimizer, whose hooks are not copied either: call step_in_backward with the copy's "
        "optimizer and model"
    )

    def __init__(self, optimizer: Any, model: Model | None, rule: Any) -> None:
        inner = unwrap(optimizer)
        _check_optimizer(inner)
        parameters = parameters_of(inner.param_groups)
        if any(id(p) in _STEPPED for p in parameters):
            raise ValueError("these parameters step in backward already: call detach() on the first handle before")
        if OptimizerHooks.attached_to(inner):
            raise ValueError(ATTACHED_TOO)
        if rule is not None:
            _check_rule(rule)
        _check_wrappers(parameters)
        self._rule: Rule | None = rule
        self._request = Request(Constant({"*": 1.0}) if rule is None else rule, model)
        self._needs = [] if rule is None else [name for name in rule.needs if name not in ("counts", "gradients")]
        self._state: State = {}
        self._rates = rates_of(inner.param_groups)
        # Without its wrappers, whose hooks are for a whole step.
        self._step: Callable[[Any], Any] = inspect.unwrap(type(inner).step)
        self._resolve(inner)
        self._choose_place(inner)
        warn_of_unmeasured(named_parameters_of(inner, as_module(model)), STEPS_AS_BARE)
        self.enabled = True
        # The optimizer owns this object through its hooks, and the parameters hold it weakly.
        self._optimizer = weakref.ref(inner)
        self._attached = True
        # Of the backward since the last step: its task in autograd, and what autograd keeps until it has ended.
        self._task: int | None = None
        self._running: Callable[[], Any] = lambda: None
        self._begun = self._finished = False
        self._proven = False  # whether a whole iteration has been done
        self._lock = threading.RLock()  # a model on several accelerators has a thread of backward for each
        self._on_parameters: dict[int, RemovableHandle] = {}
        self._on_arrival, self._on_end = _weak(self._arrived), _weak(self._end)
        self._watch(parameters)
        self._on_optimizer = (
            inner.register_step_pre_hook(_outside_graph(self._before_step)),
            inner.register_step_post_hook(_outside_graph(self._after_step)),
        )
        self._amp_flag = vars(inner).get(AMP_FLAG)
        vars(inner)[AMP_FLAG] = _Unscaling()
        if rule is not None:
            found = self._found
            for message in flattened(found.layers, self._request.layers) + rule.doubts(found.layers):
                warnings.warn(message, UserWarning, stacklevel=3)
            if found.outside:
                among = len(parameters)
                logger.warning(f"{found.outside} of the optimizer's {among} parameters are in no layer: factor 1")

    # --- Public -------------------------------------------------------------------------------------------------------

    @property
    def rule(self) -> Any:
        """The rule, or None."""
        return self._rule

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return self._found.names

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer in the last backward; 1 before the first. Waits for the device.

        Those of the last backward remain after `detach()`.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        self._check_current()
        return {name: unit.factors.read()[0] for name, unit in zip(self.layers, self._units, strict=False)}

    def get_last_lr(self) -> dict[str, float]:
        """Return the rate of each layer in the last backward, `lr · f_l`. Waits for the device.

        The base rate is that of the parameter group of the layer's first parameter, its weight as a rule.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        factors, first = self.get_last_factors(), self._found.first_group
        return {name: float(self._rates[group]) * factors[name] for name, group in zip(factors, first, strict=True)}

    def end_epoch(self) -> None:
        """Count an epoch of the rule as done; the first is epoch 1.

        The epoch is not in any checkpoint: after resuming, call this once for each epoch that was done.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        self._check_current()
        if self._rule is not None:
            self._state = self._rule.end_epoch(self._state)

    @contextlib.contextmanager
    def paused(self) -> Generator[StepInBackward]:
        """Let backward keep the gradients, and the optimizer step alone, inside a `with` block.

        The next backward adds to gradients that the block leaves, or the next `optimizer.step()` uses them, with the
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
            del vars(optimizer)[AMP_FLAG]
            if self._amp_flag is not None:
                vars(optimizer)[AMP_FLAG] = self._amp_flag
        self._attached = False

    def __repr__(self) -> str:
        optimizer, found = self._optimizer(), self._found
        name = "an optimizer that no longer exists" if optimizer is None else type(optimizer).__name__
        parts = [name if self._attached else "detached", f"{len(found.layers)} layers"]
        if self._rule is not None:
            parts[0] = f"{described(self._rule)} on {parts[0]}"
            parts.append(f"apply={self._place_name!r}")
            if self._place_name == "gradient":
                parts.append(f"decay={self._request.decay!r}")
        if excluded := found.included.count(False):
            parts.append(f"{excluded} excluded")
        if found.outside:
            parts.append(f"{found.outside} parameters in no layer")
        if not self.enabled:
            parts.append("paused")
        return f"StepInBackward({', '.join(parts)})"

    def _check_current(self) -> None:
        if self._attached and self._optimizer() is None:
            raise RuntimeError(
                "the optimizer of this StepInBackward no longer exists; call step_in_backward with the one in use"
            )

    # --- What the hooks call ------------------------------------------------------------------------------------------

    def _arrived(self, parameter: Tensor) -> None:
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
                    parameter.grad = None  # so that optimizer.step() finds nothing of a refused backward
                    raise
            unit = self._unit_of.get(id(parameter))
            if unit is None:
                return  # the parameter has left the optimizer
            unit.missing -= 1
            if unit.missing == 0:
                self._step_unit(optimizer, unit)
                # The first backward allocates the optimizer's state between freed gradients, and leaves gaps.
                if not self._proven and sum(p.nbytes for p in unit.parameters) >= LARGE:
                    return_freed_memory()

    def _begin(self, optimizer: Optimizer, task: int) -> None:
        """Begin a backward, or raise if it must be refused; no weight has changed then."""
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled is not None and compiled.in_compiled_autograd_region:
            raise RuntimeError(COMPILED)
        if self._begun and self._finished:
            raise RuntimeError(ACCUMULATED)
        if self._running() is not None:
            raise RuntimeError(NESTED)
        if torch.is_grad_enabled():
            raise RuntimeError(CREATE_GRAPH)
        if OptimizerHooks.attached_to(optimizer):
            raise RuntimeError(ATTACHED_TOO)
        _check_options(optimizer)  # loading a state can change them
        if self._resolve_changed(optimizer) or not self._proven:
            _check_wrappers(parameters_of(optimizer.param_groups))
            _check_loss()
        if self._begun:
            logger.warning("the last backward failed half-way; the layers that it had reached have been updated")
        self._prepare(optimizer)
        self._task, self._begun, self._finished = task, True, False
        end = partial(self._on_end)  # autograd alone holds this object, until the backward has ended or failed
        self._running = weakref.ref(end)
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end(self) -> None:
        """End a backward: step the layers of which some parameters got no gradient."""
        optimizer = self._optimizer()
        if optimizer is not None and self._attached:
            with self._lock:
                self._step_rest(optimizer)
                self._finished = True

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step with gradients that did not come from a backward, such as those that the user has set."""

        def evaluate(closure: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._step_present(optimizer)
            return loss

        closure = closure_of(args, kwargs)
        if closure is not None:
            return with_closure(args, kwargs, followed(closure, evaluate))
        return self._step_present(optimizer)

    def _step_present(self, optimizer: Optimizer) -> None:
        if self._attached and self.enabled and any(p.grad is not None for p in parameters_of(optimizer.param_groups)):
            self._resolve_changed(optimizer)
            self._prepare(optimizer)
            self._step_rest(optimizer)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._proven = self._proven or self._begun
        self._begun = False

    def _resolve_changed(self, optimizer: Optimizer) -> bool:
        """Find layers and register hooks again where the optimizer has changed; return whether it has."""
        if self._found.holds(optimizer.param_groups, self._request):
            return False
        self._resolve(optimizer)
        self._watch(parameters_of(optimizer.param_groups))
        return True

    def _watch(self, parameters: Sequence[Tensor]) -> None:
        """Register the hook on these parameters, and on no others."""
        wanted: dict[int, Any] = {id(p): p for p in parameters if p.is_floating_point() or p.is_complex()}
        for number in self._on_parameters.keys() - wanted.keys():
            self._on_parameters.pop(number).remove()
            _STEPPED.pop(number, None)
        for number in wanted.keys() - self._on_parameters.keys():
            p, trained = wanted[number], wanted[number].requires_grad
            p.requires_grad_(True)  # a frozen parameter takes no hook, and may be trained later
            self._on_parameters[number] = p.register_post_accumulate_grad_hook(self._on_arrival)
            p.requires_grad_(trained)
            _STEPPED[number] = self

    # --- The step of one layer ----------------------------------------------------------------------------------------

    def _resolve(self, optimizer: Optimizer) -> None:
        """Find the layers, and everything that follows from them; change nothing if that fails."""
        found = Resolution(optimizer, optimizer, self._request)
        if self._rule is not None:
            before = self._found.names if self._state else []
            state = self._rule.renewed(found.layers, found.statistics.device, self._state, before)
            if self._rule.trained(state) is not None:
                raise ValueError(
                    f"{described(self._rule)} sets requires_grad, of which step_in_backward knows nothing; leave "
                    "requires_grad=True out, or use LayerwiseLR"
                )
            self._state = state
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}

        def unit(layer: int | None, parameters: Sequence[Tensor]) -> _Unit:
            groups: dict[int, list[Tensor]] = {}
            for p in parameters:
                groups.setdefault(group_of[id(p)], []).append(p)
            return _Unit(layer, parameters, sorted(groups.items()), Partition({id(p): 0 for p in parameters}))

        self._units = [unit(i, layer.parameters) for i, layer in enumerate(found.layers)]
        for own, layer in zip(self._units, found.layers, strict=True):
            if self._needs and layer.included:
                own.statistics = LayerStatistics([layer], self._needs)
        self._units += [unit(None, [p]) for p in found.parameters if id(p) not in found.statistics.layer_of]
        self._unit_of = {id(p): own for own in self._units for p in own.parameters}
        self._found: Resolution = found
        self._raw: tuple[Tensor, int] | None = None

    def _prepare(self, optimizer: Optimizer) -> None:
        """Read what all layers of a backward share: rates, place, and factors that need no statistics."""
        found = self._found
        self._rates = rates_of(optimizer.param_groups)
        self._dry = found.dry or runs_on_fakes(found.layers[0].parameters[0])
        factors = [NEUTRAL] * len(found.layers)
        if self._rule is not None:
            self._choose_place(optimizer)
            if not self._needs and not self._dry:
                raw, self._state = self._checked(self._rule.factors(NOTHING, self._state))
                # Reading them waits for an accelerator, so unchanged ones are not read again.
                if self._raw is None or self._raw[0] is not raw or self._raw[1] != raw._version:
                    self._known = [_of_one_layer([f]) for f in Factors(raw, found.included, found.mask).read()]
                    self._raw = (raw, raw._version)
                factors = self._known
        for unit in self._units:
            unit.missing = sum(p.requires_grad for p in unit.parameters)
            unit.factors = NEUTRAL if unit.layer is None else factors[unit.layer]

    def _step_unit(self, optimizer: Optimizer, unit: _Unit) -> None:
        """Update the unit's parameters as `optimizer.step()` would, and free their gradients; without grad mode."""
        view: Any = object.__new__(type(optimizer))
        vars(view).update(vars(optimizer))
        groups = optimizer.param_groups
        view.param_groups = [{**groups[number], "params": parameters} for number, parameters in unit.groups]
        for group in view.param_groups:
            group.pop("param_names", None)  # those of the whole group
        if unit.statistics is not None and not self._dry:
            unit.factors = self._measured(unit, unit.statistics, view)
        if not unit.factors.neutral:
            # Reading a factor for each layer would wait in the middle of backward.
            self._place.act(Step(view, unit.partition, unit.factors, reads=False))
        self._step(view)
        if not unit.factors.neutral:
            self._place.finish()
        for p in unit.parameters:
            p.grad = None

    @torch.no_grad()
    def _step_rest(self, optimizer: Optimizer) -> None:
        """Step the units that have gradients left."""
        for unit in self._units:
            if any(p.grad is not None for p in unit.parameters):
                self._step_unit(optimizer, unit)

    def _measured(self, unit: _Unit, statistics: LayerStatistics, view: Any) -> Factors:
        """Return the factor of the unit's layer from the layer's statistics."""
        # The user may have set a scale of the loss; a GradScaler is refused.
        groups, grad_scale = view.param_groups, getattr(view, "grad_scale", None)
        if self._found.in_numbers is not None:
            return _of_one_layer(self._found.in_numbers.numbers(statistics.numbers(groups, grad_scale)))
        own = statistics.compute(groups, grad_scale)
        # The values in the place of other layers do not matter.
        every = {name: getattr(own, name).expand(len(self.layers)) for name in self._needs}
        raw, _ = self._checked(self._request.rule.factors(Statistics(**every), self._state))
        return _of_one_layer(raw.narrow(0, cast(int, unit.layer), 1))

    def _checked(self, result: Any) -> tuple[Tensor, State]:
        count = len(self.layers)
        if is_pair(result) and isinstance(result[0], Tensor) and result[0].shape == (count,):
            return result
        raise TypeError(f"{described(self._rule)}.factors must return (factors, state), factors of shape [{count}]")

    def _choose_place(self, optimizer: Optimizer) -> None:
        """Choose where a factor acts as `LayerwiseLR` does; at each backward, since schedulers can bring momentum."""
        decay = self._request.decay
        place, allowed = automatic_place(optimizer, self._request.preferred, decay), self._request.rule.places
        self._place_name = place if place in allowed else allowed[0]
        self._place = make_place(self._place_name, decay, dampens=damps_history(optimizer))


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a method as long as its object lives, and does not keep the object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*args)

    return _outside_graph(call)


class _Unscaling:
    """Stands in for `AMP_FLAG`. Its truth value raises, since the gradients are gone when a GradScaler reads it."""

    def __bool__(self) -> bool:
        raise RuntimeError(UNSCALES)


# --- Checks ----------------------------------------------------------------------------------------------------------

_KINDS: tuple[Any, ...] = (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)
_STEPS = {inspect.unwrap(kind.step) for kind in _KINDS}


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raise unless a part of the optimizer's parameters can step as all of them together would."""
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in _STEPS:
        raise ValueError(
            f"optimizer={name}: step_in_backward steps one layer at a time, which is known to give the same numbers "
            "for torch.optim's SGD, Adagrad, Adam and AdamW; this step is another one. Use one of these, or LayerwiseLR"
        )
    _check_options(optimizer)
    parameters = parameters_of(optimizer.param_groups)
    if any(hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False) for p in parameters):
        raise ValueError(
            "this optimizer holds sharded parameters (DTensor) or those of FullyShardedDataParallel, whose gradients "
            "are reduced only after they have accumulated; use LayerwiseLR"
        )
    if present := sum(p.grad is not None for p in parameters):
        raise ValueError(
            f"{present} of {len(parameters)} parameters hold a gradient already, which the next backward() would add "
            "to: call optimizer.zero_grad() first"
        )


def _check_options(optimizer: Optimizer) -> None:
    """Raise if a group has an option that does not allow one layer at a time."""
    for option, reason in (
        ("differentiable", "keeps the gradients in a graph, and step_in_backward frees them"),
        ("capturable", "is for CUDA graphs of a whole step, and step_in_backward takes none"),
    ):
        if any(group.get(option) for group in optimizer.param_groups):
            name = type(optimizer).__name__
            raise ValueError(f"{name}({option}=True) {reason}; use {option}=False with step_in_backward")


def _check_rule(rule: Any) -> None:
    """Raise unless this is a rule with which each layer's factor follows from that layer alone."""
    check_needs(check_rule(rule).needs)
    if rule.default_layers == "unit":
        raise ValueError(
            f"rule={rule!r} has default_layers='unit', and step_in_backward multiplies whole layers; give it "
            "default_layers='parameter', or use LayerwiseLR"
        )
    if rule.needs_own_layer_only():
        return
    reason = "it does not say own_layer = True, that the factor of a layer follows from that layer alone"
    if "counts" in rule.needs:
        reason = "it counts the steps whose gradients are finite in every layer"
    elif "gradients" in rule.needs and rule.depends_on_other_layers():
        reason = "it compares the gradients of all layers"
    raise ValueError(
        f"rule={rule!r} cannot step in backward: {reason}. When a layer steps, the gradients of the layers below do "
        "not exist yet, and the layers above have moved. Rules that can: LayerAdaptive, LARS, LARC, Constant, "
        "LayerDecay, GradientAmplification of AllLayers or RandomLayers, chain and bounds of these, and every "
        "ElementwiseRule that does not follow from the finished step; for others use LayerwiseLR"
    )


def _check_wrappers(parameters: Sequence[Tensor]) -> None:
    """Raise if a `DistributedDataParallel` averages the gradients of these parameters after the hooks have run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # It leaves no mark on parameters and modules, and its own hooks are in C++. So the object itself is looked for.
    wrapped = {id(p) for one in _alive(torch.nn.parallel.DistributedDataParallel) for p in one.parameters()}
    if not wrapped.isdisjoint(map(id, parameters)):
        raise ValueError(
            "the parameters belong to a DistributedDataParallel, which averages gradients over the processes only "
            "after step_in_backward has used them, so the processes would drift apart; use LayerwiseLR"
        )


def _check_loss() -> None:
    """Raise if a GradScaler has multiplied the loss of the running backward, as far as this can be seen.

    A scaled loss is a product with a constant. So is many a loss without a scaler, so one must exist, too.
    """
    products = (node.name() == "MulBackward0" and node.next_functions[1][0] is None for node in _losses())
    if any(products) and any(one.is_enabled() and one._scale is not None for one in _alive(torch.amp.GradScaler)):
        raise RuntimeError(SCALED)


def _losses() -> Iterator[Any]:
    """Yield the nodes that backward was called on.

    A hook sees its own parameter, and the graph leads from the loss to the parameters only. So the call of backward is
    read off the stack: of every thread, because on accelerators hooks run in another one.
    """
    run = torch.autograd.graph._engine_run_backward.__code__
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is run:
                outputs = [x.grad_fn if isinstance(x, Tensor) else x.node for x in frame.f_locals["t_outputs"]]
                yield from filter(None, outputs)
            frame = frame.f_back


def _alive(kind: type) -> list[Any]:
    """Return all objects of a type of which PyTorch keeps no register."""
    gc.collect()  # so that unused ones are not found
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]  # isinstance would run code of proxies
