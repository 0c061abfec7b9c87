"""What the comparisons of an arm mean together, in sentences that say no more than they show."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.errors import UsageError
from layerwise.lab.stats.comparison import ALPHA, MINIMUM_PAIRS, NONE, Comparison
from layerwise.lab.stats.wording import counted, listed


def conclusion(plain: Comparison, control: Comparison | Sequence[Comparison]) -> str:
    """Say what the comparisons of one arm with the plain arm and with the controls mean together.

    Args:
        plain: the method against the plain arm.
        control: the method against one control or several, such as the same mean factor as a global rate, or the same
            factors on shuffled layers. May be empty.

    Returns:
        One to three sentences about the method as "it"; never more than the comparisons show.

    Raises:
        UsageError: the comparisons are not all of the same arm, step and quantity.
    """
    controls = (control,) if isinstance(control, Comparison) else tuple(control)
    for each in controls:
        for name in ("subject", "arm", "step", "quantity", "higher_is_better"):
            if getattr(each, name) != getattr(plain, name):
                raise UsageError(
                    f"control.{name}={getattr(each, name)!r}: must be {getattr(plain, name)!r}, as in the comparison "
                    "with the plain arm; give comparisons of one arm"
                )
    return " ".join([_meaning(plain, controls), *_divergences((plain, *controls))])


def _meaning(plain: Comparison, controls: tuple[Comparison, ...]) -> str:
    """Say what the outcomes mean together, without the diverged runs."""
    compared = (plain, *controls)
    if max(len(each.differences) for each in compared) < MINIMUM_PAIRS:
        enough = max(each.runs for each in compared) >= MINIMUM_PAIRS
        pairs = "pairs are without a diverged run" if enough else "pairs are finished"
        return f"Too few runs to tell: fewer than {MINIMUM_PAIRS} {pairs}."
    beaten = listed([each.against for each in compared if each.better])
    above = listed([each.against for each in compared if each.worse])
    unshown = listed([each.against for each in compared if each.outcome == NONE])
    if not beaten and not above:
        return f"These runs do not show that the method changes the {plain.quantity}."
    if plain.better and not above:
        if not controls:
            return f"It beats {beaten}; no control was run to tell what the gain is due to."
        if not unshown:
            others = listed([each.against for each in controls])
            return f"It beats {beaten}: the gain is more than that of {others}."
        return f"It beats {beaten} but not {unshown}: the gain is not shown to be more than that of {unshown}."
    words = f"It beats {beaten}, but" if beaten else "It"
    if above:
        words += f" does worse than {above}"
    if unshown:
        words += f"{', and' if above else ''} is not shown to beat {unshown}"
    return f"{words}."


def _divergences(compared: tuple[Comparison, ...]) -> list[str]:
    """Count the diverged runs, one sentence for all comparisons over equally many seeds."""
    counts: dict[tuple[int, int], list[str]] = {}
    if any(each.diverged or each.diverged_against for each in compared):
        for each in compared:
            others = counts.setdefault((len(each.diverged), each.runs), [])
            others.append(f"{each.against} in {len(each.diverged_against)}")
    return [
        f"It diverged in {times} of {counted(runs, 'seed')}, {listed(others)}."
        for (times, runs), others in counts.items()
        if runs
    ]


def note(family: int, seeds: int) -> str:
    """Say how the intervals were made.

    Args:
        family: number of comparisons planned together.
        seeds: number of pairs planned for each.

    Returns:
        Two sentences; three for so few seeds that the intervals are too narrow.
    """
    correction = f" after Holm's correction over {family} comparisons" if family > 1 else ""
    # The table in layerwise.lab.stats.bootstrap: 0.92 at n = 5 where the interval and the p-value together reach 0.95.
    narrow = " With fewer than 7 pairs the intervals are too narrow (about 92 % at 5); the p-value makes up for it."
    return (
        "Intervals: 95 % bootstrap (expanded percentile) of the mean difference, paired by seed "
        f"({counted(seeds, 'seed')} planned), each by itself. A difference is called where "
        f"there are at least {MINIMUM_PAIRS} pairs, the interval leaves out 0 and Student's paired t has p < {ALPHA}"
        f"{correction}."
    ) + (narrow if seeds < 7 else "")
