"""What runs are judged by: as they say themselves, and only where none does by a guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.lab.experiments.plan import QUANTITIES, Quantity
from layerwise.lab.runs.records import Record

HIGHER = ("accuracy", "auc", "f1", "recall", "precision", "score", "bleu")
"""Words in the name of a quantity of which more is better."""


@dataclass(frozen=True)
class Judged:
    """What is compared.

    Attributes:
        quantity: it.
        records: the runs, without those that judge it the other way round.
        notes: what the page says of it.
    """

    quantity: Quantity
    records: list[Record]
    notes: list[str]


def judged(records: Sequence[Record]) -> Judged:
    """Choose what runs are compared by.

    Args:
        records: of the runs, at least one.

    Returns:
        What most of the runs that say it were judged by; a guess where none does.
    """
    kept, notes = list(records), []
    said = Counter(quantity for record in kept if (quantity := stored(record)) is not None)
    if not said:
        quantity = guess(kept)
        way = "more" if quantity.higher_is_better else "less"
        notes.append(
            f"A guess: no run says what it was judged by, so {quantity.words} is taken, and {way} of it to be better. "
            "Where that is wrong every verdict is."
        )
        return Judged(quantity, kept, notes)
    quantity = max(said, key=lambda each: (said[each], sum(_has(record, each) for record in kept)))
    if len(said) > 1:
        counts = ", ".join(f"{_way(each)} by {count} runs" for each, count in said.items())
        notes.append(f"The runs were made to be judged by different things: {counts}. Here it is {_way(quantity)}.")
    silent = len(kept) - said.total()
    if silent:
        notes.append(
            f"A guess: {silent} runs do not say what they were judged by, and are judged as the others: "
            f"{_way(quantity)}."
        )

    opposite = [record for record in kept if _reversed(record, quantity)]
    if opposite:
        notes.append(f"Left out: {len(opposite)} runs that judge {quantity.words} the other way round.")
        kept = [record for record in kept if not _reversed(record, quantity)]
    return Judged(quantity, kept, notes)


def _reversed(record: Record, quantity: Quantity) -> bool:
    """Tell whether a run says of the same quantity that its other side is better."""
    other = stored(record)
    return other is not None and other.name == quantity.name and other.higher_is_better != quantity.higher_is_better


def _way(quantity: Quantity) -> str:
    return f"{quantity.words} ({'more' if quantity.higher_is_better else 'less'} is better)"


def _has(record: Record, quantity: Quantity) -> bool:
    return quantity.name == "seconds" or record.summary["finals"].get(quantity.name) is not None


def stored(record: Record) -> Quantity | None:
    """Read what a run says it was judged by; None where it says nothing that can be used."""
    labels = record.about.get("labels")
    given = labels.get("quantity") if isinstance(labels, Mapping) else None
    if not isinstance(given, Mapping):
        return None
    try:
        quantity = Quantity(**given)
    except TypeError:
        return None
    words = (quantity.name, quantity.words, quantity.unit, quantity.difference_unit)
    usable = all(isinstance(each, str) for each in words) and isinstance(quantity.higher_is_better, bool)
    return quantity if usable and quantity.name and quantity.words else None


def guess(records: Sequence[Record]) -> Quantity:
    """Guess what runs were judged by from the names of what they ended with.

    Args:
        records: of the runs.

    Returns:
        Test error or accuracy where all have it; else what the most have and no loss; then the loss of the tests; the
        training loss only where there is nothing else.
    """
    counts = Counter(
        name for record in records for name, value in record.summary["finals"].items() if value is not None
    )
    for name in ("test_error", "accuracy"):
        if counts[name] and counts[name] == max(counts.values()):
            return QUANTITIES[name]
    tested = {name: count for name, count in counts.items() if name != "training_loss"} or counts
    own = {name: count for name, count in tested.items() if name != "test_loss"} or tested
    name = max(own, key=lambda name: own[name], default="training_loss")
    higher = any(word in name.lower() for word in HIGHER)
    return Quantity(name=name, words=name.replace("_", " "), unit="", difference_unit="", higher_is_better=higher)
