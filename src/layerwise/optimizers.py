"""What is known of each optimizer: of PyTorch and, by name, of other packages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from textwrap import shorten
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from ._tensors import slots_of

Where = Literal["anywhere", "lr", "update", "groups"]


@dataclass(frozen=True)
class Fact:
    """One reason for which a factor cannot act on some optimizers.

    Args:
        where: `"anywhere"`; `"lr"`, this step's rate; `"update"`, the finished step; `"groups"`, whatever divides a
            parameter group that holds more than one layer.
        reason: A phrase that follows the optimizer's name.
        names: The classes, as package and class name; what derives from them is meant too.
        only_with: An option of a group, or an attribute of the optimizer; if given, the reason holds only where it is
            set to something else than 0, False or None.
    """

    where: Where
    reason: str
    names: frozenset[str]
    only_with: str | None = None


def _of(package: str, names: str) -> frozenset[str]:
    return frozenset(f"{package}.{name}" for name in names.split())


SCHEDULE_FREE = _of("pytorch_optimizer", "ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD") | _of(
    "schedulefree",
    "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree SGDScheduleFree "
    "SGDScheduleFreeReference",
)
DISTANCE = _of("pytorch_optimizer", "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD Prodigy")

FACTS: tuple[Fact, ...] = (
    Fact(
        "anywhere",
        "updates each parameter while the backward pass runs and takes no step() to which a factor could be attached; "
        "use another optimizer",
        _of("pytorch_optimizer", "LOMO AdaLOMO"),
    ),
    Fact(
        "anywhere",
        "moves the weights before it evaluates its closure, so the gradients of which a factor is computed would be "
        "those of other weights; use the class without 'Closure' in its name",
        _of("schedulefree", "AdamWScheduleFreeClosure RAdamScheduleFreeClosure SGDScheduleFreeClosure"),
    ),
    Fact(
        "anywhere",
        "evaluates its closure several times a step, at other weights each time, and combines the gradients itself; "
        "use a first-order optimizer, or SAM with an adapter on its base_optimizer",
        _of("pytorch_optimizer", "BSAM"),
    ),
    Fact(
        "anywhere",
        "takes a part of its step itself, at the rate of its groups, after its base_optimizer has stepped, so a factor "
        "would reach the other part only; give the base optimizer permanent groups with rates of their own "
        "(layerwise.param_groups), or attach to the base_optimizer of SAM",
        _of("pytorch_optimizer", "WSAM"),
    ),
    Fact(
        "anywhere",
        "trains wide copies of a few layers at a time, writes them over the weights, and sets one rate for all of "
        "them; use another optimizer",
        _of("badam", "BlockOptimizer"),
    ),
    Fact(
        "lr",
        "computes its rate from the number of the step and does not read group['lr'] (relative_step=True)",
        _of("pytorch_optimizer", "AdaFactor"),
        only_with="relative_step",
    ),
    Fact(
        "lr",
        "does not read group['lr'] while it warms up",
        _of("pytorch_optimizer", "ApolloDQN"),
        only_with="warmup_steps",
    ),
    Fact(
        "lr",
        "takes the rate of its first group for every parameter",
        DISTANCE | _of("dadaptation", "DAdaptAdaGrad DAdaptAdan"),
    ),
    Fact("lr", "sets the rates of its groups itself", _of("pytorch_optimizer", "ASGD SWATS")),
    Fact(
        "groups",
        "keeps its estimate of the distance to the solution in its groups",
        DISTANCE - _of("pytorch_optimizer", "DAdaptAdaGrad DAdaptAdam"),
    ),
    Fact(
        "groups",
        "keeps in each group the largest rate so far and the weights of its average, which follow from the rate",
        SCHEDULE_FREE,
    ),
    Fact(
        "groups",
        "computes a rate from a statistic over all parameters of a group",
        _of("pytorch_optimizer", "ASGD AvaGrad SWATS"),
    ),
    Fact("groups", "finds the rate it began with by a group's number", _of("pytorch_optimizer", "AdaBound")),
    Fact("groups", "counts its steps in its first group only", _of("pytorch_optimizer", "Kron")),
    Fact("groups", "pairs the parameters of a group by their positions", _of("pytorch_optimizer", "LoRARite")),
    Fact(
        "groups",
        "advances its averages of the loss once for every group",
        _of("pytorch_optimizer", "EmoFact EmoLynx EmoNavi"),
    ),
    Fact(
        "update",
        "keeps iterates of its own beside the weights and computes the next weights from them, so that a scaled step "
        "would be undone, or drift away from them",
        SCHEDULE_FREE
        | _of("pytorch_optimizer", "A2Grad AccSGD DAdaptAdaGrad DAdaptSGD FTRL MADGRAD Ranger Ranger21 SRMM")
        | _of("torch_optimizer", "AccSGD"),
    ),
    Fact(
        "update",
        "keeps iterates of its own beside the weights (use_shadow=True) and moves the weights towards them",
        _of("pytorch_optimizer", "EmoFact EmoLynx EmoNavi"),
        only_with="use_shadow",
    ),
    Fact(
        "update",
        "averages the weights for eval() inside its step, before a factor could change them",
        _of("pytorch_optimizer", "SPlus"),
    ),
    Fact("update", "normalises the weights at each step, which a scaled step undoes", _of("pytorch_optimizer", "Nero")),
)

SCALE_INVARIANT_NAMES = _of(
    "pytorch_optimizer",
    "AdaBelief AdaBound AdaDelta AdaFactor AdaGC Adalite AdaMax AdamC AdamMini AdaMod AdamP AdamS AdaMuon AdamWSN "
    "Adan AdaNorm AdaPNM AdaShift AdaTAM AdEMAMix ADOPT Aida Amos Ano APOLLO BCOS CAME Conda DAdaptAdaGrad DAdaptAdam "
    "DAdaptLion DAdaptSGD DASH DistributedMuon EmoFact EmoLynx EmoNavi EXAdam FAdam Fira FlashAdamW FOCUS Fromage "
    "FTRL GaLore Grams GrokFastAdamW Lamb LaProp Lion LoRARite MARS Muon MuonClip Nero NorMuon NovoGrad Prodigy "
    "QHAdam RAdam Ranger21 ROSE SaRA ScheduleFreeAdamW ScheduleFreeRAdam SCION SCIONLight Shampoo SignSGD "
    "SimplifiedAdEMAMix SM3 SOAP SophiaH SPAM SpectralSphere SPlus StableAdamW StableSPAM SWATS Tiger Yogi",
) | _of("schedulefree", "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree")
"""Those that divide by the size of the gradients they have seen, so that multiplying the gradient changes next to
nothing: with all gradients doubled, less than a twentieth of the way that the weights go."""


def known_reason(optimizer: Optimizer, where: Where) -> str | None:
    """Return why a factor cannot act there, as a phrase that follows the optimizer's name; None if nothing is known.

    Example:
        >>> import torch
        >>> known_reason(torch.optim.SGD([torch.zeros(1)], lr=0.1), "lr")
    """
    for fact in _facts(type(optimizer)):
        if fact.where == where and (fact.only_with is None or _is_set(optimizer, fact.only_with)):
            return fact.reason
    return None


def known_to_divide(optimizer: Optimizer) -> bool:
    """Tell whether this is an optimizer of another package for which a gradient's scale means next to nothing."""
    return not SCALE_INVARIANT_NAMES.isdisjoint(_names(type(optimizer)))


