"""What is known of each optimizer: of PyTorch and, by name, of other packages."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from textwrap import shorten
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

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


def _of(names: str, package: str = "pytorch_optimizer") -> frozenset[str]:
    return frozenset(f"{package}.{name}" for name in names.split())


SCHEDULE_FREE = _of("ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD") | _of(
    "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree SGDScheduleFree "
    "SGDScheduleFreeReference",
    "schedulefree",
)
DISTANCE = _of("DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD Prodigy")

FACTS: tuple[Fact, ...] = (
    Fact(
        "anywhere",
        "updates each parameter while the backward pass runs and takes no step() to which a factor could be attached; "
        "use another optimizer",
        _of("LOMO AdaLOMO"),
    ),
    Fact(
        "anywhere",
        "moves the weights before it evaluates its closure, so the gradients of which a factor is computed would be "
        "those of other weights; use the class without 'Closure' in its name",
        _of("AdamWScheduleFreeClosure RAdamScheduleFreeClosure SGDScheduleFreeClosure", "schedulefree"),
    ),
    Fact(
        "anywhere",
        "evaluates its closure several times a step, at other weights each time, and combines the gradients itself; "
        "use a first-order optimizer, or SAM with an adapter on its base_optimizer",
        _of("BSAM"),
    ),
    Fact(
        "anywhere",
        "takes a part of its step itself, at the rate of its groups, after its base_optimizer has stepped, so a factor "
        "would reach the other part only; give the base optimizer permanent groups with rates of their own "
        "(layerwise.param_groups), or attach to the base_optimizer of SAM",
        _of("WSAM"),
    ),
    Fact(
        "anywhere",
        "trains wide copies of a few layers at a time, writes them over the weights, and sets one rate for all of "
        "them; use another optimizer",
        _of("BlockOptimizer", "badam"),
    ),
    Fact(
        "lr",
        "computes its rate from the number of the step and does not read group['lr'] (relative_step=True)",
        _of("AdaFactor"),
        only_with="relative_step",
    ),
    Fact("lr", "does not read group['lr'] while it warms up", _of("ApolloDQN"), only_with="warmup_steps"),
    Fact(
        "lr",
        "takes the rate of its first group for every parameter",
        DISTANCE | _of("DAdaptAdaGrad DAdaptAdan", "dadaptation"),
    ),
    Fact("lr", "sets the rates of its groups itself", _of("ASGD SWATS")),
    Fact(
        "groups",
        "keeps its estimate of the distance to the solution in its groups",
        DISTANCE - _of("DAdaptAdaGrad DAdaptAdam"),
    ),
    Fact(
        "groups",
        "keeps in each group the largest rate so far and the weights of its average, which follow from the rate",
        SCHEDULE_FREE,
    ),
    Fact("groups", "computes a rate from a statistic over all parameters of a group", _of("ASGD AvaGrad SWATS")),
    Fact("groups", "finds the rate it began with by a group's number", _of("AdaBound")),
    Fact("groups", "counts its steps in its first group only", _of("Kron")),
    Fact("groups", "pairs the parameters of a group by their positions", _of("LoRARite")),
    Fact("groups", "advances its averages of the loss once for every group", _of("EmoFact EmoLynx EmoNavi")),
    Fact(
        "update",
        "keeps iterates of its own beside the weights and computes the next weights from them, so that a scaled step "
        "would be undone, or drift away from them",
        SCHEDULE_FREE
        | _of("A2Grad AccSGD DAdaptAdaGrad DAdaptSGD FTRL MADGRAD Ranger Ranger21 SRMM")
        | _of("AccSGD", "torch_optimizer"),
    ),
    Fact(
        "update",
        "keeps iterates of its own beside the weights (use_shadow=True) and moves the weights towards them",
        _of("EmoFact EmoLynx EmoNavi"),
        only_with="use_shadow",
    ),
    Fact("update", "averages the weights for eval() inside its step, before a factor could change them", _of("SPlus")),
    Fact("update", "normalises the weights at each step, which a scaled step undoes", _of("Nero")),
)

SCALE_INVARIANT_NAMES = _of(
    "AdaBelief AdaBound AdaDelta AdaFactor AdaGC Adalite AdaMax AdamC AdamMini AdaMod AdamP AdamS AdaMuon AdamWSN "
    "Adan AdaNorm AdaPNM AdaShift AdaTAM AdEMAMix ADOPT Aida Amos Ano APOLLO BCOS CAME Conda DAdaptAdaGrad DAdaptAdam "
    "DAdaptLion DAdaptSGD DASH DistributedMuon EmoFact EmoLynx EmoNavi EXAdam FAdam Fira FlashAdamW FOCUS Fromage "
    "FTRL GaLore Grams GrokFastAdamW Lamb LaProp Lion LoRARite MARS Muon MuonClip Nero NorMuon NovoGrad Prodigy "
    "QHAdam RAdam Ranger21 ROSE SaRA ScheduleFreeAdamW ScheduleFreeRAdam SCION SCIONLight Shampoo SignSGD "
    "SimplifiedAdEMAMix SM3 SOAP SophiaH SPAM SpectralSphere SPlus StableAdamW StableSPAM SWATS Tiger Yogi"
) | _of("AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree", "schedulefree")
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
SCALE_INVARIANT = (*set(COUPLED).difference((optim.SGD, optim.ASGD)), optim.SparseAdam, optim.Rprop, *DECOUPLED)
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
    if reason is None:
        refuse_outer(optimizer)
        if steps_in_backward(optimizer):
            reason = IN_BACKWARD
        elif isinstance(optimizer, optim.LBFGS):
            reason = ALL_TOGETHER
    if reason is not None:
        raise ValueError(f"{type(optimizer).__name__} {reason}")


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


ALL_TOGETHER = (
    "evaluates its closure several times a step and takes one step for all parameters together, so there is no rate of "
    "a layer to scale; use a first-order optimizer"
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
    hooks_of: list[Any] = [getattr(p, "_post_accumulate_grad_hooks", None) or {} for p in parameters]
    return bool(optimizer.defaults.get("gradient_release")) or any(
        _refers_to(hook, optimizer, 3) for hooks in hooks_of for hook in hooks.values()
    )


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
    attributes: dict[str, Any] = {**vars(holder), **slots_of(holder)}
    found: dict[str, optim.Optimizer] = {}
    for name, value in attributes.items():
        if name not in ("state", "param_groups", "defaults") and not name.endswith("_hooks"):
            leaves, _ = tree_flatten_with_path(value)
            found |= {f".{name}{keystr(path)}": one for path, one in leaves if isinstance(one, optim.Optimizer)}
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

    Read off torch 2.13: the fused kernels, RAdam, Adagrad with foreach, and the capturable forms.
    """
    if group.get("fused") or isinstance(optimizer, optim.RAdam):
        return True
    foreach = group.get("foreach")
    if foreach is None:  # torch then takes foreach, for its own tensors only
        foreach = all(type(p) in (Tensor, nn.Parameter) for p in group["params"])
    if isinstance(optimizer, optim.Adagrad):
        return bool(foreach)
    always = isinstance(optimizer, optim.Adam | optim.AdamW | optim.NAdam | optim.Adamax)  # up to 2.6 AdamW is no Adam
    return bool(group.get("capturable")) and (
        always or (bool(foreach) and isinstance(optimizer, optim.RMSprop | optim.Adadelta))
    )


