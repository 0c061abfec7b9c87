"""What attaching would do, told before training."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import statistics
import time
import warnings
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.optim.optimizer as optimizer_hooks
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

from ._arguments import chosen
from ._hooks import OptimizerHooks
from ._places.allowed import no_effect, why_not_rate
from ._places.trial import reason_against, verdict_of
from ._tensors import has_values, holds_weights
from .adapter import LayerwiseLR
from .layers import DOUBTS, Layer, Model, as_module, as_specification, divided, flattened, joining, named_parameters
from .optimizers import SCALE_INVARIANT, acting_optimizer, decay_is_coupled, is_capturing, unwrap, writes_are_scaled
from .rules import LayerAdaptive
from .rules.base import Rule
from .rules.state import is_state

logger = logging.getLogger("layerwise")

SECONDS = 1.0
"""Of measuring, where nobody has said how long."""

MOST_BYTES = 2**30
"""Of copies that are made where nobody has asked for them: more might not fit beside the training."""

MOST_PAIRS = 200
"""Beyond, the medians hardly move."""


@dataclass(frozen=True)
class Cost:
    """What was measured.

    Args:
        bare: Seconds of the optimizer's own step, median.
        attached: Seconds of the step with the rule attached, median.
        pairs: Number of pairs of steps.
        made_up: Whether the gradients were random numbers, since there were none.
    """

    bare: float
    attached: float
    pairs: int
    made_up: bool

    @property
    def ratio(self) -> float:
        """How many times as long the attached step takes."""
        return self.attached / self.bare

    def __str__(self) -> str:
        gradients = ", random gradients" if self.made_up else ""
        return (
            f"a step takes {self.ratio:.2f} times as long: {1000 * self.attached:.3g} ms, bare "
            f"{1000 * self.bare:.3g} ms (medians of {self.pairs} pairs on copies{gradients})"
        )


@dataclass(frozen=True)
class Failure:
    """The error with which a step with the rule attached ended, where the bare one went well.

    Args:
        error: Its type and its text.
    """

    error: str

    def __str__(self) -> str:
        return "the step failed on a copy with the rule attached, and not on one without"


def measured_cost(
    optimizer: Optimizer, model: Model | None, rule: Any, seconds: float | None = None, **arguments: Any
) -> Cost | Failure | str:
    """Time steps of an optimizer with a rule and without, in turn, on copies of its tensors.

    Model, optimizer, rule, gradients and the states of the random generators stay as they are, to the bit. For the time
    of the measurement there is a copy of model, gradients and optimizer state.

    Args:
        optimizer: The optimizer.
        model: Its model, as for `LayerwiseLR`.
        rule: The rule.
        seconds: About the longest time it takes, but for two warm-up steps and one pair of steps; 0 measures nothing.
            None takes `SECONDS`, unless the copies would take more than `MOST_BYTES`.
        **arguments: As for `LayerwiseLR`.

    Returns:
        The cost, how an attached step failed, or why the cost is not known.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> measured_cost(optimizer, model, None, 0)
        'seconds=0'
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reason = reason_not_to(optimizer, parameters, seconds)
    if reason:
        return reason
    with undisturbed(parameters):
        # Each may raise whatever a model that cannot be copied, or an optimizer of another package, raises.
        try:
            pair = Pair(optimizer, model, rule, parameters, arguments)
        except Exception as error:
            return f"no copy could be made ({_named(error)})"
        try:
            pair.step(pair.bare)  # makes the state
        except Exception as error:
            return f"a copy of the bare optimizer could not take a step ({_named(error)})"
        try:
            return pair.timed(SECONDS if seconds is None else seconds)
        except Exception as error:
            return Failure(_named(error))


