"""Schemas of the JSON files of runs and reports; other content is refused before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.lab.errors import UsageError

Test = Callable[[Any], bool]
Form = Any
"""A schema: one of

* a test;
* ``[form]``, a list of any length; ``(form, form)``, a list of that length;
* a dict of names and forms, where a name with "?" may be missing;
* ``Each`` or ``Maybe``.
"""


@dataclass(frozen=True)
class Each:
    """A mapping of any names to values of one form."""

    form: Form


@dataclass(frozen=True)
class Maybe:
    """None, or a value of the form."""

    form: Form


def words(value: Any) -> bool:
    """Tell whether a value is a text."""
    return isinstance(value, str)


def whole(value: Any) -> bool:
    """Tell whether a value is a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def count(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 0."""
    return whole(value) and value >= 0


def number(value: Any) -> bool:
    """Tell whether a value is a number; ``store.read_json`` has already refused non-finite ones."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def switch(value: Any) -> bool:
    """Tell whether a value is True or False."""
    return isinstance(value, bool)


def anything(value: Any) -> bool:
    """Accept any value, where it is only printed or compared."""
    return True


RULE = {
    "name": words,
    "factors?": Each(number),
    "selection?": {"name?": words, "threshold?": number, "measure?": words, "sides?": words},
}
"""The arguments of a rule that are used to group runs; others are only printed."""

CONFIGURATION = {
    "trial": {"epochs?": Maybe(count), "iterations?": Maybe(count)},
    "rule?": Maybe(RULE),
    "apply?": words,
    "decay?": words,
    "threads?": count,
    "device?": words,
    "source?": Maybe(words),
    "seed?": count,
}
"""The configuration of a run."""

QUANTITY = {
    "name": words,
    "words?": words,
    "unit?": words,
    "difference_unit?": words,
    "higher_is_better?": switch,
    "take?": words,
    "level?": number,
}

RUN = {
    "configuration": CONFIGURATION,
    "labels?": {
        "experiment?": words,
        "subject?": words,
        "subject_words?": words,
        "arm?": words,
        "arm_words?": words,
        "quantity?": QUANTITY,
    },
    "versions?": Each(words),
    "hardware?": {"processor?": words, "system?": words},
    "python?": words,
    "started?": words,
    "later?": [{}],
}
"""``run.json``: the configuration, versions and hardware of a run."""

RECORD = {
    "finals": Each(Maybe(number)),
    "diverged_at": Maybe(count),
    "iterations": count,
    "parameters": count,
    "layers": [words],
    "seconds": number,
    "test_seconds": number,
    "factor": {
        "mean": number,
        "spread": number,
        "layers": Each(number),
        "names?": [words],
        "excluded?": [words],
    },
    "metrics_sha256": words,
    "threads?": count,
    "sessions?": count,
    "peak_memory?": number,
    "place?": Maybe(words),
    "decay?": Maybe(words),
    "selections?": [{"epoch": count, "layers": Each((Maybe(number), Maybe(number), switch))}],
}
"""``record.json``: the results of a finished run."""

RUN_LIST = {"runs": [{"folder": words, "subject?": words, "arm?": words, "seed?": count}]}
"""``runs.json``: the folders of an experiment's finished runs."""

_ARM = {
    "name": words,
    "words": words,
    "rule": Maybe(RULE),
    "apply": words,
    "control": Maybe(words),
    "of": Maybe(words),
    "group": words,
    "value": Maybe(number),
    "constants": Each(anything),
    "subjects": [words],
    "against": [words],
    "role?": Maybe(words),
}

PLAN = {
    "name": words,
    "title": words,
    "source": words,
    "layout": words,
    "quantity": QUANTITY,
    "columns": [count],
    "step_unit": words,
    "subjects": [
        {
            "name": words,
            "words": words,
            "constants": Each(anything),
            "kind": words,
            "varied": Each(anything),
            "origin": words,
            "stands_for?": words,
        }
    ],
    "arms": [_ARM],
    "seeds": [count],
    "runs": [(words, words, count, count)],
    "paper": [
        {
            "subject": words,
            "arm": words,
            "step": Maybe(count),
            "mean": Maybe(number),
            "sd": Maybe(number),
            "note": words,
            "gain?": words,
            "full_scale?": switch,
            "quantity?": words,
        }
    ],
    "beside?": [words],
    "claims": [words],
    "constants": Each((anything, words)),
    "notes": [words],
    "scale": words,
    "data_title": words,
    "found?": switch,
    "configurations": [CONFIGURATION],
}
"""``plan.json``: an experiment."""


def check(value: Any, form: Form, place: object) -> None:
    """Refuse a value that does not match a form.

    Args:
        value: the content of a JSON file.
        form: the form.
        place: the file, for the message.

    Raises:
        UsageError: it does not match; the message names the place.
    """
    wrong = _wrong(value, form)
    if wrong is not None:
        where, found = wrong
        text = repr(found)
        text = text if len(text) <= 60 else f"{text[:57]}..."
        raise UsageError(
            f"{place}: damaged: {where.lstrip('.') or 'its content'} is {text}, which is not written there"
        )


def _wrong(value: Any, form: Form) -> tuple[str, Any] | None:
    """Give the place and the value of the first mismatch; None if there is none."""
    if callable(form):
        return None if form(value) else ("", value)
    if isinstance(form, Maybe):
        return None if value is None else _wrong(value, form.form)
    if isinstance(form, (list, tuple)):
        if not isinstance(value, list) or (isinstance(form, tuple) and len(value) != len(form)):
            return "", value
        forms = form if isinstance(form, tuple) else form * len(value)
        return _first((f"[{place}]", one, each) for place, (one, each) in enumerate(zip(value, forms, strict=True)))
    if not isinstance(value, Mapping):
        return "", value
    if isinstance(form, Each):
        return _first((f".{name}", one, form.form) for name, one in value.items())
    for name, each in form.items():
        key = name.removesuffix("?")
        if key not in value:
            if key == name:
                return f".{name}", None
            continue
        found = _wrong(value[key], each)
        if found is not None:
            return f".{key}{found[0]}", found[1]
    return None


def _first(inside: Any) -> tuple[str, Any] | None:
    """Give the first mismatch of several values."""
    for place, value, form in inside:
        if callable(form):
            if not form(value):
                return place, value
            continue
        found = _wrong(value, form)
        if found is not None:
            return place + found[0], found[1]
    return None