def has_capturable(optimizer: optim.Optimizer) -> bool:
    """Tell whether no value may be read in a step, because it is captured in a CUDA graph, or can be."""
    return any(group.get("capturable") for group in optimizer.param_groups)


def is_being_captured(device: torch.device) -> bool:
    """Tell whether a CUDA graph captures this step, whose replays run no Python."""
    return device.type == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def is_on_accelerator(optimizer: optim.Optimizer) -> bool:
    """Tell whether any parameter is on a device that is neither the CPU nor the meta device."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return any(p.device.type not in ("cpu", "meta") for p in parameters)


@lru_cache(maxsize=256)
def is_foreign(kind: type) -> bool:
    """Tell whether the step of a class is not that of a PyTorch optimizer."""
    own = [c for c in kind.__mro__ if c.__module__.startswith("torch.")]
    if not own or own[0] is optim.Optimizer:
        return True
    inner = {name for c in own for name, value in vars(c).items() if callable(value) and name[0] == "_" != name[1]}

    def without_hooks(owner: type, name: str) -> Any:
        return inspect.unwrap(getattr(owner, name, cast(Any, None)), stop=lambda f: not getattr(f, "hooked", False))

    parts = {*inner, "step", "param_groups", "state"}
    return any(without_hooks(kind, name) is not without_hooks(own[0], name) for name in parts)
