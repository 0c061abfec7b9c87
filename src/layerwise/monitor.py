"""Records what each layer does while a network trains, without changing anything."""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._arguments import StaysBehind, check_count, has_type
from ._hooks import Member, OptimizerHooks, makes_state_only
from ._norms import subtract
from ._rows import renew, whole_of
from ._tensors import (
    NoValuesError,
    can_be_measured,
    fetched,
    local,
    runs_on_fakes,
    same_objects,
    several_processes,
    warn_without_values,
)
from .adapter import parameters_of
from .layers import (
    Layer,
    LayerSpecification,
    Model,
    as_module,
    as_specification,
    flattened,
    make_layers,
    named_parameters_of,
    rows_of,
    warn_of_unmeasured,
)
from .optimizers import refuse_outer, unwrap
from .rules.replication import check_members
from .sharding import find_shards, settled_gradient
from .sinks.delivery import Sink, check_sinks, close, deliver, sink_name
from .sinks.record import Record, ratio
from .statistics import LayerStatistics

logger = logging.getLogger("layerwise")

NOTHING_RECORDED = "steps are counted but not recorded, until they do"


class Observation:
    """Measures gradients and weights before a step, keeps a copy of the weights, and makes the record after it."""

    def __init__(self, statistics: LayerStatistics, optimizer: Any, measured: Sequence[Member]) -> None:
        members, groups = statistics.members, optimizer.param_groups
        renew(members)
        gradients = [None if (g := settled_gradient(p)) is None else g.detach() for p in members]
        self._statistics = statistics
        self._squares = [statistics.squares(gradients), statistics.squares(members)]
        self._weights = [local(p).clone() for p in members]
        self._scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        rates: list[Any] = [group.get("lr") for group in groups]
        self._rates = [x if isinstance(x, Tensor) else [math.nan if x is None else float(x)] for x in rates]
        # Rate and factors of a layer are those of its first parameter.
        parameters = [layer.parameters[0] for layer in statistics.layers]
        first = list(map(id, parameters))
        group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        self._groups = [group_of.get(id(whole_of(p))) for p in parameters]
        self._acting: list[tuple[Member, list[int | None]]] = []
        # A parameter that an adapter splits has several factors.
        split = {id(rows.whole) for member in measured for rows in rows_of(member.layers)}
        self._known = [1.0 if p not in split else math.nan for p in first]
        for member in measured:
            layer_of = {id(p): number for number, layer in enumerate(member.layers) for p in layer.parameters}
            self._acting.append((member, [layer_of.get(p) for p in first]))

    def values(self) -> list[Tensor | Sequence[float] | None]:
        """Measure the updates, once, and return all that `record` needs: the layers' norms and more."""
        renew(self._statistics.members)
        updates = subtract(self._weights, [local(p) for p in self._statistics.members], in_place=True)
        norms = self._statistics.norms([*self._squares, self._statistics.squares(updates)])
        # Some factors are known after the step only.
        known = [(one.factors, positions) for one, positions in self._acting if one.factors is not None]
        self._positions = [positions for _, positions in known]
        factors = [one.tensor if one.numbers is None else one.numbers for one, _ in known]
        return [norms, self._scale, *self._rates, *factors]

    def record(self, step: int, numbers: Sequence[Sequence[float]]) -> Record:
        """Return the record of a step from the numbers that `values` returned, read from the device."""
        norms, (scale,), *others = numbers
        rates, factors = others[: len(self._rates)], others[len(self._rates) :]
        count = self._statistics.count
        scaled, weights, updates = (list(norms[i : i + count]) for i in range(0, 3 * count, count))
        products = self._known
        for one, positions in zip(factors, self._positions, strict=True):
            products = [f if i is None else f * one[i] for f, i in zip(products, positions, strict=True)]
        base = [math.nan if group is None else rates[group][0] for group in self._groups]
        return Record(
            step=step,
            layers=tuple(layer.name for layer in self._statistics.layers),
            gradient_norm=[norm / (scale or 1.0) for norm in scaled],
            weight_norm=weights,
            update_norm=updates,
            factor=products,
            lr=[rate * factor for rate, factor in zip(base, products, strict=True)],
            update_ratio=list(map(ratio, updates, weights)),
        )


