"""Attach a rule to an optimizer."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .apply import make_place
from .arguments import check_choice, chosen
from .factors import Factors
from .hooks import OptimizerHooks
from .layers import Exclusion, Layer, LayerSpecification, included_layers, make_layers, named_parameters_of
from .optimizers import PLACES, PlaceName, automatic_place, check_place, no_effect, refuse, unwrap
from .partition import Partition, Split
from .rules.base import State
from .rules.combine import bounds as bounded
from .rules.combine import check_bounds, check_rule, default, derived_state, get_selection, initial_state, load_state
from .rules.elementwise import ElementwiseRule, check_elementwise, is_elementwise
from .rules.selection import Selection
from .state import carried_over, check_saved, copied
from .statistics import AS_NUMBERS, NOTHING, LayerStatistics, check_needs
from .tensors import same_objects

logger = logging.getLogger("layerwise")
Decay = Literal["auto", "scaled", "plain"]
MOST_NUMBERS = 256
"""Layers up to which plain numbers cost less than tensor operations; on the CPU, for elementwise rules."""


class LayerwiseLR:
    """Gives each layer of a network its own learning rate, on any optimizer.

    `lr_l = lr · f_l`, where the rule says how large the layer's factor f_l is at each step and `apply` where it acts.

    Attaching registers hooks; the optimizer's `param_groups`, `state_dict()`, `step` and type stay as they are, so that
    schedulers, gradient scalers, clipping and checkpoints work as without it. The hooks do not travel with a copy or a
    pickle of the optimizer: attach again there, and carry the state over with `state_dict()`.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper of Accelerate or Fabric around one.
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
    ) -> None:
        inner = unwrap(optimizer)
        refuse(inner)
        check_rule(rule)
        check_needs(getattr(rule, "needs", ("gradient_norm",)))
        check_choice("apply", apply, ("auto", *PLACES))
        check_choice("decay", decay, ("auto", "scaled", "plain"))
        self._rule = rule if bounds is None else bounded(rule, *check_bounds(bounds))
        self._asks = getattr(self._rule, "asks", None)
        self.enabled = True
        self._optimizer = weakref.ref(inner)
        self._model = model
        self._specification: LayerSpecification = chosen(layers, default(rule, "layers"), "module")
        self._exclude: Exclusion = chosen(exclude, default(rule, "exclude"), None)
        self._apply, self._decay_argument = apply, decay
        self._decay: str = chosen(decay, default(rule, "decay"), "scaled")
        self._preferred: str = chosen("auto", default(rule, "place"), "lr")
        self._state: State = {}
        self._layers: list[Layer] = []
        self._epoch = 1
        self._attached = False
        self._place_name = None
        self._last_raw: tuple[Tensor, int] | None = None
        self._last_rates: list[Any] | None = None
        self._factors: Factors | None = None
        self._resolve(inner)
        OptimizerHooks.add(inner, self)
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
        return [layer.name for layer in self._layers]

    @property
    def apply(self) -> PlaceName:
        """Where the factors act: `"gradient"`, `"lr"` or `"update"`."""
        return cast(PlaceName, self._place_name)

    @property
    def decay(self) -> str:
        """Whether coupled weight decay is `"scaled"` with the gradient or `"plain"`."""
        return self._decay

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1 by `end_epoch()`."""
        return self._epoch

    def layer_table(self) -> list[Layer]:
        """The layers themselves, with their parameters."""
        return list(self._layers)

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer at the last step; 1 before the first. Waits for the device."""
        numbers = [1.0] * len(self._layers) if self._factors is None else self._factors.read()
        return dict(zip(self.layers, numbers, strict=True))

    def get_last_lr(self) -> dict[str, float]:
        """Return the rate of each layer at the last step, `lr · f_l`, f_l of this adapter alone. Waits for the device.

        The base rate is that of the parameter group of the layer's first parameter, its weight as a rule.
        """
        by_group = self._last_rates if self._last_rates is not None else _rates(self._required().param_groups)
        rates = [by_group[group] for group in self._first_group]
        return {
            name: float("nan") if rate is None else float(rate) * factor
            for (name, factor), rate in zip(self.get_last_factors().items(), rates, strict=True)
        }

    def get_last_selection(self) -> dict[str, Selection]:
        """Return what a rule that chooses layers found of each: its value, its ẑ, and whether it is chosen.

        Value and ẑ are NaN where nothing has been measured: before the first epoch of analysis, for layers that
        received no gradient, and for choices at random.

        Raises:
            ValueError: The rule chooses no layers.
        """
        selection = get_selection(self._rule, self._state)
        if selection is None:
            raise ValueError(f"{self._rule!r} chooses no layers; GradientAmplification and LayerFreezing do")
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
            "layers": self.layers,
            "epoch": self._epoch,
            "state": copied(self._state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of another adapter with the same rule and layers.

        The rule's arguments are not compared: attach with those of the saved run.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            TypeError: It is no mapping.
            ValueError: It is of another version, or of other layers; nothing is changed then.
        """
        check_saved(state_dict, type(self._rule).__name__, self.layers)
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
            self._place = make_place(self.apply, self._decay, automatic=self._apply == "auto")
        self._attached = False

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        attached = type(optimizer).__name__ if self._attached and optimizer is not None else "detached"
        excluded = len(self._layers) - sum(self._included)
        parts = [f"{self._rule!r} on {attached}", f"{len(self._layers)} layers", f"apply={self._place_name!r}"]
        if self._place_name == "gradient":
            parts.append(f"decay={self._decay!r}")
        if get_selection(self._rule, self._state) is not None:
            parts.append(f"epoch {self._epoch}")
        if excluded:
            parts.append(f"{excluded} excluded")
        if self._outside:
            parts.append(f"{self._outside} parameters in no layer")
        return f"LayerwiseLR({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a LayerwiseLR belongs to one optimizer and cannot be copied or pickled (nor are an optimizer's hooks): "
            "attach a new one to the copy, and carry the state over with state_dict() and load_state_dict()"
        )

    # --- What the optimizer's hooks call ------------------------------------------------------------------------------

    def measure(self, optimizer: Any) -> None:
        """Compute this step's factors from the gradients as they arrived."""
        groups = optimizer.param_groups
        if not same_objects(self._parameters, _parameters(groups)) or self._statistics.moved_away():
            self._resolve(optimizer)  # parameters added, replaced by fully_shard, or moved to another device
        elif self._apply == "auto":
            # Again at each step: schedulers and checkpoints can bring momentum.
            self._place_at(automatic_place(optimizer, self._preferred, self._decay))
        grad_scale = getattr(optimizer, "grad_scale", None)
        if self._in_numbers is not None:
            numbers = self._in_numbers.numbers(self._statistics.numbers(groups, grad_scale))
            self._factors = Factors(numbers, self._included, self._mask)
            self._last_rates = _rates(groups)
            return
        if self._asks is not None and not self._asks(self._state):
            result = self._rule.factors(NOTHING, self._state)
        else:
            found_inf = getattr(optimizer, "found_inf", None)
            with torch.no_grad():
                result = self._rule.factors(self._statistics.compute(groups, grad_scale, found_inf), self._state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self._rule!r}.factors returned {type(result).__name__}; it must return (factors, state)")
        raw, self._state = result
        if not isinstance(raw, Tensor) or raw.shape != (len(self._layers),):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise ValueError(f"{self._rule!r} returned factors of shape {shape}; there are {len(self._layers)} layers")
        if self._last_raw is None or self._last_raw[0] is not raw or self._last_raw[1] != raw._version:
            self._factors = Factors(raw, self._included, self._mask)
            self._last_raw = (raw, raw._version)
        self._last_rates = _rates(groups)

    @property
    def acts(self) -> bool:
        """Whether any factor of this step is not 1, as far as is known without asking the device."""
        return self._factors is None or not self._factors.neutral

    def act(self, view: Any) -> list[Split]:
        """Let this step's factors act on the view."""
        return self._place.act(view, self._partition, cast(Factors, self._factors))

    def finish(self) -> None:
        """Act after the step."""
        self._place.finish()

    # --- How it is put together ---------------------------------------------------------------------------------------

    def _resolve(self, optimizer: Optimizer) -> None:
        """Find the layers, and everything that follows from them; change nothing if that fails."""
        refuse(optimizer)
        named = named_parameters_of(optimizer, self._model)
        layers = make_layers(named, self._specification, self._model)
        included = included_layers(layers, self._exclude)
        layers = [replace(layer, included=inside) for layer, inside in zip(layers, included, strict=True)]
        automatic = automatic_place(optimizer, self._preferred, self._decay)
        place_name = automatic if self._apply == "auto" else cast(PlaceName, self._apply)
        check_place(optimizer, place_name, self._decay, decay_given=self._decay_argument != "auto")
        needs = getattr(self._rule, "needs", ("gradient_norm",))
        elementwise = cast(ElementwiseRule, self._rule) if is_elementwise(self._rule) else None
        if elementwise is not None:
            check_elementwise(elementwise)
        if "learning_rate" in needs and any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(f"{self._rule!r} needs the rate, and {type(optimizer).__name__} has no 'lr' in its groups")
        statistics = LayerStatistics(layers, needs)
        names = [layer.name for layer in layers]
        state = carried_over(initial_state(self._rule, layers, statistics.device), self._state, names, self.layers)
        state = derived_state(self._rule, state)

        self._parameters = _parameters(optimizer.param_groups)
        self._partition = Partition(statistics.layer_of)
        self._layers, self._statistics, self._state = layers, statistics, state
        few = statistics.device.type == "cpu" and len(layers) <= MOST_NUMBERS
        self._in_numbers = elementwise if few and set(needs) <= AS_NUMBERS else None
        self._included = included
        self._mask = None if all(included) else torch.tensor(included, device=statistics.device)
        self._place_at(place_name)
        self._outside = len(self._parameters) - len(statistics.layer_of)
        self._last_raw, self._last_rates, self._factors = None, None, None
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._first_group = [group_of[id(layer.parameters[0])] for layer in layers]

    def _place_at(self, name: PlaceName) -> None:
        if name != self._place_name:
            self._place_name: PlaceName | None = name
            self._place = make_place(name, self._decay, automatic=self._apply == "auto")

    def _remarks(self, optimizer: Optimizer) -> list[str]:
        """Return what a person should know about this attachment."""
        remarks = [no_effect(optimizer, self.apply)]
        if self._outside:
            remarks.append(
                f"{self._outside} of the optimizer's {len(self._parameters)} parameters are in no layer: factor 1"
            )
        if OptimizerHooks.others(optimizer, self):
            remarks.append(
                f"{type(optimizer).__name__} has another LayerwiseLR attached already: their factors multiply, and "
                "each tells of its own only; detach() the first if it was meant to be replaced"
            )
        return [remark for remark in remarks if remark]

    def _required(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this LayerwiseLR no longer exists; attach to the one in use")
        return optimizer


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return each group's rate; a tensor is copied, since schedulers write into it."""
    rates = [group.get("lr") for group in groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def _parameters(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]
