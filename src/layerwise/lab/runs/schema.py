"""Schemas of the JSON files of runs and reports; other content is refused before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.lab.errors import UsageError

Form = Any
"""A schema: a type; a test; ``[form]``, a list of any length; ``(form, form)``, a list of that length; a dict of names
and forms, where a name with "?" may be missing; ``Each`` or ``Maybe``."""


@dataclass(frozen=True)
class Each:
    """A mapping of any names to values of one form."""

    form: Form


@dataclass(frozen=True)
class Maybe:
    """None, or a value of the form."""

    form: Form


def number(value: Any) -> bool:
    """Tell whether a value is a number; ``store.read_json`` has already refused non-finite ones."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def count(value: Any) -> bool:
    """Tell whether a value is a whole number from 0, of 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


RULE = {
    "name": str,
    "factors?": Each(number),
    "selection?": {"name?": str, "threshold?": number, "measure?": str, "sides?": str},
}
"""The arguments of a rule that are used to group runs; others are only printed."""

CONFIGURATION = {
    "trial": {"epochs?": Maybe(count), "iterations?": Maybe(count)},
    "rule?": Maybe(RULE),
    "apply?": str,
    "decay?": str,
    "threads?": count,
    "device?": str,
    "source?": Maybe(str),
    "seed?": count,
}

QUANTITY = {
    "name": str,
    "words?": str,
    "unit?": str,
    "difference_unit?": str,
    "higher_is_better?": bool,
    "take?": str,
    "level?": number,
}

LABELS = {
    **{f"{name}?": str for name in ("experiment", "subject", "subject_words", "arm", "arm_words")},
    "quantity?": QUANTITY,
}

RUN = {
    "configuration": CONFIGURATION,
    "labels?": LABELS,
    "versions?": Each(str),
    "hardware?": {"processor?": str, "system?": str},
    "python?": str,
    "started?": str,
    "later?": [{}],
}
"""``run.json``: the configuration, versions and hardware of a run."""

FACTOR = {
    "mean": number,
    "spread": number,
    "layers": Each(number),
    "names?": [str],
    "excluded?": [str],
    "roles?": [str],
    "shapes?": [(count, count)],
    "sizes?": [count],
}

RECORD = {
    "finals": Each(Maybe(number)),  # quantity -> last value
    "diverged_at": Maybe(count),  # updates before the first loss or test that is not finite
    "iterations": count,
    "parameters": count,
    "layers": [str],
    "seconds": number,  # over all sessions, tests included
    "test_seconds": number,
    "factor": FACTOR,
    "metrics_sha256": str,
    "threads?": count,
    "sessions?": count,
    "peak_memory?": number,  # bytes, of the device that trained it
    "place?": Maybe(str),
    "decay?": Maybe(str),
    "selections?": [{"epoch": count, "layers": Each((Maybe(number), Maybe(number), bool))}],
}
"""``record.json``: the results of a finished run."""

RUN_LIST = {"runs": [{"folder": str, "subject?": str, "arm?": str, "seed?": count}]}
"""``runs.json``: the folders of an experiment's finished runs."""

SUBJECT = {
    **dict.fromkeys(("name", "words", "kind", "origin", "stands_for?"), str),
    "constants": Each(object),
    "varied": Each(object),
}

ARM = {
    **dict.fromkeys(("name", "words", "apply", "group"), str),
    "rule": Maybe(RULE),
    "control": Maybe(str),
    "of": Maybe(str),
    "value": Maybe(number),
    "constants": Each(object),
    "subjects": [str],
    "against": [str],
    "role?": Maybe(str),
    "search?": Maybe(Each(object)),
}

PAPER_VALUE = {
    **dict.fromkeys(("subject", "arm", "note", "gain?", "quantity?"), str),
    **dict.fromkeys(("mean", "sd"), Maybe(number)),
    "step": Maybe(count),
    "full_scale?": bool,
}

TRIAL = {"setting": Each(object), "score": Maybe(number), "extension": bool}

TUNED = {
    "subject": str,
    "arm": str,
    "trials": [TRIAL],
    "chosen": Each(object),
    "warnings": [str],
}

TUNING = {"words": str, "quantity": str, "seeds": [count], "runs": count, "seconds": number, "arms": [TUNED]}

PLAN = {
    **dict.fromkeys(("name", "title", "source", "layout", "step_unit", "scale", "data_title"), str),
    "quantity": QUANTITY,
    "columns": [count],
    "subjects": [SUBJECT],
    "arms": [ARM],
    "seeds": [count],
    "runs": [(str, str, count, count)],
    "paper": [PAPER_VALUE],
    "beside?": [str],
    "claims": [str],
    "constants": Each((object, str)),
    "notes": [str],
    "found?": bool,
    "tuning?": Maybe(TUNING),
    "configurations": [CONFIGURATION],
}
"""``plan.json``: an experiment."""


def check(value: Any, form: Form, place: object) -> None:
    """Refuse the content of a JSON file that does not match a form; the message names the file and the place in it."""
    wrong = _wrong(value, form)
    if wrong is not None:
        where, found = wrong
        text = repr(found)
        text = text if len(text) <= 60 else f"{text[:57]}..."
        raise UsageError(
            f"{place}: damaged: {where.lstrip('.') or 'its content'} is {text}, which is not written there"
        )


def _passes(value: Any, form: Form) -> bool:
    return isinstance(value, form) if isinstance(form, type) else form(value)


def _wrong(value: Any, form: Form) -> tuple[str, Any] | None:
    """Give the place and the value of the first mismatch; None if there is none."""
    inside: list[tuple[str, Any, Form]] = []
    if callable(form):
        return None if _passes(value, form) else ("", value)
    if isinstance(form, Maybe):
        return None if value is None else _wrong(value, form.form)
    if isinstance(form, (list, tuple)):
        if not isinstance(value, list) or (isinstance(form, tuple) and len(value) != len(form)):
            return "", value
        forms = form if isinstance(form, tuple) else form * len(value)
        inside += [(f"[{place}]", one, each) for place, (one, each) in enumerate(zip(value, forms, strict=True))]
    elif not isinstance(value, Mapping):
        return "", value
    elif isinstance(form, Each):
        inside += [(f".{name}", one, form.form) for name, one in value.items()]
    else:
        for name, each in form.items():
            key = name.removesuffix("?")
            if key in value:
                inside.append((f".{key}", value[key], each))
            elif key == name:
                return f".{name}", None
    for place, one, each in inside:
        if callable(each) and _passes(one, each):  # most of what there is
            continue
        found = _wrong(one, each)
        if found is not None:
            return place + found[0], found[1]
    return None
