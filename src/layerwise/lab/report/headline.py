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


LONGEST = 90
"""Letters of names in a sentence; longer ones are left to the table."""


def headline(outcome: Outcome) -> str:
    """Say in one sentence what the comparisons show.

    Args:
        outcome: of a plan.

    Returns:
        The sentence.
    """
    plan, found = outcome.plan, verdicts(outcome.results)
    if not outcome.results.records:
        return "No run is finished yet."
    if not found:
        return "Nothing was planned to be compared."
    place, quantity = capital(place_words(plan)), plan.quantity.words
    if max(verdict.pairs for verdict in found) < MINIMUM_PAIRS:
        seeds = len(plan.seeds)
        if seeds >= MINIMUM_PAIRS:
            ran = max(each.runs for verdict in found for _, each in verdict.rows)
            few = "pairs are without a diverged run" if ran >= MINIMUM_PAIRS else "runs are finished"
            return f"{place}, too few {few} to compare the {quantity}."
        many = f"{seeds} seeds are" if seeds > 1 else "1 seed is"
        return f"{place}, {many} too few to show a difference in {quantity}; it takes {MINIMUM_PAIRS}."
    ways = ("higher", "lower") if plan.quantity.higher_is_better else ("lower", "higher")
    others = {verdict.rows[0][1].against for verdict in found}
    than = others.pop() if len(others) == 1 else "what they are compared with"
    better = [verdict for verdict in found if verdict.beats_plain]
    worse = [verdict for verdict in found if verdict.worse]
    words = f"{place}, {_count(found, better, 'beats_plain')} a {ways[0]} {quantity} than {than}"
    controlled = [verdict for verdict in better if verdict.beats_all is not None]
    if controlled:
        beyond = sum(bool(verdict.beats_all) for verdict in controlled)
        words += f", and {beyond or 'none'} {'beat' if beyond > 1 else 'beats'} every control"
    elif better:
        words += ", without a control to tell why"
    return f"{words}; {_count(found, worse, 'does_worse')} a {ways[1]} one." if worse else f"{words}."


def _count(found: Sequence[Verdict], chosen: Sequence[Verdict], shown: str) -> str:
    """Count the methods of which something is shown, and name them if they are few."""
    names = list(dict.fromkeys(verdict.words for verdict in found))
    if not chosen:
        what = names[0] if len(names) == 1 and len(found) == 1 else f"{len(found)} comparisons"
        return f"{what} shows no sign of" if len(found) == 1 else f"none of {what} shows"
    count = f"{len(chosen)} of {len(found)} comparisons {'shows' if len(chosen) == 1 else 'show'}"
    if len(chosen) > NAMED:
        return count
    several = len({verdict.subject for verdict in found}) > 1
    said = []
    for verdict in chosen:
        name = f"{verdict.words} ({verdict.subject_words})" if several else verdict.words
        at = f" at {len(getattr(verdict, shown))} of {len(verdict.rows)} values" if verdict.grouped else ""
        said.append(name + at)
    if len(names) == 1 and several:
        said = [f"{names[0]} with {listed([verdict.subject_words for verdict in chosen])}"]
        if any(verdict.grouped for verdict in chosen):
            said[0] += " at some values"
    named = f" {listed(said)} to have"
    return count + (named if len(named) <= LONGEST else "")
