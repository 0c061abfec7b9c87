"""Schemas of the JSON files of runs and reports; other content is refused before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.lab.errors import UsageError

Form = Any
"""A schema: a test; ``[form]``, a list of any length; ``(form, form)``, a list of that length; a dict of names and
forms, where a name with "?" may be missing; ``Each`` or ``Maybe``."""


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


def number(value: Any) -> bool:
    """Tell whether a value is a number; ``store.read_json`` has already refused non-finite ones."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def count(value: Any) -> bool:
    """Tell whether a value is a whole number from 0, of 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


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

QUANTITY = {
    "name": words,
    "words?": words,
    "unit?": words,
    "difference_unit?": words,
    "higher_is_better?": switch,
    "take?": words,
    "level?": number,
}

LABELS = {
    **{f"{name}?": words for name in ("experiment", "subject", "subject_words", "arm", "arm_words")},
    "quantity?": QUANTITY,
}

RUN = {
    "configuration": CONFIGURATION,
    "labels?": LABELS,
    "versions?": Each(words),
    "hardware?": {"processor?": words, "system?": words},
    "python?": words,
    "started?": words,
    "later?": [{}],
}
"""``run.json``: the configuration, versions and hardware of a run."""

FACTOR = {"mean": number, "spread": number, "layers": Each(number), "names?": [words], "excluded?": [words]}

RECORD = {
    "finals": Each(Maybe(number)),
    "diverged_at": Maybe(count),
    "iterations": count,
    "parameters": count,
    "layers": [words],
    "seconds": number,
    "test_seconds": number,
    "factor": FACTOR,
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

SUBJECT = {
    **dict.fromkeys(("name", "words", "kind", "origin", "stands_for?"), words),
    "constants": Each(anything),
    "varied": Each(anything),
}

ARM = {
    **dict.fromkeys(("name", "words", "apply", "group"), words),
    "rule": Maybe(RULE),
    "control": Maybe(words),
    "of": Maybe(words),
    "value": Maybe(number),
    "constants": Each(anything),
    "subjects": [words],
    "against": [words],
    "role?": Maybe(words),
}

PAPER_VALUE = {
    **dict.fromkeys(("subject", "arm", "note", "gain?", "quantity?"), words),
    **dict.fromkeys(("mean", "sd"), Maybe(number)),
    "step": Maybe(count),
    "full_scale?": switch,
}

PLAN = {
    **dict.fromkeys(("name", "title", "source", "layout", "step_unit", "scale", "data_title"), words),
    "quantity": QUANTITY,
    "columns": [count],
    "subjects": [SUBJECT],
    "arms": [ARM],
    "seeds": [count],
    "runs": [(words, words, count, count)],
    "paper": [PAPER_VALUE],
    "beside?": [words],
    "claims": [words],
    "constants": Each((anything, words)),
    "notes": [words],
    "found?": switch,
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


def _wrong(value: Any, form: Form) -> tuple[str, Any] | None:
    """Give the place and the value of the first mismatch; None if there is none."""
    inside: list[tuple[str, Any, Form]] = []
    if callable(form):
        return None if form(value) else ("", value)
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
        if callable(each) and each(one):  # most of what there is
            continue
        found = _wrong(one, each)
        if found is not None:
            return place + found[0], found[1]
    return None
