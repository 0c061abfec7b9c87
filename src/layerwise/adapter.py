"""Attach a rule to an optimizer."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .apply import Place, make_place
from .arguments import check_choice, chosen
from .factors import Factors
from .fused import can_be_dealt
from .hooks import OptimizerHooks
from .idle import makes_state_only
from .late import LateFactors
from .layers import Exclusion, Layer, LayerSpecification
from .nonfinite import FiniteGradients, OnNonfinite
from .optimizers import PLACES, PlaceName, acting_optimizer, automatic_place, no_effect, refuse, unwrap
from .resolution import Request, Resolution, resolve
from .rules.base import State
from .rules.combine import bounds as bounded
from .rules.combine import (
    check_bounds,
    check_rule,
    default,
    derived_state,
    get_selection,
    initial_state,
    load_state,
    remarks_of,
)
from .rules.selection import Selection
from .splits import Split
from .state import carried_over, check_saved, copied, described
from .statistics import NOTHING, check_needs

logger = logging.getLogger("layerwise")
Decay = Literal["auto", "scaled", "plain"]


class LayerwiseLR:
    """Gives each layer of a network its own learning rate, on any optimizer.

    `lr_l = lr · f_l`, where the rule says how large the layer's factor f_l is at each step and `apply` where it acts.

    Attaching registers hooks; the optimizer's `param_groups`, `state_dict()`, `step` and type stay as they are, so that
    schedulers, gradient scalers, clipping and checkpoints work as without it. The hooks do not travel with a copy or a
    pickle of the optimizer: attach again there, and carry the state over with `state_dict()`.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper of Accelerate or Fabric around one. Its parameters may be
            sharded (FSDP, tensor parallel): the layers' statistics are those of the whole layers, with one collective a
            step for each distinct mesh.
        rule: How large the factors are; one of `layerwise.rules`, or an object like them.
        model: Names the layers. None takes the names of an optimizer built from `model.named_parameters()`.
        layers: `"module"` (the module that directly owns the parameters: weight and bias together), `"parameter"`, a
            list of fnmatch patterns, or a callable `(name, parameter) -> layer name or None`. `"auto"`: what the
            rule's paper took. A parameter without a layer keeps factor 1.
        apply: Where the factor acts. `"gradient"`: `g ← f g` before the optimizer sees it, so inside the momentum; the
            gradient is left so. `"lr"`: this step's rate. `"update"`: `w ← w_old + f (w_new − w_old)`, at the cost of a
            copy of the parameters during the step. `"auto"`: what the rule's paper did for this optimizer.
        decay: Whether under `"gradient"` the factor multiplies coupled weight decay too: `"scaled"` or `"plain"`.
        exclude: Layers left at factor 1: None, fnmatch patterns of layer names, or a callable
            `(parameter name, parameter) -> bool`, which must hold for all of the layer's parameters.
        bounds: `(low, high)`, a clamp of the factors.
        on_nonfinite: What a gradient with NaN or infinity in it does. `"ignore"`: the step is taken, and rules that
            read gradients give its layer factor 1. `"raise"`: `FloatingPointError`, which names layer and step, before
            parameters, states or this adapter's factors change; not where a gradient scaler skips such steps. It reads
            the gradients once more and waits for the device (one more collective, if sharded) at each step.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the combination would give wrong numbers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> from layerwise.rules import Constant
        >>> adapter = LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> adapter.get_last_lr()
        {'0': 0.2, '2': 0.1}
    """

    def __init__(
        self,
        optimizer: Any,
        rule: Any,
        model: nn.Module | None = None,
        *,
        layers: LayerSpecification | Literal["auto"] = "auto",
        apply: PlaceName | Literal["auto"] = "auto",
        decay: Decay = "auto",
        exclude: Exclusion | Literal["auto"] = "auto",
        bounds: tuple[float, float] | None = None,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        holder = unwrap(optimizer)
        inner = acting_optimizer(holder)
        refuse(inner)
        check_rule(rule)
        check_needs(getattr(rule, "needs", ("gradient_norm",)))
        check_choice("apply", apply, ("auto", *PLACES))
        check_choice("decay", decay, ("auto", "scaled", "plain"))
        check_choice("on_nonfinite", on_nonfinite, ("ignore", "raise"))
        self._finite = FiniteGradients() if on_nonfinite == "raise" else None
        self._rule = rule if bounds is None else bounded(rule, *check_bounds(bounds))
        self._asks = getattr(self._rule, "asks", None)
        self.enabled = True
        self._holder = weakref.ref(holder)
        self._request = Request(
            rule=self._rule,
            model=model,
            layers=chosen(layers, default(rule, "layers"), "module"),
            exclude=chosen(exclude, default(rule, "exclude"), None),
            apply=apply,
            preferred=chosen("auto", default(rule, "place"), "lr"),
            decay=chosen(decay, default(rule, "decay"), "scaled"),
            decay_given=decay != "auto",
        )
        self._state: State = {}
        self._epoch = 1
        self._told = False
        self._idle = False
        self._place_name = None
        self._take(resolve(inner, holder, self._request))
        self._optimizer = weakref.ref(inner)
        OptimizerHooks.add(inner, self)
        # ZeRO makes its inner optimizer anew when a group is added.
        self._follows = None if inner is holder else holder.register_step_pre_hook(self._follow)
        self._attached = True
        for message in self._remarks(inner):
            logger.warning(message)

    # --- What a person asks -------------------------------------------------------------------------------------------

    @property
    def rule(self) -> Any:
        """The rule; attach another adapter for another one."""
        return self._rule

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return self._found.names

    @property
    def apply(self) -> PlaceName:
        """Where the factors act: `"gradient"`, `"lr"` or `"update"`."""
        return cast(PlaceName, self._place_name)

    @property
    def decay(self) -> str:
        """Whether coupled weight decay is `"scaled"` with the gradient or `"plain"`."""
        return self._request.decay

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1 by `end_epoch()`."""
        return self._epoch

    def layer_table(self) -> list[Layer]:
        """The layers themselves, with their parameters."""
        return list(self._found.layers)

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer at the last step; 1 before the first. Waits for the device."""
        self._forget_failed()
        numbers = [1.0] * len(self._found.layers) if self._factors is None else self._factors.read()
        return dict(zip(self.layers, numbers, strict=True))

    def get_last_lr(self) -> dict[str, float]:
        """Return the rate of each layer at the last step, `lr · f_l`, f_l of this adapter alone. Waits for the device.

        The base rate is that of the parameter group of the layer's first parameter, its weight as a rule.
        """
        self._forget_failed()
        by_group = self._last_rates if self._last_rates is not None else _rates(self._required().param_groups)
        rates = [by_group[group] for group in self._found.first_group]
        return {
            name: float("nan") if rate is None else float(rate) * factor
            for (name, factor), rate in zip(self.get_last_factors().items(), rates, strict=True)
        }

    def get_last_selection(self) -> dict[str, Selection]:
        """Return what a rule that chooses layers found of each: its value, its ẑ, and whether it is chosen.

        Value and ẑ are NaN where nothing has been measured: before the end of the first epoch of analysis, for layers
        that received no gradient, and for choices at random. Before the first `end_epoch()` the log says so, once.

        Raises:
            ValueError: The rule chooses no layers.
        """
        selection = get_selection(self._rule, self._state)
        if selection is None:
            raise ValueError(f"{self._rule!r} chooses no layers; GradientAmplification and LayerFreezing do")
        if self._epoch == 1 and self._last_rates is not None and not any(one.selected for one in selection):
            if not self._told:
                logger.warning(
                    "nothing is chosen yet, since no epoch has ended: call end_epoch() of the adapter after each epoch"
                )
            self._told = True
        return dict(zip(self.layers, selection, strict=True))

    def end_epoch(self) -> None:
        """Tell rules that count epochs that one has ended; the first is epoch 1. May wait for the device."""
        if hasattr(self._rule, "end_epoch"):
            self._state = self._rule.end_epoch(self._state)
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's state: names, numbers and tensors, which `torch.load(weights_only=True)` reads."""
        return {
            "version": 1,
            "rule": type(self._rule).__name__,
            "arguments": described(self._rule),
            "layers": self.layers,
            "epoch": self._epoch,
            "state": copied(self._state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of another adapter with the same rule and layers.

        A rule with other arguments goes on with its own, and the log tells of both.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is of another version, or of other layers; nothing is changed then.
        """
        check_saved(state_dict, self._rule, self.layers)
        self._state = load_state(self._rule, state_dict["state"], self._state)
        self._epoch = state_dict["epoch"]
        self._last_raw = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[LayerwiseLR]:
        """Let the optimizer step alone inside a `with` block.

        Example:
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
        optimizer = self._optimizer()
        if self._attached and optimizer is not None:
            OptimizerHooks.remove(optimizer, self)
            # A new place keeps nothing of a step that failed.
            self._place = self._made_place(self.apply)
        if self._follows is not None:
            self._follows.remove()
        self._attached = False

    def __repr__(self) -> str:
        holder = self._holder()
        attached = type(holder).__name__ if self._attached and holder is not None else "detached"
        excluded = self._found.included.count(False)
        parts = [f"{self._rule!r} on {attached}", f"{len(self.layers)} layers", f"apply={self._place_name!r}"]
        if self._place_name == "gradient":
            parts.append(f"decay={self.decay!r}")
        if get_selection(self._rule, self._state) is not None:
            parts.append(f"epoch {self._epoch}")
        if excluded:
            parts.append(f"{excluded} excluded")
        if self._found.outside:
            parts.append(f"{self._found.outside} parameters in no layer")
        return f"LayerwiseLR({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a LayerwiseLR belongs to one optimizer and cannot be copied or pickled (nor are an optimizer's hooks): "
            "attach a new one to the copy, and carry the state over with state_dict() and load_state_dict()"
        )

    # --- What the optimizer's hooks call ------------------------------------------------------------------------------

    def measure(self, optimizer: Any, *, late: bool = False) -> None:
        """Compute this step's factors from the gradients as they arrived.

        Args:
            optimizer: The optimizer.
            late: Whether nothing happens between here and the update, so that factors may be computed during it.
        """
        self._forget_failed()
        holder = self._required()
        groups = holder.param_groups
        if not self._found.holds(groups):
            self._take(resolve(optimizer, holder, self._request))
        elif self._request.apply == "auto":
            # Again at each step: schedulers and checkpoints can bring momentum.
            self._place_at(automatic_place(optimizer, self._request.preferred, self.decay))
        self._idle = not optimizer.state and makes_state_only(optimizer.param_groups)
        if self._idle:
            return
        found, grad_scale = self._found, getattr(optimizer, "grad_scale", None)
        if self._finite is not None:
            self._finite.check(found.layers, found.statistics.sharing, getattr(optimizer, "found_inf", None))
        # A fused kernel that unscales writes into the gradients.
        if late and found.pieces is not None and grad_scale is None and can_be_dealt(optimizer):
            self._before_late = (self._factors, self._last_rates)
            self._factors = LateFactors(found.pieces, groups)
            self._last_rates = _rates(groups)
            return
        if found.in_numbers is not None:
            numbers = found.in_numbers.numbers(found.statistics.numbers(groups, grad_scale))
            self._factors = Factors(numbers, found.included, found.mask)
            self._last_rates = _rates(groups)
            return
        if self._asks is not None and not self._asks(self._state):
            result = self._rule.factors(NOTHING, self._state)
        else:
            found_inf = getattr(optimizer, "found_inf", None)
            with torch.no_grad():
                result = self._rule.factors(found.statistics.compute(groups, grad_scale, found_inf), self._state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self._rule!r}.factors returned {type(result).__name__}; it must return (factors, state)")
        raw, self._state = result
        if not isinstance(raw, Tensor) or raw.shape != (len(found.layers),):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"{self._rule!r} returned factors of shape {shape}; there are {len(found.layers)} layers")
        if self._last_raw is None or self._last_raw[0] is not raw or self._last_raw[1] != raw._version:
            self._factors = Factors(raw, found.included, found.mask)
            self._last_raw = (raw, raw._version)
        self._last_rates = _rates(groups)

    @property
    def acts(self) -> bool:
        """Whether any factor of this step is not 1, as far as is known without asking the device."""
        return not self._idle and (self._factors is None or not self._factors.neutral)

    def act(self, view: Any, *, private: bool) -> list[Split]:
        """Let this step's factors act on the view."""
        return self._place.act(view, self._found.partition, cast(Factors, self._factors), private=private)

    def finish(self) -> None:
        """Act after the step."""
        self._place.finish()
        cast(Factors, self._factors).complete()
        self._before_late = None

    # --- How it is put together ---------------------------------------------------------------------------------------

    def _take(self, found: Resolution) -> None:
        """Go on with these layers, and with what is still true of the rule's state."""
        before = self._found.names if self._state else []
        fresh = initial_state(self._rule, found.layers, found.statistics.device)
        state = derived_state(self._rule, carried_over(fresh, self._state, found.names, before))
        self._found, self._state = found, state
        self._place_at(found.place)
        self._last_raw: tuple[Tensor, int] | None = None
        self._last_rates: list[Any] | None = None
        self._factors: Factors | None = None
        self._before_late: tuple[Factors | None, list[Any] | None] | None = None

    def _forget_failed(self) -> None:
        """Go back to the factors of the last step, where those of a later one were to come during it and it failed."""
        if self._before_late is not None:
            (self._factors, self._last_rates), self._before_late = self._before_late, None

    def _place_at(self, name: PlaceName) -> None:
        if name != self._place_name:
            self._place_name: PlaceName | None = name
            self._place = self._made_place(name)

    def _made_place(self, name: PlaceName) -> Place:
        return make_place(name, self.decay, automatic=self._request.apply == "auto")

    def _follow(self, holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inner, hooked = acting_optimizer(holder), self._optimizer()
        if inner is not hooked:
            OptimizerHooks.add(inner, self)
            self._optimizer = weakref.ref(inner)

    def _remarks(self, optimizer: Optimizer) -> list[str]:
        """Return what a person should know about this attachment."""
        remarks = [no_effect(optimizer, self.apply)]
        if self._found.outside:
            among = len(self._found.parameters)
            remarks.append(f"{self._found.outside} of the optimizer's {among} parameters are in no layer: factor 1")
        if OptimizerHooks.others(optimizer, self):
            remarks.append(
                f"{type(optimizer).__name__} has another LayerwiseLR attached already: their factors multiply, and "
                "each tells of its own only; detach() the first if it was meant to be replaced"
            )
        return [remark for remark in remarks if remark] + remarks_of(self._rule, self._found.layers)

    def _required(self) -> Optimizer:
        holder = self._holder()
        if holder is None:
            raise RuntimeError("the optimizer of this LayerwiseLR no longer exists; attach to the one in use")
        return holder


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return each group's rate; a tensor is copied, since schedulers write into it."""
    rates = [group.get("lr") for group in groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
