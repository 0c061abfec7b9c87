"""Where a run that was found belongs: its subject, its arm, and what that arm is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.lab.experiments.plan import FACTORS_ALONE, Control
from layerwise.lab.runs.records import Record

CORE = (
    "model",
    "width",
    "data",
    "data_digest",
    "train_count",
    "test_count",
    "iterations",
    "epochs",
    "task",
    "function",
)
"""Constants that make another subject; the others are of the arm where the subject has the same name."""


@dataclass(frozen=True)
class Placed:
    """A run and where it belongs.

    Attributes:
        record: of the run.
        subject: key of the subject.
        rule: key of the rule, the same for all seeds of an arm.
        control: what it repeats, or None.
        rest: constants that are not the subject's.
    """

    record: Record
    subject: str
    rule: str
    control: Control | None
    rest: Mapping[str, Any]


_written = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def key_of(value: Any) -> str:
    """Write a value so that equal ones are equal words."""
    return _written(value)


def label_of(record: Record, name: str) -> str:
    """Give the name that the experiment gave to a run's subject or arm, or ""."""
    labels = record.about.get("labels")
    return str(labels.get(name, "")) if isinstance(labels, Mapping) else ""


def place(records: Iterable[Record]) -> list[Placed]:
    """Find out where runs belong; runs of the same constants share what holds the rest of them."""
    found, known = [], dict[str, tuple[str, Mapping[str, Any]]]()
    for record in records:
        configuration = record.configuration
        label = label_of(record, "subject")
        text = key_of([label, configuration.trial])
        if text not in known:
            core = {name: configuration.trial.get(name) for name in CORE}
            rest = {name: value for name, value in configuration.trial.items() if name not in CORE}
            known[text] = key_of([label, core]), rest
        subject, rest = known[text]
        control = _control(record)
        # The factors of a control are another in every seed: what it repeats is the same.
        rule: Any = control or [configuration.rule, configuration.apply, configuration.decay]
        found.append(Placed(record, subject, key_of(rule), control, rest))
    return found


def _control(record: Record) -> Control | None:
    """Say what a run repeats of another one."""
    rule = record.configuration.rule
    if record.configuration.source is None or rule is None:
        return None
    if rule.get("name") == "Replay":
        return "shuffled layers"
    return "mean factor" if set(rule.get("factors", ())) == {"*"} else "frozen factors"


PLAIN = key_of([None, "auto", "auto"])
"""Key of the rule of plain training."""


def told_of(each: Placed, varying: Mapping[str, list[str]]) -> dict[str, Any]:
    """Give the constants of a run that differ within its subject."""
    return {name: each.rest.get(name) for name in varying[each.subject]}


def arm_key(each: Placed, varying: Mapping[str, list[str]], by_identity: Mapping[str, Placed]) -> str:
    """Give what the runs of an arm have in common: rule, constants that differ within the subject, what is repeated."""
    source = by_identity.get(each.record.configuration.source or "")
    return key_of([each.rule, told_of(each, varying), source.rule if source is not None else None])


def _factors_alone(members: Sequence[Placed]) -> bool:
    """Tell whether an arm was made for the factors that a tuned control repeats: it is compared with nothing."""
    return any(label_of(each.record, "arm_words").endswith(FACTORS_ALONE) for each in members)


def rivals(
    members: Mapping[str, list[Placed]],
    names: Mapping[str, str],
    by_identity: Mapping[str, Placed],
    varying: Mapping[str, list[str]],
) -> dict[str, list[str]]:
    """Name the arms that each arm is compared with: plain ones and its controls; nothing for those themselves.

    Args:
        members: key of an arm -> its runs.
        names: key of an arm -> its name.
        by_identity: runs by their identities, for those that controls repeat.
        varying: of each subject, the constants that differ within it.

    Returns:
        Key of an arm -> names of others.
    """
    plain = [(other, told_of(runs[0], varying)) for other, runs in members.items() if runs[0].rule == PLAIN]
    controls: list[tuple[str, Placed, str]] = []
    for other, runs in members.items():
        source = by_identity.get(runs[0].record.configuration.source or "")
        if runs[0].control is not None and source is not None:
            controls.append((other, source, arm_key(source, varying, by_identity)))
    found: dict[str, list[str]] = {}
    for key, runs in members.items():
        first = runs[0]
        if first.control is not None or first.rule == PLAIN or _factors_alone(runs):
            found[key] = []
            continue
        told = told_of(first, varying)
        same = [other for other, of_plain in plain if of_plain == told]
        own = [
            other
            for other, source, repeated in controls
            # A tuned control repeats its method at values of its own, and yet is a control of the method at the
            # method's.
            if repeated == key
            or (
                source.rule == first.rule
                and _factors_alone(members[repeated])
                and _experiments(members[other]) & _experiments(runs)
            )
        ]
        found[key] = [names[other] for other in (*(same or (other for other, _ in plain)), *own)]
    return found


def _experiments(members: Sequence[Placed]) -> set[str]:
    """Name the experiments that an arm's runs were first made for."""
    return {label_of(each.record, "experiment") for each in members}