class Monitor(StaysBehind):
    """Records norms, factors and rates of the layers every N steps, and leaves the training unchanged, bit for bit.

    For each layer l of every N-th step: ‖g_l‖ as it arrived, ‖w_l‖ before the step, ‖Δw_l‖ with Δw_l = w_l after − w_l
    before, the factor f_l of the adapters on the optimizer, the rate lr · f_l, and ‖Δw_l‖ / ‖w_l‖; see
    `layerwise.sinks.Record`.

    A step that is not recorded only increments a counter. A recorded step reads gradients, weights and updates once,
    keeps a copy of the parameters while the optimizer steps, and moves all numbers from the device in one transfer,
    which waits for it. No random number is drawn.

    Steps are counted from 1, and those whose number is a multiple of `every` are recorded. Steps that raise are not
    counted, nor those that a gradient scaler skips, nor the step with zero rate and gradient by which distributed
    checkpoints create optimizer state.

    It works with and without a `LayerwiseLR`, attached before or after it, and with closures: it measures when the
    optimizer has evaluated its closure for the first time in a step.

    If a module holds a monitor, a copy or a pickle of the module holds None in its place, with a warning.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper of Accelerate or Fabric around one.
        model: Names the layers, as in `LayerwiseLR`. None takes the names of an optimizer built from
            `model.named_parameters()`; neither is needed if the layers are an adapter's.
        every: The number of steps from one record to the next; at least 1.
        sinks: Where records go: callables that take a `Record`, such as those of `layerwise.sinks`. One that raises is
            dropped with one message in the log, and training goes on. With several processes, each makes a monitor and
            only one passes sinks.
        layers: As in `LayerwiseLR`, but for `"unit"`. `"auto"` takes those of the adapter if just one is attached to
            the optimizer, else `"module"`. Parameters without a layer are not measured.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the layers have no names.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = Monitor(optimizer, model, every=1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> record = monitor.get_last_record()
        >>> record.step, record.layers, record.lr
        (1, ('0', '2'), [0.1, 0.1])
    """

    _copy_remedy = (
        "it belongs to one optimizer, whose hooks are not copied either: make a new one for the copy's optimizer, and "
        "carry the number of steps over with state_dict() and load_state_dict()"
    )

    def __init__(
        self,
        optimizer: Any,
        model: Model | None = None,
        every: int = 50,
        sinks: Sequence[Sink] = (),
        *,
        layers: LayerSpecification | Literal["auto"] = "auto",
    ) -> None:
        inner = unwrap(optimizer)
        refuse_outer(inner)
        check_count("every", every, "; without a Monitor nothing is recorded")
        check_sinks(sinks)
        self._every, self._sinks = every, list(sinks)
        self._auto = isinstance(layers, str) and layers == "auto"
        self._model, self._specification = as_module(model), "module" if self._auto else as_specification(layers)
        self._parameters: list[Tensor] = []
        self._layers: Sequence[Layer] = []
        self._forms: list[tuple[bool, ...]] = []
        self._steps = 0
        self._skipped: Tensor | int = 0
        self._fresh = self._compared = False
        self._seen: Observation | None = None
        self._last: Record | None = None
        self._resolve(inner)
        if not self._takes_layers_of_rule(inner):
            warn_of_unmeasured(named_parameters_of(inner, self._model, self._specification), NOTHING_RECORDED)
            for message in flattened(self._layers, self._specification):
                warnings.warn(message, UserWarning, stacklevel=2)
        self._warned = not any(map(can_be_measured, self._parameters))
        self._optimizer = weakref.ref(inner)
        if any(isinstance(other, Monitor) for other in OptimizerHooks.attached_to(inner)):
            logger.warning(
                "%s has another Monitor attached already: both record; detach() the first if it was to be replaced",
                type(inner).__name__,
            )
        OptimizerHooks.watch(inner, self)
        self._attached = True
        # Also runs when the program ends. Sinks that were dropped are closed too: they may have a run to end.
        closing = [sink for sink in sinks if hasattr(sink, "close")]
        self._close_sinks = weakref.finalize(self, close, closing)

    @property
    def every(self) -> int:
        """The number of steps from one record to the next."""
        return self._every

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return [layer.name for layer in self._layers]

    @property
    def sinks(self) -> list[Sink]:
        """Where records go; sinks that raised are no longer there."""
        return list(self._sinks)

    @property
    def steps(self) -> int:
        """How many steps have been counted. Waits for the device where a gradient scaler may have skipped some."""
        return self._steps - int(self._skipped)

    def get_last_record(self) -> Record | None:
        """Return the last record; None before the first. It remains after `detach()`.

        Raises:
            RuntimeError: The optimizer no longer exists.
        """
        if self._attached and self._optimizer() is None:
            raise RuntimeError("the optimizer of this Monitor no longer exists; make a Monitor for the one in use")
        return self._last

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps, so that a resumed run continues the count."""
        return {"version": 1, "steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the count from a saved number of steps.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is no state of a Monitor; nothing is changed then.
        """
        if not has_type(state_dict, Mapping):
            raise TypeError(f"state_dict must be what state_dict() returned, not {type(state_dict).__name__}")
        steps = state_dict.get("steps")
        if state_dict.get("version") != 1 or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"state_dict={dict(state_dict)!r} is no state of a Monitor: it needs version 1 and steps")
        self._steps, self._skipped, self._compared = steps, 0, False

    def detach(self) -> None:
        """Remove the hooks and close the sinks. A second call does nothing."""
        optimizer = self._optimizer()
        if self._attached and optimizer is not None:
            OptimizerHooks.remove(optimizer, self)
        self._attached, self._seen = False, None
        self._close_sinks()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        gone = "an optimizer that no longer exists" if self._attached else "detached"
        attached = type(optimizer).__name__ if self._attached and optimizer is not None else gone
        parts = [attached, f"every {self._every} steps", f"{len(self._layers)} layers", *map(sink_name, self._sinks)]
        return f"Monitor({', '.join(parts)})"

    # --- What the optimizer's hooks call ------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> bool:
        """Return whether this step is to be recorded, as far as is known without reading the device."""
        self._seen = None  # of a step that raised
        self._fresh = not optimizer.state
        if not self._compared and several_processes():
            self._compare(optimizer)
        return (self._steps + 1) % self._every == 0

    @torch.no_grad()
    def look(self, optimizer: Any, measured: Sequence[Member]) -> None:
        """Measure gradients and weights, and keep a copy of the weights."""
        self._resolve(optimizer)
        members = self._statistics.members
        if not all(map(can_be_measured, members)) or runs_on_fakes(members[0]):
            self._warn_without_values()
            return
        self._seen = Observation(self._statistics, optimizer, measured)

    @torch.no_grad()
    def end(self, optimizer: Any) -> None:
        """Count the step; if it is to be recorded, measure the updates and deliver the record."""
        seen, self._seen = self._seen, None
        if self._fresh and makes_state_only(optimizer.param_groups):
            return
        self._steps += 1
        found_inf = getattr(optimizer, "found_inf", None)
        overflow = None if found_inf is None else found_inf > 0
        if overflow is not None:  # a fused optimizer is called, and skips the step itself
            self._skipped = overflow + self._skipped
        if seen is None:
            return
        values = seen.values()
        try:
            (overflowed,), (skipped,), *numbers = fetched([overflow, self._skipped, *values], cast(Tensor, values[0]))
        except NoValuesError:  # of fake tensors on an accelerator
            self._warn_without_values()
            return
        self._steps, self._skipped = self._steps - int(skipped), 0
        if not overflowed and self._steps % self._every == 0:
            self._last = seen.record(self._steps, numbers)
            deliver(self._sinks, self._last)

    def _compare(self, optimizer: Optimizer) -> None:
        """Raise unless the processes that share parameters record the same steps; each record is a sum over them."""
        if self._fresh and makes_state_only(optimizer.param_groups):
            return
        self._resolve(optimizer)
        if self._statistics.sharing is not None:
            alike = {"every": self._every, "the number of steps counted": self._steps}
            check_members("Monitor", alike, self._statistics, needs_all=True)
        self._compared = True

    def _resolve(self, optimizer: Optimizer) -> None:
        """Find the layers, unless those found before still hold."""
        parameters = parameters_of(optimizer.param_groups)
        of_rule = self._takes_layers_of_rule(optimizer)
        layers = OptimizerHooks.members_of(optimizer)[0].layers if of_rule else self._layers
        known = bool(layers) and same_objects(layers, self._layers) and same_objects(parameters, self._parameters)
        forms = [(can_be_measured(p), hasattr(p, "device_mesh"), hasattr(p, "_fsdp_flattened")) for p in parameters]
        if known and forms == self._forms and not self._statistics.moved_away():
            return
        if not of_rule:
            named = named_parameters_of(optimizer, self._model, self._specification)
            layers = make_layers(named, self._specification, self._model, find_shards(parameters, self._model))
        self._parameters, self._layers, self._forms = parameters, layers, forms
        self._statistics = LayerStatistics(layers, ())

    def _warn_without_values(self) -> None:
        if not self._warned:
            self._warned = True
            warn_without_values(NOTHING_RECORDED, 2)

    def _takes_layers_of_rule(self, optimizer: Optimizer) -> bool:
        return self._auto and len(OptimizerHooks.members_of(optimizer)) == 1
