"""Step in backward: each layer is updated as soon as its gradients exist, and these are freed."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .advice import flattened
from .arrivals import Arrival, are_received, registered
from .attached import STEPS_AS_BARE
from .backward_checks import (
    ACCUMULATED,
    ATTACHED_TOO,
    CREATE_GRAPH,
    NESTED,
    ScalerRefusal,
    check_engine,
    check_loss,
    check_optimizer,
    check_options,
    check_own_layer,
    check_wrappers,
)
from .closures import closure_of, followed, with_closure
from .copying import StaysBehind
from .hooks import OptimizerHooks
from .layer_steps import LayerSteps
from .layers import named_parameters_of, warn_of_unmeasured
from .memory import LARGE, return_freed_memory
from .model import Model, as_module
from .optimizers import unwrap
from .resolution import parameters_of
from .rules.questions import check_rule, doubts_of, needs_of
from .rules.state import described
from .statistics import check_needs
from .tensors import several_processes

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
            check_rule(rule)
            check_needs(needs_of(rule))
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
            for message in flattened(self._steps.layers, self._steps.specification) + doubts_of(
                rule, self._steps.layers
            ):
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
