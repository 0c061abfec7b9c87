"""Attach a rule to an optimizer."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Generator, Mapping
from typing import Any, Literal

from torch.optim import Optimizer

from .advice import flattened
from .arguments import check_choice
from .attached import STEPS_AS_BARE, AttachedRule
from .copying import StaysBehind
from .hooks import OptimizerHooks
from .layers import Exclusion, Layer, LayerSpecification, named_parameters_of, warn_of_unmeasured
from .model import Model
from .nonfinite import FiniteGradients, OnNonfinite
from .optimizers import PLACES, PlaceName, acting_optimizer, refuse, unwrap
from .places import no_effect
from .resolution import Decay, requested
from .rules.combine import bounds as bounded
from .rules.combine import check_bounds
from .rules.questions import check_rule, doubts_of, ended_state, get_selection, needs_of, remarks_of
from .rules.selection import Selection
from .rules.state import check_saved, copied, described, kind_of
from .statistics import check_needs

logger = logging.getLogger("layerwise")


class LayerwiseLR(StaysBehind):
    """Gives each layer of a network its own learning rate, on any optimizer.

    `lr_l = lr · f_l`, where the rule says how large the layer's factor f_l is at each step and `apply` where it acts.

    Attaching registers hooks; the optimizer's `param_groups`, `state_dict()`, `step` and type stay as they are, so that
    schedulers, gradient scalers, clipping and checkpoints work as without it. A copy or a pickle of the optimizer has
    no hooks, and one of a module that holds the adapter has None in its place, with a warning: attach again there, and
    carry the state over with `state_dict()`. Where an optimizer is made anew, attach to the new one; the adapter of one
    that is gone raises, and only its `state_dict()` can still be read.

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper of Accelerate or Fabric around one. Its parameters may be
            sharded (FSDP, tensor parallel): the layers' statistics are those of the whole layers, with one collective a
            step for each distinct mesh.
        rule: How large the factors are; one of `layerwise.rules`, or an object like them.
        model: Names the layers. A list or dictionary of modules counts as one model, whose names begin with the index
            or the key. None takes the names of an optimizer built from `model.named_parameters()`.
        layers: `"module"` (the module that directly owns the parameters: weight and bias together; a MultiheadAttention
            or a convolution of PyTorch Geometric as a whole), `"parameter"`, a list of fnmatch patterns, a callable
            `(name, parameter) -> layer name or None`, or a dictionary of layer names and lists of tensors, such as
            `{"log_alpha": [log_alpha]}`, which needs no model. `"auto"`: what the rule's paper took. A parameter
            without a layer keeps factor 1.
        apply: Where the factor acts. `"gradient"`: `g ← f g` before the optimizer sees it, so inside the momentum; the
            gradient is left so. `"lr"`: this step's rate. `"update"`: `w ← w_old + f (w_new − w_old)`, on the CPU with
            a copy of the parameters during the step. `"auto"`: what the rule's paper did for this optimizer.
        decay: Whether under `"gradient"` the factor multiplies coupled weight decay too: `"scaled"` or `"plain"`.
        exclude: Layers left at factor 1: None, fnmatch patterns of layer names, or a callable
            `(parameter name, parameter) -> bool`, which must hold for all of the layer's parameters.
        bounds: `(low, high)`, a clamp of the factors.
        on_nonfinite: What a gradient with NaN or infinity in it does. `"ignore"`: the step is taken, and rules that
            read gradients give its layer factor 1. `"raise"`: `FloatingPointError`, which names layer and step, before
            parameters, states or this adapter's factors change; not where a gradient scaler skips such steps. It reads
            the gradients once more and waits for the device (one more collective, if sharded) at each step.

    Warns:
        UserWarning: All parameters are one layer because their names tell of no modules, or the rule is in doubt about
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
        bounds: tuple[float, float] | None = None,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        holder = unwrap(optimizer)
        inner = acting_optimizer(holder)
        refuse(inner)
        check_rule(rule)
        check_needs(needs_of(rule))
        check_choice("apply", apply, ("auto", *PLACES))
        check_choice("decay", decay, ("auto", "scaled", "plain"))
        check_choice("on_nonfinite", on_nonfinite, ("ignore", "raise"))
        rule = rule if bounds is None else bounded(rule, *check_bounds(bounds))
        self._request = requested(rule, model, layers=layers, apply=apply, decay=decay, exclude=exclude)
        finite = FiniteGradients() if on_nonfinite == "raise" else None
        named = named_parameters_of(holder, self._request.model, self._request.layers)
        warn_of_unmeasured(named, STEPS_AS_BARE)
        self._attached = AttachedRule(holder, self._request, finite)
        self._epoch = 1
        self._told = False
        for message in self._remarks(inner):
            logger.warning(message)
        found = self._attached.found.layers
        for message in flattened(found, self._request.layers) + doubts_of(rule, found):
            warnings.warn(message, UserWarning, stacklevel=2)

    # --- What a person asks -------------------------------------------------------------------------------------------

    @property
    def rule(self) -> Any:
        """The rule; attach another adapter for another one."""
        return self._request.rule

    @property
    def layers(self) -> list[str]:
        """The layers' names, in the model's order; `""` is the root module."""
        return self._attached.found.names

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
        """Whether the rule chooses layers at the ends of epochs, so that `end_epoch()` is to be called."""
        return get_selection(self.rule, self._attached.state) is not None

    @property
    def enabled(self) -> bool:
        """Whether the factors act; not inside `paused()`."""
        return self._attached.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._attached.enabled = value

    def layer_table(self) -> list[Layer]:
        """The layers themselves, with their parameters."""
        return list(self._attached.layers)

    def get_last_factors(self) -> dict[str, float]:
        """Return the factor of each layer at the last step; 1 before the first. Waits for the device.

        Those of the last step remain after `detach()`.

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
        selection = get_selection(self.rule, self._attached.state)
        if selection is None:
            raise ValueError(f"{described(self.rule)} chooses no layers; GradientAmplification and LayerFreezing do")
        if self._epoch == 1 and self._attached.rates is not None and not any(one.selected for one in selection):
            if not self._told:
                logger.warning(
                    "nothing is chosen yet, since no epoch has ended: call end_epoch() of the adapter after each epoch"
                )
            self._told = True
        return dict(zip(self.layers, selection, strict=True))

    def end_epoch(self) -> None:
        """Tell rules that count epochs that one has ended; the first is epoch 1. May wait for the device.

        Raises:
            RuntimeError: The optimizer no longer exists, or the model has other parameters now.
        """
        self._attached.check_current()
        if self._attached.has_values():
            self._attached.state = ended_state(self.rule, self._attached.state)
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's state: names, numbers and tensors, which `torch.load(weights_only=True)` reads."""
        return {
            "version": 1,
            "rule": kind_of(self.rule),
            "arguments": described(self.rule),
            "layers": self.layers,
            "epoch": self._epoch,
            "state": copied(self._attached.state),
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
        parts = [f"{described(self.rule)} on {attached}", f"{len(found.layers)} layers", f"apply={self.apply!r}"]
        if self.apply == "gradient":
            parts.append(f"decay={self.decay!r}")
        if self.counts_epochs:
            parts.append(f"epoch {self._epoch}")
        if excluded:
            parts.append(f"{excluded} excluded")
        if found.outside:
            parts.append(f"{found.outside} parameters in no layer")
        return f"LayerwiseLR({', '.join(parts)})"

    def _remarks(self, optimizer: Optimizer) -> list[str]:
        """Return what a person should know about this attachment."""
        found, remarks = self._attached.found, [no_effect(optimizer, self.apply)]
        if found.outside:
            among = len(found.parameters)
            remarks.append(f"{found.outside} of the optimizer's {among} parameters are in no layer: factor 1")
        if OptimizerHooks.others(optimizer, self._attached):
            remarks.append(
                f"{type(optimizer).__name__} has another LayerwiseLR attached already: their factors multiply, and "
                "each tells of its own only; detach() the first if it was meant to be replaced"
            )
        return [remark for remark in remarks if remark] + remarks_of(self.rule, found.layers)
