"""The first sentence of a page: what the comparisons show, and never more."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.verdicts import Verdict, verdicts
from layerwise.lab.report.words import capital, place_words
from layerwise.lab.stats.comparison import MINIMUM_PAIRS
from layerwise.lab.stats.wording import listed

NAMED = 4
"""So many names are listed in a sentence; more are counted."""


def headline(outcome: Outcome) -> str:
    """Say in one or two sentences what the comparisons show, and never more.

    Args:
        outcome: of a plan.

    Returns:
        The sentences.
    """
    plan, found = outcome.plan, verdicts(outcome.results)
    if not outcome.results.records:
        return "No run is finished yet."
    if not found:
        return "Nothing was planned to be compared."
    place = capital(place_words(plan))
    if max(verdict.pairs for verdict in found) < MINIMUM_PAIRS:
        differs, seeds = f"to tell whether the {plan.quantity.words} differs", len(plan.seeds)
        if seeds >= MINIMUM_PAIRS:
            return f"{place}, too few runs are finished {differs}."
        return f"{place}, {seeds} seed{' is' if seeds == 1 else 's are'} too few {differs}; {MINIMUM_PAIRS} are needed."
    way = "higher" if plan.quantity.higher_is_better else "lower"
    better = [verdict for verdict in found if verdict.beats_plain]
    worse = [verdict for verdict in found if verdict.worse]
    others = {verdict.rows[0][1].against for verdict in found}
    than = f"a {way} {plan.quantity.words} than {others.pop() if len(others) == 1 else 'what it is compared with'}"
    words = list(dict.fromkeys(verdict.words for verdict in found))
    if not better:
        begin = f"{_nobody(found)} to have {than}{_anywhere(found)}."
    elif len(words) == 1 and len(found) > 1:
        begin = f"{words[0]} is shown to have {than} with {_some(found, better, 'beats_plain')}. {_more(better)}"
    else:
        begin = f"{_who(found, better, 'beats_plain')} shown to have {than}. {_more(better)}"
    if not worse:
        return f"{place}, {begin}"
    if len(words) == 1 and len(found) > 1:
        return f"{place}, {begin} It is shown to do worse with {_some(found, worse, 'does_worse')}."
    return f"{place}, {begin} {capital(_who(found, worse, 'does_worse'))} shown to do worse."


def _nobody(found: Sequence[Verdict]) -> str:
    """Name everything that was tried, none of which is shown to do anything."""
    words = list(dict.fromkeys(verdict.words for verdict in found))
    if len(words) > NAMED:
        return f"none of {len(words)} methods is shown"
    return f"{listed(words)} {'is' if len(words) == 1 else 'are'} not shown"


def _anywhere(found: Sequence[Verdict]) -> str:
    """Name all subjects, where there are several."""
    subjects = list(dict.fromkeys(verdict.subject_words for verdict in found))
    if len(subjects) == 1:
        return ""
    return f" with any of {listed(subjects) if len(subjects) <= NAMED else f'{len(subjects)} subjects'}"


def _who(found: Sequence[Verdict], chosen: Sequence[Verdict], shown: str) -> str:
    """Name those of which something is shown, with "is" or "are"."""
    if len(found) == 1:
        return f"{_named(found, chosen, shown)[0]} is"
    return f"{_some(found, chosen, shown)} {'is' if len(chosen) == 1 else 'are'}"


def _some(found: Sequence[Verdict], chosen: Sequence[Verdict], shown: str) -> str:
    """Count those of which something is shown, and name them if they are few."""
    if len(chosen) <= NAMED:
        return f"{len(chosen)} of {len(found)} ({listed(_named(found, chosen, shown))})"
    each = " (of groups at some of their values)" if any(verdict.grouped for verdict in chosen) else ""
    return f"{len(chosen)} of {len(found)}{each}"


def _named(found: Sequence[Verdict], chosen: Sequence[Verdict], shown: str) -> list[str]:
    """Name verdicts, groups with the number of values at which something is shown."""
    return [
        f"{name} at {len(getattr(verdict, shown))} of {len(verdict.rows)} values" if verdict.grouped else name
        for name, verdict in zip(_names(found, chosen), chosen, strict=True)
    ]


def _names(found: Sequence[Verdict], chosen: Sequence[Verdict]) -> list[str]:
    """Name verdicts by what tells them apart: the subject, the method, or both."""
    methods = len({verdict.words for verdict in found})
    subjects = len({verdict.subject for verdict in found})
    if methods == 1 and subjects > 1:
        return [verdict.subject_words for verdict in chosen]
    if subjects <= 1:
        return [verdict.words for verdict in chosen]
    return [f"{verdict.words} ({verdict.subject_words})" for verdict in chosen]


def _more(better: Sequence[Verdict]) -> str:
    """Say for how many of the better ones the controls are beaten too."""
    controlled = [verdict for verdict in better if verdict.beats_all is not None]
    if not controlled:
        return "No control was run to tell what that is due to."
    beyond = [verdict for verdict in controlled if verdict.beats_all]
    if len(better) == 1:
        if not beyond:
            return "That is not shown to be more than its controls give."
        at = f"At {listed(beyond[0].beats_all or ())} that" if beyond[0].grouped else "That"
        return f"{at} is shown to be more than every control gives."
    if not beyond:
        return "In none of these is it shown to be more than the controls give."
    return f"In {len(beyond)} of these it is shown to be more than every control gives."
