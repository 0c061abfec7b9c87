"""What is known of optimizers of other packages: where a factor cannot act on them, and why.

Classes are named by strings, so that their packages are not imported. Each reason was found by reading and trying, on
the versions that `docs/optimizers.md` names, and `test_other_optimizers.py` and `test_packages.py` in `tests/core/` try
all of them again: a reason that is missing or unfounded fails there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch.optim import Optimizer

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

SCALE_INVARIANT = _of(
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


def reason_against(optimizer: Optimizer, where: Where) -> str | None:
    """Return why a factor cannot act there, as a phrase that follows the optimizer's name; None if nothing is known.

    Example:
        >>> import torch
        >>> reason_against(torch.optim.SGD([torch.zeros(1)], lr=0.1), "lr")
    """
    for fact in _facts(type(optimizer)):
        if fact.where == where and (fact.only_with is None or _is_set(optimizer, fact.only_with)):
            return fact.reason
    return None


def divides_by_gradients(optimizer: Optimizer) -> bool:
    """Tell whether this is an optimizer of another package for which a gradient's scale means next to nothing."""
    return not SCALE_INVARIANT.isdisjoint(_names(type(optimizer)))


@lru_cache(maxsize=64)
def _facts(optimizer: type) -> tuple[Fact, ...]:
    names = _names(optimizer)
    return tuple(fact for fact in FACTS if not fact.names.isdisjoint(names))


def _names(optimizer: type) -> Iterable[str]:
    return [f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in optimizer.__mro__]


def _is_set(optimizer: Optimizer, option: str) -> bool:
    return bool(getattr(optimizer, option, None)) or any(group.get(option) for group in optimizer.param_groups)
