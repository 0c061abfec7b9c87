"""The methods and controls that can be arms of a comparison on a user's own task, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from layerwise import rules
from layerwise.lab.errors import UsageError, nearest
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.plan import Arm, Control
from layerwise.rules.by_name import hyphenated

PLAIN = "plain"
DEFAULT_ARMS = (PLAIN, "layer-adaptive", "mean-factor", "shuffled", "frozen")
LEAST_EPOCHS = 3  # of a run with gradient amplification: a plain epoch, one of analysis, one that is amplified
# On z, and the share of layers at random: of normal z, 16 % are above 1. Basodi et al. 2023 try 0.7 to 3.
THRESHOLD, RATIO = 1.0, 0.16
UNMEASURED = ("amplification-random", "amplification-all")  # controls of the amplifications that measure


@dataclass(frozen=True, kw_only=True)
class Method:
    """A rule that can be an arm on a user's own task, with arguments that were not tuned for it."""

    words: str
    rule: Mapping[str, Any]  # its name and arguments, without the phases of an amplification
    against: tuple[str, ...] = ()  # methods that are its controls where they are arms too
    note: str = ""  # what the page says of it where nothing was tuned


def _amplification(what: str, name: str, *against: str, **arguments: Any) -> Method:
    rule = {"name": "GradientAmplification", "selection": {"name": name, **arguments}}
    return Method(words=f"amplification {what}", rule=rule, against=against)


def _scale(name: str, coefficient: str) -> str:
    return (
        f"{name} multiplies the rate by a trust coefficient of {coefficient}, so it wants another base rate than the "
        "plain optimizer: without --tune this comparison is unfair to it."
    )


METHODS: dict[str, Method] = {
    "layer-adaptive": Method(words="layer-adaptive", rule={"name": "LayerAdaptive"}),
    "lars": Method(words="LARS", rule={"name": "LARS"}, note=_scale("LARS", "0.001")),
    "larc": Method(words="LARC", rule={"name": "LARC"}, note=_scale("LARC", "0.02")),
    "layer-decay": Method(words="layer-wise decay of 0.8", rule={"name": "LayerDecay", "decay": 0.8}),
    "amplification-G": _amplification("by G", "Directionality", *UNMEASURED, measure="G", threshold=THRESHOLD),
    "amplification-G-prime": _amplification(
        "by G′", "Directionality", *UNMEASURED, measure="G_prime", threshold=THRESHOLD
    ),
    "amplification-random": _amplification("of random layers", "RandomLayers", ratio=RATIO, after_analysis=True),
    "amplification-all": _amplification("of all layers", "AllLayers"),
    "by-role": Method(words="blockwise rates by role", rule={"name": "ByRole", "ratios": "blockwise"}),
}

OWN_SIZE = ("InitialSNR", "LDoG", "LayerMoment", "NormalizedGradient", "Trust", "WeightScaled")
"""Rules whose factors set the size of a step."""


def _other_rules() -> Iterator[tuple[str, Method]]:
    """Give the rules that can be made without an argument, in the names of their pages."""
    listed = {method.rule["name"] for method in METHODS.values()}
    for name, kind in rule_making.public(rules.Rule).items():
        if name not in listed:
            with suppress(TypeError, ValueError):
                kind()
                note = f"{name} sets the size of a step, so it wants another rate: without --tune this is unfair to it."
                method = Method(words=name, rule={"name": name}, note=note if name in OWN_SIZE else "")
                yield hyphenated(name), method


METHODS.update(dict(_other_rules()))

SEARCHES = {
    "role-search": Method(
        words="multipliers of roles by random search", rule={"name": "ByRole", "ratios": {"other": 1.0}}
    )
}
"""Methods that only a tuning makes: each trial draws multipliers for the roles of the network."""

CONTROLS: dict[str, tuple[Control, str]] = {
    "mean-factor": ("mean factor", "plain at the mean factor"),
    "weighted-mean": ("weighted mean factor", "plain at the mean factor over weights"),
    "shuffled": ("shuffled layers", "factors of other layers"),
    "shuffled-in-shape": ("shuffled within shapes", "factors of other layers of the same shape"),
    "frozen": ("frozen factors", "mean factor of each layer"),
    "frozen-at-start": ("first factors", "factor of each layer at the first update"),
    "reversed": ("reversed factors", "mean factors in reverse order"),
    "type-only": ("mean factor of each role", "mean factor of each role"),
    "shape-only": ("first factor of each shape", "first factors by shape"),
}


def make_arms(names: Sequence[str] = ()) -> list[Arm]:
    """Give the arms of names: the plain one, and each method with its controls after it.

    The control "shuffled" is one of every method, "shuffled:lars" of LARS. The plain arm and each method's mean factor
    are there in any case. The rules of amplifications are without their phases.
    """
    names = list(dict.fromkeys(names or DEFAULT_ARMS))
    asked: dict[str, list[str]] = {}
    for name in names:
        control, _, method = name.partition(":")
        if name in METHODS or name in SEARCHES:
            asked.setdefault(name, [])
        elif control in CONTROLS and (method in METHODS or method in SEARCHES):
            asked.setdefault(method, []).append(control)
        elif name != PLAIN and name not in CONTROLS:
            own = [f"{word}:{one}" for word in CONTROLS for one in METHODS] if ":" in name else []
            raise UsageError(
                f"arm {name!r} is not known: use {PLAIN}, {', '.join([*METHODS, *SEARCHES])}, and the controls "
                f"{', '.join(CONTROLS)}, of one method as shuffled:lars."
                f"{nearest(name, own or [PLAIN, *METHODS, *CONTROLS])}"
            )
    if not asked:
        raise UsageError(f"arms={' '.join(names)!r} hold no method to compare: add one of {', '.join(METHODS)}")
    arms = [Arm(name=PLAIN, words="plain")]
    for name, own in asked.items():
        method = METHODS.get(name) or SEARCHES[name]
        controls = [word for word in CONTROLS if word == "mean-factor" or word in own or word in names]
        titles = {word: word if len(asked) == 1 else f"{word}:{name}" for word in controls}
        others = tuple(other for other in method.against if other in asked)
        against = (PLAIN, *titles.values(), *others)
        search = {"roles": ()} if name in SEARCHES else None
        arms.append(Arm(name=name, words=method.words, rule=method.rule, against=against, search=search))
        for word, title in titles.items():
            control, words = CONTROLS[word]
            words = words if len(asked) == 1 else f"{words} ({method.words})"
            arms.append(Arm(name=title, words=words, control=control, of=name))
    return arms


def task_phases(epochs: int | None) -> list[list[Any]]:
    """Give rows of last epoch, whether it amplifies, and factor: plain for a third, amplified up to 13/15, plain.

    The shares are those of the paper's phases for its simple networks, 50 and 130 of 150 epochs, without the second
    analysis, which goes with the paper's one change of the rate. Basodi et al. 2023, section 4.
    """
    if epochs is None or epochs < LEAST_EPOCHS:
        given = "iterations" if epochs is None else f"epochs={epochs!r}"
        raise UsageError(f"{given}: amplification counts epochs; let the task return epochs of at least {LEAST_EPOCHS}")
    first = max(1, round(epochs / 3))
    last = max(first + 2, round(epochs * 13 / 15))
    rows: list[list[Any]] = [[first, False, 1.0], [last, True, 2.0]]
    return rows if last == epochs else [*rows, [epochs, False, 1.0]]