@lru_cache(maxsize=64)
def _facts(optimizer: type) -> tuple[Fact, ...]:
    names = _names(optimizer)
    return tuple(fact for fact in FACTS if not fact.names.isdisjoint(names))


def _names(optimizer: type) -> Iterable[str]:
    return [f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in optimizer.__mro__]


def _is_set(optimizer: Optimizer, option: str) -> bool:
    return bool(getattr(optimizer, option, None)) or any(group.get(option) for group in optimizer.param_groups)


# --- PyTorch's own ---------------------------------------------------------------------------------------------------

PlaceName = Literal["gradient", "lr", "update"]
PLACES: tuple[PlaceName, ...] = ("gradient", "lr", "update")
COUPLED = (
    *(optim.SGD, optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam),
    optim.ASGD,
)
DECOUPLED = (optim.AdamW, optim.Adafactor, *([optim.Muon] if hasattr(optim, "Muon") else []))
SCALE_INVARIANT = (
    *(optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.SparseAdam, optim.Rprop, *DECOUPLED),
)
LATE_RATE = (optim.ASGD, optim.Rprop)
_momentum = itemgetter("momentum")


def unwrap(optimizer: Any) -> optim.Optimizer:
    """Return the `torch.optim.Optimizer` inside the wrappers of Accelerate, Fabric and others.

    Args:
        optimizer: An optimizer, or an object that holds one as `.optimizer`.

    Raises:
        TypeError: There is none.
    """
    inner, seen = optimizer, 0
    while isinstance(getattr(inner, "optimizer", None), optim.Optimizer) and seen < 10:
        inner, seen = inner.optimizer, seen + 1
    if not isinstance(inner, optim.Optimizer):
        attributes = getattr(inner, "__dict__", {}).items()
        held = next((f"the one that it holds, .{k}" for k, v in attributes if isinstance(v, optim.Optimizer)), None)
        raise TypeError(
            f"optimizer={shorten(repr(optimizer), 60)} ({type(optimizer).__name__}) is no torch.optim.Optimizer; pass "
            f"{held or 'the optimizer that your loop calls step() on'}"
        )
    return inner