def _named(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def reason_not_to(optimizer: Optimizer, parameters: Sequence[Tensor], seconds: float | None) -> str:
    """Return why nothing is to be measured, or ""."""
    if seconds == 0:
        return "seconds=0"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "steps of several processes wait for one another, and only this one measures"
    if not all(map(has_values, parameters)):
        return "tensors on the device 'meta', or fake ones, hold no numbers"
    if optimizer_hooks._global_optimizer_pre_hooks or optimizer_hooks._global_optimizer_post_hooks:
        return "hooks on all optimizers would see the steps"
    if seconds is None:
        state = [value for held in optimizer.state.values() if is_state(held) for value in held.values()]
        tensors = [*parameters, *parameters, *(value for value in state if isinstance(value, Tensor))]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size > MOST_BYTES:
            return f"the copies would take {size / 2**30:.1f} GiB; seconds={SECONDS:g} makes them"
    return ""


@contextlib.contextmanager
def undisturbed(parameters: Sequence[Tensor]) -> Generator[None]:
    """Keep the states of the random generators, and keep the log and the warnings quiet."""
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    own, silent = random.getstate(), logger.disabled
    logger.disabled = True  # attaching has warned already, where it is described
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = silent
        random.setstate(own)


class Pair:
    """Two copies of an optimizer, one with a rule attached, that share copies of parameters and state."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: Model | None,
        rule: Any,
        parameters: Sequence[Tensor],
        arguments: dict[str, Any],
    ) -> None:
        # Hooks belong to who registered them, and a scheduler replaces `step` by one that counts.
        own = {name: v for name, v in vars(optimizer).items() if not name.endswith("_hooks") and name != "step"}
        memo: dict[int, Any] = {}
        layers = arguments.get("layers", "auto")
        model, rule, own, layers = copy.deepcopy((model, rule, own, layers), memo)
        self.copies = [memo[id(p)] for p in parameters]
        self.gradients = [p.grad for p in parameters]
        self.made_up = all(gradient is None for gradient in self.gradients)
        if self.made_up:
            self.gradients = [random_like(p, seed) if p.requires_grad else None for seed, p in enumerate(parameters)]
        self.bare, self.attached = (self._twin(optimizer, own) for _ in range(2))
        LayerwiseLR(self.attached, rule, model, **(arguments | {"layers": layers}))
        self.synchronised = any(p.device.type != "cpu" for p in parameters)

    @staticmethod
    def _twin(optimizer: Optimizer, own: dict[str, Any]) -> Optimizer:
        twin = object.__new__(type(optimizer))
        hooks = {name: OrderedDict[int, Any]() for name in vars(optimizer) if name.endswith("_hooks")}
        vars(twin).update(own | hooks)
        return twin

    def timed(self, seconds: float) -> Cost:
        """Time pairs of steps, in turn this one first and that one first; at least one pair."""
        self.step(self.attached)
        times: dict[Optimizer, list[float]] = {self.bare: [], self.attached: []}
        began, pairs = time.perf_counter(), 0
        while pairs < MOST_PAIRS and (not pairs or time.perf_counter() - began < seconds):
            for twin in (self.bare, self.attached)[:: -1 if pairs % 2 else 1]:
                times[twin].append(self.step(twin))
            pairs += 1
        bare, attached = (statistics.median(times[twin]) for twin in (self.bare, self.attached))
        return Cost(bare, attached, pairs, self.made_up)

    def step(self, twin: Optimizer) -> float:
        """Give fresh gradients, as a factor may have scaled the last ones, take a step, and return its seconds."""
        for p, gradient in zip(self.copies, self.gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self._wait()
        began = time.perf_counter()
        twin.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.synchronised:
            torch.accelerator.synchronize()


def random_like(parameter: Tensor, seed: int) -> Tensor:
    """Return small random numbers for a gradient; the global generators are not asked.

    Args:
        parameter: The parameter.
        seed: Another one for each parameter: equal gradients would give equal factors, and those share a group.
    """
    generator = torch.Generator(parameter.device).manual_seed(seed)
    shape = cast(Any, parameter.shape)
    drawn = torch.randn(shape, generator=generator, dtype=parameter.dtype, device=parameter.device)
    return drawn.mul_(0.01)


def check_seconds(seconds: object) -> None:
    """Refuse what is no time.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.
    """
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"seconds={seconds!r} must be a number of seconds from 0, or None")
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds={seconds!r} must be finite and at least 0; 0 measures nothing")


# --- The diagnosis ---------------------------------------------------------------------------------------------------


def diagnose(
    optimizer: Any,
    model: Model | None = None,
    rule: Any = None,
    *,
    most: int = 40,
    seconds: float | None = None,
    **arguments: Any,
) -> str:
    """Print which layers exist, where a factor would act and why, what it costs, and what would not work.

    Nothing stays attached, and nothing is changed, to the bit: what a step costs is measured on copies of model,
    gradients and optimizer state, with random gradients where there are none yet.

    Args:
        optimizer: The optimizer.
        model: Its model, as for `LayerwiseLR`.
        rule: The rule that would be attached; `LayerAdaptive()` if None.
        most: How many layers are listed; where that is too few for all, frozen ones come last.
        seconds: How long the cost of a step is measured, at the most; 0 leaves it and the copies out. None takes a
            second, unless the copies would take more than 1 GiB.
        **arguments: As for `LayerwiseLR`: `layers`, `apply`, `decay`, `exclude`, `bounds`.

    Returns:
        The text that was printed.

    Raises:
        TypeError: There is no optimizer in `optimizer`, `model` is no module, or `seconds` no number.
        ValueError: `seconds` is negative or not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(784, 10))
        >>> text = diagnose(torch.optim.AdamW(model.parameters()), model)  # doctest: +ELLIPSIS
        LayerAdaptive on AdamW: 1 layer, 2 parameter tensors, 7,850 numbers
        <BLANKLINE>
        layer      tensors     numbers          lr       decay
        0                2       7,850       0.001        0.01
        <BLANKLINE>
        acts on   'lr': the layer's rate in this step is f lr
        because   AdamW divides out what multiplies the gradient, and is exact in its rate
        costs     one reading of the gradients, a parameter group for each factor
        measured  a step takes ... times as long: ... ms, bare ... ms (medians of ... pairs on copies, random gradients)
        problems  none found
        note      decoupled weight decay is multiplied by the rate, so the factor scales it too
        next      adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    """
    check_seconds(seconds)
    rule = LayerAdaptive() if rule is None else rule
    inner = unwrap(optimizer)
    model = as_module(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DOUBTS, UserWarning)  # printed below
            arguments["layers"] = as_specification(arguments.get("layers", "auto"))
            adapter = LayerwiseLR(inner, rule, model, **arguments)
    except (TypeError, ValueError) as error:
        text = f"{type(rule).__name__} on {type(inner).__name__}: cannot be attached\n\nproblem   {error}"
    else:
        adapter.detach()
        cost = measured_cost(inner, model, rule, seconds, **arguments)
        automatic, specification = arguments.get("apply", "auto") == "auto", arguments.get("layers", "auto")
        text = _describe(adapter, inner, model, rule, most, cost, automatic=automatic, specification=specification)
    print(text)
    return text


def _describe(
    adapter: LayerwiseLR,
    optimizer: Optimizer,
    model: nn.Module | None,
    rule: Rule,
    most: int,
    cost: Cost | Failure | str,
    *,
    automatic: bool,
    specification: Any,
) -> str:
    name = type(optimizer).__name__
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    layers = adapter.layer_table()
    tensors = [p for layer in layers for p in layer.parameters]
    listed = layers if len(layers) <= most else sorted(layers, key=_frozen)[:most]
    width = max(9, *(len(layer.name) for layer in listed))
    lines = [
        f"{type(rule).__name__} on {name}: {_count(len(layers), 'layer')}, {_count(len(tensors), 'parameter tensor')}, "
        f"{sum(p.numel() for layer in layers for p in layer.whole()):,} numbers",
        "",
        f"{'layer':<{width}} {'tensors':>8} {'numbers':>11} {'lr':>11} {'decay':>11}",
    ]
    for layer in listed:
        groups = [group_of[id(p)] for p in layer.parameters]
        lines.append(
            f"{layer.name or '(root)':<{width}} {len(groups):>8} "
            f"{sum(p.numel() for p in layer.whole()):>11,} {_values(groups, 'lr'):>11} "
            f"{_values(groups, 'weight_decay'):>11}{'  frozen' if _frozen(layer) else ''}"
        )
    if len(layers) > most:
        lines.append(f"… and {len(layers) - most} more (most={len(layers)} lists all)")
    if table := rule.table(layers):
        lines += ["", *table]
    inside = {id(p) for p in tensors}
    outside = [p for p in _weights_of(optimizer) if id(p) not in inside]
    problems = _problems(adapter, optimizer, model, len(outside))
    # Without their tables, which stand above.
    doubts = flattened(layers, chosen(specification, rule.default_layers, "module")) + rule.doubts(layers)
    problems += [doubt.partition("\n")[0] for doubt in doubts]
    problems += [cost.error] if isinstance(cost, Failure) else []
    lines += ["", f"acts on   {adapter.apply!r}: {_where(adapter, optimizer)}"]
    lines += [f"because   {_why(adapter, optimizer, automatic)}", f"costs     {_cost(adapter, optimizer)}"]
    lines.append(f"measured  {'' if isinstance(cost, Cost) else 'not: '}{cost}")
    lines += [f"problem   {problem}" for problem in problems] or ["problems  none found"]
    lines += [f"note      {note}" for note in _notes(adapter, optimizer)]
    if chosen(specification, rule.default_layers, "module") == "module":
        lines += [f"note      {note}" for note in _divided(layers)]
    if isinstance(cost, Failure):
        lines.append("next      what the problem names; attached as it is, the first step would fail")
    elif OptimizerHooks.members_of(acting_optimizer(optimizer)):
        lines.append("next      nothing: an adapter is attached already; another one's factors would multiply with its")
    else:
        lines.append("next      adapter = layerwise.LayerwiseLR(optimizer, rule, model)")
    return "\n".join(lines)


def _where(adapter: LayerwiseLR, optimizer: Optimizer) -> str:
    if adapter.apply == "gradient":
        return f"the gradient becomes {'f (g + λw)' if adapter.decay == 'scaled' else 'f g'} before any momentum"
    if adapter.apply == "lr":
        limit = ", inside its min(lr, 1/√t)" if isinstance(optimizer, Adafactor) else ""
        return f"the layer's rate in this step is f lr{limit}"
    return "w ← w_old + f (w_new − w_old)"


def _why(adapter: LayerwiseLR, optimizer: Optimizer, automatic: bool) -> str:
    name = type(optimizer).__name__
    if not automatic:
        return "it was asked for"
    if adapter.apply == "update":
        return f"{name} {why_not_rate(optimizer) or reason_against(optimizer, 'groups')}"
    if adapter.apply == "gradient":
        return "the rule's method multiplies the gradient, inside the momentum"
    verdict = verdict_of(optimizer)
    if verdict is not None and verdict.untried is None:
        return f"{name} follows the rates of its parameter groups in a trial on toy parameters"
    if adapter.rule.default_place != "gradient":
        return "the rule scales rates"
    if isinstance(optimizer, SCALE_INVARIANT):
        return f"{name} divides out what multiplies the gradient, and is exact in its rate"
    return f"for {name} as it is set, the same as multiplying the gradient, for less"


def _cost(adapter: LayerwiseLR, optimizer: Optimizer) -> str:
    needs = adapter.rule.needs
    costs = ["one reading of the gradients"] if "gradient_norm" in needs else []
    if "gradients" in needs:
        costs.append("in epochs of analysis one number a parameter for G, two for G′, or those of the sample")
    if adapter.apply == "gradient":
        costs.append("scaling the gradients, unless SGD's dampening can carry the factor")
    elif writes_are_scaled(optimizer) and not (adapter.apply == "lr" and isinstance(optimizer, Adafactor)):
        costs.append("a look at each call of the step, whatever the number of layers")
    elif adapter.apply == "lr":
        costs.append("a parameter group for each factor")
    else:
        costs.append("a copy of the parameters during the step")
    return ", ".join(costs)


def _problems(adapter: LayerwiseLR, optimizer: Optimizer, model: nn.Module | None, outside: int) -> list[str]:
    problems = [no_effect(optimizer, adapter.apply)]
    if outside:
        problems.append(f"{_count(outside, 'parameter tensor')} of the optimizer in no layer; the factor there is 1")
    if model is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in held]
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            problems.append(f"{_count(len(missing), 'trainable parameter')} not in the optimizer: {names}")
    return [problem for problem in problems if problem]


def _notes(adapter: LayerwiseLR, optimizer: Optimizer) -> list[str]:
    notes: list[str] = []
    if adapter.counts_epochs:
        notes.append("the rule counts epochs: call adapter.end_epoch() after each")
    integers = [p for group in optimizer.param_groups for p in group["params"] if not holds_weights(p)]
    if integers:
        notes.append(f"{_count(len(integers), 'parameter tensor')} of integers (quantised weights) in no layer")
    device = next(p for group in optimizer.param_groups for p in group["params"]).device.type
    if device != "cpu" and not is_capturing(optimizer):
        notes.append("factors are read from the device once a step; capturable=True avoids it, at a launch a tensor")
    if adapter.apply != "gradient" and any(
        group.get("weight_decay") and decay_is_coupled(optimizer, group) is False for group in optimizer.param_groups
    ):
        notes.append("decoupled weight decay is multiplied by the rate, so the factor scales it too")
    return notes


def _divided(layers: list[Layer]) -> list[str]:
    """Say which modules own parameters beside modules below them, and how they become one layer each."""
    modules = divided(layers)
    if not modules:
        return []
    notes = [str(one) for one in modules[:5]]
    if len(modules) > 5:
        notes.append(f"… and {len(modules) - 5} more such modules")
    # To join the root would join the whole network.
    inner = [one for one in modules if one.layer.name] or modules
    verb = "joins" if len(inner) == 1 else "join"
    return [*notes, f"layers={joining(layers, inner)} {verb} them"]


def _weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if holds_weights(p)]


def _frozen(layer: Layer) -> bool:
    return not any(p.requires_grad for p in layer.parameters)


def _values(groups: list[dict[str, Any]], key: str) -> str:
    values = list(dict.fromkeys(f"{float(group[key]):.4g}" for group in groups if group.get(key) is not None))
    return "/".join(values) if values else "-"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
