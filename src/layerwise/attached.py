"""A rule on an optimizer: what the optimizer's hooks call, and what lasts from one step to the next."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .apply import Place, make_place
from .factors import Factors
from .first_steps import FirstSteps, KnownGroups
from .fused import can_be_dealt
from .hooks import OptimizerHooks
from .idle import makes_state_only
from .late import LateFactors
from .layer_statistics import WEIGHT_NORMS
from .layers import Layer
from .nonfinite import FiniteGradients
from .optimizers import PlaceName, acting_optimizer, check_backward_is_over
from .places import automatic_place
from .replication import check_processes
from .resolution import Request, Resolution, rates_of, resolve
from .rules.base import State
from .rules.questions import is_pair, load_state, needs_of, renewed_state
from .rules.state import copied, described
from .sharding import absent
from .splits import Split
from .statistics import NOTHING
from .tensors import has_values, moved, runs_on_fakes, warn_without_values
from .trial import Verdict, verdict_of

INDEPENDENT = WEIGHT_NORMS | {"learning_rate"}
"""Statistics that do not depend on gradients."""
STEPS_AS_BARE = "steps are those of the optimizer alone, and factors are 1, until they do"


class AttachedRule:
    """Measures the layers at each step, lets the rule's factors act, and follows the optimizer where it changes.

    `enabled` says whether it takes part in steps, `found` what the layers are, `state` what the rule remembers,
    `factors` those of the last step and `rates` the rates of its parameter groups; both None before the first one.

    Args:
        holder: The optimizer whose groups hold all parameters.
        request: What was asked for.
        finite: Raises before a step whose gradients are not finite; None lets it be taken.

    Raises:
        ValueError: The combination would give wrong numbers.
    """

    def __init__(self, holder: Optimizer, request: Request, finite: FiniteGradients | None) -> None:
        optimizer = acting_optimizer(holder)
        self.enabled = True
        self.attached = True
        self.state: State = {}
        self._request, self._rule, self._finite = request, request.rule, finite
        self._asks = getattr(request.rule, "asks", None)
        self._idle = self._dry = self._measured = False
        self._place_name: PlaceName | None = None
        self._holder, self._optimizer = weakref.ref(holder), weakref.ref(optimizer)
        verdict = verdict_of(optimizer)
        may_replace = verdict is not None and (verdict.replaces or verdict.untried is not None)
        self._known = KnownGroups(holder.param_groups) if may_replace else None
        self._take(resolve(optimizer, self._source, request))
        self._first = None if verdict is None else self._first_steps(optimizer, verdict)
        OptimizerHooks.add(optimizer, self)
        # ZeRO makes its inner optimizer anew when a group is added.
        self._follows = None if optimizer is holder else holder.register_step_pre_hook(self._follow)

    @property
    def layers(self) -> list[Layer]:
        """The layers."""
        return self.found.layers

    @property
    def place(self) -> PlaceName:
        """Where the factors act."""
        return cast(PlaceName, self._place_name)

    @property
    def attached_to(self) -> str:
        """The name of the optimizer whose groups hold all parameters, or what has become of it."""
        if not self.attached:
            return "detached"
        holder = self._holder()
        return "an optimizer that no longer exists" if holder is None else type(holder).__name__

    def check_current(self) -> None:
        """Raise if training no longer uses the optimizer or the parameters, unless this is detached.

        Raises:
            RuntimeError: It does not.
        """
        if not self.attached:
            return
        self._required()
        model = self._request.model
        used = set[int]() if model is None else set(map(id, model.parameters()))
        if used and not any(id(p) in used for layer in self.layers for p in layer.parameters):
            raise RuntimeError(
                "the model has other parameters now than the optimizer of this LayerwiseLR, whose steps do not change "
                "the model; make an optimizer of model.parameters() and attach to it"
            )

    def last_factors(self) -> list[float]:
        """Return each layer's factor at the last step, 1 before the first; waits for the device."""
        self._forget_failed()
        return [1.0] * len(self.found.layers) if self.factors is None else self.factors.read()

    def last_rates(self) -> list[float]:
        """Return each layer's rate at the last step; NaN where a group has none. Waits for the device."""
        self._forget_failed()
        by_group = self.rates if self.rates is not None else rates_of(self._groups)
        rates = [by_group[group] for group in self.found.first_group]
        return [
            float("nan") if rate is None else float(rate) * factor
            for rate, factor in zip(rates, self.last_factors(), strict=True)
        ]

    def save(self) -> Any:
        """Return a copy of the rule's state."""
        return copied(self.state)

    def has_values(self) -> bool:
        """Return whether the parameters' values exist."""
        first = self.found.layers[0].parameters[0]
        return has_values(first) and not runs_on_fakes(first)

    def load(self, saved: Any) -> None:
        """Go on with a saved state of the rule."""
        self.state = load_state(self._rule, saved, self.state)
        self._last_raw, self._compared = None, False

    def detach(self) -> None:
        """Take the hooks off; a second call does nothing."""
        optimizer = self._optimizer()
        if self.attached and optimizer is not None:
            OptimizerHooks.remove(optimizer, self)
            # A new place keeps nothing of a step that failed.
            self._place = self._made_place(self.place)
        if self._follows is not None:
            self._follows.remove()
        self.attached = False

    # --- What the optimizer's hooks call ------------------------------------------------------------------------------

    def prepare(self, optimizer: Any) -> None:
        """See what has changed since the last step, and raise before anything else does if a gradient is not finite."""
        check_backward_is_over(optimizer)
        self._forget_failed()
        self._required()
        if not self.found.holds(self._groups, self._request):
            self._take(resolve(optimizer, self._source, self._request))
        elif self._request.apply == "auto":
            # Again at each step: schedulers and checkpoints can bring momentum.
            self._place_at(automatic_place(optimizer, self._request.preferred, self._request.decay))
        dry = self.found.dry or runs_on_fakes(self.found.layers[0].parameters[0])
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
        if self._first is not None:
            self._first.before(optimizer)

    def measure(self, optimizer: Any, *, late: bool = False) -> None:
        """Compute this step's factors from the gradients as they arrived.

        Args:
            optimizer: The optimizer.
            late: Whether nothing happens between here and the update, so that factors may be computed during it.
        """
        if self._idle:
            return
        groups = self._groups
        found, grad_scale = self.found, getattr(optimizer, "grad_scale", None)
        if not self.enabled:
            self._stand_by(optimizer)
            return
        # A fused kernel that unscales writes into the gradients.
        if late and found.pieces is not None and grad_scale is None and can_be_dealt(optimizer):
            self._before_late = (self.factors, self.rates)
            self.factors = LateFactors(found.pieces, groups)
            self.rates = rates_of(groups)
            return
        if found.in_numbers is not None:
            numbers = found.in_numbers.numbers(found.statistics.numbers(groups, grad_scale))
            self.factors = Factors(numbers, found.included, found.mask)
            self.rates = rates_of(groups)
            return
        if self._asks is not None and not self._asks(self.state):
            result = self._rule.factors(NOTHING, self.state)
        else:
            found_inf = getattr(optimizer, "found_inf", None)
            with torch.no_grad():
                result = self._rule.factors(found.statistics.compute(groups, grad_scale, found_inf), self.state)
        if not is_pair(result):
            raise TypeError(
                f"{described(self._rule)}.factors returned {type(result).__name__}; it must return (factors, state)"
            )
        raw, self.state = result
        if not isinstance(raw, Tensor) or raw.shape != (len(found.layers),):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(
                f"{described(self._rule)} returned factors of shape {shape}; return a tensor of shape "
                f"({len(found.layers)},), one factor for each layer"
            )
        if found.statistics.paused is not None:
            # Bounds and rules of one's own may make another number than 1 of NaN.
            paused = found.statistics.paused
            raw = torch.where(moved(paused, raw.device), 1.0, raw)
        if self._last_raw is None or self._last_raw[0] is not raw or self._last_raw[1] != raw._version:
            self.factors = Factors(raw, found.included, found.mask)
            self._last_raw = (raw, raw._version)
        self.rates = rates_of(groups)

    def _stand_by(self, optimizer: Any) -> None:
        """Enter the collectives that the other processes enter, which may not be paused; change nothing."""
        if self.found.statistics.sharing is None or (self._asks is not None and not self._asks(self.state)):
            return
        groups = self._groups
        with absent(), torch.no_grad():
            statistics = self.found.statistics.compute(groups)
            if "gradients" in needs_of(self._rule):  # a collective of the rule's own
                self._rule.factors(statistics, self.state)

    @property
    def takes_part(self) -> bool:
        """Whether it has something to do in a step: also while paused, where a collective may follow."""
        compares = self._first is not None and self._first.compares
        return self.enabled or self.found.statistics.sharing is not None or compares

    @property
    def acts(self) -> bool:
        """Whether any factor of this step is not 1, as far as is known without asking the device."""
        return self.enabled and not self._idle and (self.factors is None or not self.factors.neutral)

    def act(self, view: Any, *, private: bool) -> list[Split]:
        """Let this step's factors act on the view."""
        assert self.factors is not None  # measured
        acting = view if self._known is None else self._known
        return self._place.act(acting, self.found.partition, self.factors, private=private)

    def finish(self) -> None:
        """Act after the step."""
        self._place.finish()
        if self._first is not None:
            self._first.after(self._optimizer())
            self._first = None
        if self.factors is not None:
            self.factors.complete()
        self._before_late = None

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

    def _first_steps(self, optimizer: Optimizer, verdict: Verdict) -> FirstSteps:
        return FirstSteps(
            type(optimizer).__name__,
            verdict,
            reads_gradients=bool(set(needs_of(self._rule)) - INDEPENDENT),
            under_update=self.place == "update",
        )

    # --- How it is put together ---------------------------------------------------------------------------------------

    def _take(self, found: Resolution) -> None:
        """Go on with these layers, and with what is still true of the rule's state."""
        before = self.found.names if self.state else []
        self.state = renewed_state(self._rule, found.layers, found.statistics.device, self.state, before)
        self.found = found
        if self._finite is not None:
            self._finite.look_at(found.layers, found.others(self._request.model), self._request.model)
        self._place_at(found.place)
        self._compared = False
        self._last_raw: tuple[Tensor, int] | None = None
        self.rates: list[Any] | None = None
        self.factors: Factors | None = None
        self._before_late: tuple[Factors | None, list[Any] | None] | None = None

    def _forget_failed(self) -> None:
        """Go back to the factors of the last step, where those of a later one were to come during it and it failed."""
        if self._before_late is not None:
            (self.factors, self.rates), self._before_late = self._before_late, None

    def _place_at(self, name: PlaceName) -> None:
        if name != self._place_name:
            self._place_name = name
            self._place = self._made_place(name)

    def _made_place(self, name: PlaceName) -> Place:
        return make_place(name, self._request.decay, automatic=self._request.apply == "auto")

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