def acting_optimizer(optimizer: optim.Optimizer) -> optim.Optimizer:
    """Return the optimizer whose step changes this process's parameters: ZeRO's inner one, else the same.

    Raises:
        ValueError: ZeRO steps during the backward pass.
    """
    if not any(parent.__name__ == "ZeroRedundancyOptimizer" for parent in type(optimizer).__mro__):
        return optimizer
    zero: Any = optimizer
    if zero._overlap_with_ddp:
        raise ValueError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside DDP's backward pass, a bucket at a time and "
            "without an optimizer's hooks; build it with overlap_with_ddp=False"
        )
    return zero.optim


def refuse(optimizer: optim.Optimizer) -> None:
    """Raise for optimizers to which no per-layer factor can be attached.

    Raises:
        ValueError: LBFGS; an optimizer that steps another one's groups; one known to take its step in a way that
            no factor can follow.
    """
    reason = known_reason(optimizer, "anywhere")
    if reason is not None:
        raise ValueError(f"{type(optimizer).__name__} {reason}")
    refuse_outer(optimizer)
    if steps_in_backward(optimizer):
        raise ValueError(f"{type(optimizer).__name__} {IN_BACKWARD}")
    if isinstance(optimizer, optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure several times a step and takes one step for all parameters together, so there "
            "is no rate of a layer to scale; use a first-order optimizer"
        )


def refuse_outer(optimizer: optim.Optimizer) -> None:
    """Raise for an optimizer around another one, whose hooks and groups are not those of the step.

    Raises:
        ValueError: It is one; the message names the inner one.
    """
    if acting_optimizer(optimizer) is not optimizer:
        raise ValueError(
            "ZeroRedundancyOptimizer steps a share of the parameters in each process and then hands them around, so "
            "no process sees a whole step; watch one without it"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {
        path: inner
        for path, inner in inner_optimizers(optimizer).items()
        if any(id(p) in held for g in inner.param_groups for p in g["params"])
    }
    if found:
        each = " (an adapter for each)" if len(found) > 1 else ""
        listed = ", ".join(f"optimizer{path}" for path in list(found)[:4]) + (", …" if len(found) > 4 else "")
        raise ValueError(
            f"{type(optimizer).__name__} wraps {'other optimizers' if each else 'another optimizer'}, whose own groups "
            f"take the step, so nothing attached here would act or see it: attach to {listed}{each}"
        )


IN_BACKWARD = (
    "takes its step inside backward(), a parameter at a time, when the other gradients do not exist yet: build it so "
    "that it steps after backward() (with optimi gradient_release=False, and remove_gradient_release(model)), or use "
    "layerwise.step_in_backward with torch.optim's SGD, Adagrad, Adam or AdamW"
)


def steps_in_backward(optimizer: optim.Optimizer) -> bool:
    """Tell whether hooks on several parameters step the optimizer as soon as a gradient has been accumulated."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) < 2:
        return False
    if optimizer.defaults.get("gradient_release"):
        return True
    held: list[dict[int, Any]] = [getattr(p, "_post_accumulate_grad_hooks", None) or {} for p in parameters]
    hooks = [hook for one in held for hook in one.values()]
    return any(_refers_to(hook, optimizer, 3) for hook in hooks)


def check_backward_is_over(optimizer: optim.Optimizer) -> None:
    """Raise in a step that is taken while backward runs and gradients are missing.

    Raises:
        RuntimeError: It is; nothing has changed.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    missing = any(p.requires_grad and p.grad is None for p in parameters)
    if len(parameters) > 1 and (missing or is_foreign(type(optimizer))):
        raise RuntimeError(f"{type(optimizer).__name__} {IN_BACKWARD}")


def _refers_to(function: Any, optimizer: optim.Optimizer, depth: int) -> bool:
    """Tell whether a function holds the optimizer, in its closure or as an argument that was bound to it."""
    held: list[Any] = [getattr(function, "__self__", None)]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    if isinstance(function, partial):
        held += [function.func, *function.args, *function.keywords.values()]
    return any(one is optimizer for one in held) or (
        depth > 0 and any(_refers_to(one, optimizer, depth - 1) for one in held if callable(one))
    )


def inner_optimizers(holder: Any) -> dict[str, optim.Optimizer]:
    """Return the optimizers that an object holds, in lists, tuples and dictionaries too, by how they are reached."""
    found: dict[str, optim.Optimizer] = {}

    def look(path: str, value: Any, depth: int) -> None:
        if isinstance(value, optim.Optimizer):
            found[path] = value
        elif depth and isinstance(value, dict):
            for key, one in cast("dict[Any, Any]", value).items():
                look(f"{path}[{key!r}]", one, depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for number, one in enumerate(cast("Sequence[Any]", value)):
                look(f"{path}[{number}]", one, depth - 1)

    attributes: dict[str, Any] = {**vars(holder), **slots_of(holder)}
    for name, value in attributes.items():
        if name not in ("state", "param_groups", "defaults") and not name.endswith("_hooks"):
            look(f".{name}", value, 2)
    return found


def decay_is_coupled(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> bool | None:
    """Tell whether weight decay is added to the gradient (True), taken off the weight (False), or unknown (None)."""
    if group.get("decoupled_weight_decay") or isinstance(optimizer, DECOUPLED):
        return False
    return True if isinstance(optimizer, COUPLED) else None


def has_decay(optimizer: optim.Optimizer) -> bool:
    """Tell whether any parameter group has weight decay."""
    return any(group.get("weight_decay") for group in optimizer.param_groups)


def takes_tensor_rate(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Tell whether `step` takes a 0-dim rate on the parameters' device without waiting for its value.

    Read off torch 2.13: the fused kernels, RAdam, Adagrad for each, and the capturable forms.
    """
    if group.get("fused") or isinstance(optimizer, optim.RAdam):
        return True
    for_each = group.get("foreach")
    if for_each is None:  # torch then takes the form for each, for its own tensors only
        for_each = all(type(p) in (Tensor, nn.Parameter) for p in group["params"])
    if isinstance(optimizer, optim.Adagrad):
        return bool(for_each)
    if not group.get("capturable"):
        return False
    if isinstance(optimizer, optim.RMSprop | optim.Adadelta):
        return bool(for_each)
    return isinstance(optimizer, optim.Adam | optim.AdamW | optim.NAdam | optim.Adamax)  # up to 2.6 AdamW is no Adam


def is_capturing(optimizer: optim.Optimizer) -> bool:
    """Tell whether no value may be read in a step, because it is captured in a CUDA graph, or can be."""
    return any(group.get("capturable") for group in optimizer.param_groups)


def is_on_accelerator(optimizer: optim.Optimizer) -> bool:
    """Tell whether any parameter is on a device that is neither the CPU nor the meta device."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return any(p.device.type not in ("cpu", "meta") for p in parameters)


def damps_history(optimizer: optim.Optimizer) -> bool:
    """Tell whether this is torch's SGD with momentum, not Nesterov's and without dampening, in every group.

    Its history is `v ← μv + (1 − dampening)(g + λw)`, so a factor inside the momentum can act through the dampening and
    leave the gradient alone.
    """
    if type(optimizer).step is not optim.SGD.step:
        return False
    for group in optimizer.param_groups:
        if not group["momentum"] or group["nesterov"] or group["dampening"] or group["differentiable"]:
            return False
    return True


@lru_cache(maxsize=256)
def is_foreign(kind: type) -> bool:
    """Tell whether the step of a class is not that of a PyTorch optimizer."""
    own = [c for c in kind.__mro__ if c.__module__.startswith("torch.")]
    if not own or own[0] is optim.Optimizer:
        return True
    inner = {name for c in own for name, value in vars(c).items() if callable(value) and name[0] == "_" != name[1]}
    parts = {*inner, "step", "param_groups", "state"}
    return any(_unwrapped(getattr(kind, name, None)) is not _unwrapped(getattr(own[0], name, None)) for name in parts)


def _unwrapped(function: Any) -> Any:
    while getattr(function, "hooked", False) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
