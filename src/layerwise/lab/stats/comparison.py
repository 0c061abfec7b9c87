"""What paired runs show: a difference where three tests agree, else "no difference shown", with the reason.

Both arms of a seed begin with the same weights and see the same batches. A difference is called where at least
MINIMUM_PAIRS pairs can be compared, the 95 % bootstrap interval of the mean difference leaves out 0, and the p-value of
Student's paired t, adjusted by Holm's procedure for all planned comparisons, is below ALPHA.

A diverged run has no number that means anything, so numbers are of the pairs in which neither run diverged. These are
the pairs that an arm survived: an arm that diverged more often than the other is judged on its easier seeds, and is
never called the better one of the two. It may still be called the worse one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from layerwise.lab.errors import UsageError
from layerwise.lab.stats.bootstrap import bootstrap_interval, holm, paired_p_value
from layerwise.lab.stats.wording import counted, decimals_of, probability, signed

ALPHA = 0.05  # chance, over all comparisons together, of calling a difference where there is none
MINIMUM_PAIRS = 5  # fewer pairs than this show nothing: their bootstrap interval is far from 95 % sure
NONE = "no difference shown"  # where nothing is called; other outcomes are "lower" and "higher" with the quantity
DUST = 1e-11  # what subtraction leaves of equal numbers, relative to the largest of them: differences this small are 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms that are to be compared, with their numbers by seed."""

    subject: str  # what both arms have in common, in words, such as the solver
    arm: str  # in words
    against: str  # the other arm, in words that can follow "beats", such as "the plain solver"
    step: int  # updates after which the quantity was measured
    values: Mapping[int, float]  # seed -> quantity of the arm; of a diverged seed anything or nothing
    reference: Mapping[int, float]  # seed -> quantity of the other arm
    diverged: frozenset[int] = frozenset()
    diverged_reference: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        own, other = ("values", self.values, self.diverged), ("reference", self.reference, self.diverged_reference)
        for name, numbers, diverged in (own, other):
            for seed, value in numbers.items():
                if seed not in diverged and not math.isfinite(value):
                    suffix = "_reference" if name == "reference" else ""
                    raise UsageError(
                        f"{name}[{seed}]={value!r} of {self.arm} and {self.against}: must be finite; a run without a "
                        f"finite result has diverged: add its seed to diverged{suffix}"
                    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another, paired by seed."""

    subject: str
    arm: str
    against: str
    step: int
    seeds: tuple[int, ...]  # of the pairs in which neither run diverged
    differences: tuple[float, ...]  # quantity of `arm` minus that of `against`, one for each of `seeds`
    mean: float | None  # None without a pair
    sd: float | None  # (n - 1); None with fewer than two pairs
    low: float | None  # end of the 95 % interval; None with fewer than MINIMUM_PAIRS pairs or without spread
    high: float | None
    p: float | None  # two-sided; None where `low` is
    adjusted_p: float | None = None  # after Holm's procedure over the family
    outcome: str = NONE  # or "lower" or "higher" with the quantity
    reason: str  # why the outcome is NONE
    diverged: tuple[int, ...]  # seeds run by both arms in which `arm` diverged
    diverged_against: tuple[int, ...]
    quantity: str  # in the singular and without an article
    higher_is_better: bool
    unit: str  # of the differences

    @property
    def better(self) -> bool:
        """Whether a difference is called, and in the arm's favour."""
        return self.outcome == f"{'higher' if self.higher_is_better else 'lower'} {self.quantity}"

    @property
    def worse(self) -> bool:
        """Whether a difference is called, and to the disadvantage of the arm."""
        return self.outcome != NONE and not self.better

    @property
    def runs(self) -> int:
        """Number of seeds that both arms ran, diverged ones among them."""
        return len(self.seeds) + len({*self.diverged, *self.diverged_against})

    @property
    def statistics(self) -> str:
        """Mean difference, interval, adjusted p-value and number of pairs in one line."""
        if self.mean is None:
            return "no numbers to compare" if self.runs else "no pair of finished runs"
        numbers = [value for value in (self.mean, self.low, self.high) if value is not None]
        decimals = decimals_of(numbers)
        words = f"{signed(self.mean, decimals)} {self.unit}".rstrip()
        if self.low is not None and self.high is not None and self.adjusted_p is not None:
            # An end that is 0 to the last bit, and not by rounding, is written as such.
            low, high = (signed(end, decimals) if end else "0" for end in (self.low, self.high))
            words += f", 95 % interval {low} to {high}"
            words += f", adjusted p {probability(self.adjusted_p, ALPHA)}"
        return f"{words}, n = {len(self.seeds)}"

    @property
    def sentence(self) -> str:
        """The outcome with its numbers in a sentence; if runs diverged, another one says how many."""
        if self.outcome == NONE:
            pair = f"{self.arm} and {self.against}"
            words = f"no difference shown between {pair} ({self.statistics}; {self.reason})."
        else:
            words = f"{self.arm} has a {self.outcome} than {self.against} ({self.statistics})."
        if self.diverged or self.diverged_against:
            words += (
                f" {self.arm} diverged in {len(self.diverged)} of {counted(self.runs, 'seed')} "
                f"(against {len(self.diverged_against)})"
            )
            words += "; the numbers are of the pairs in which neither did." if self.seeds else "."
        return words


def judge(
    pairs: Sequence[Pair], *, quantity: str, higher_is_better: bool, unit: str, family: int | None = None
) -> list[Comparison]:
    """Compare every pair of arms, with Holm's correction over all of them.

    ``family`` comparisons were planned together, as many as there are pairs if it is None; those not in ``pairs`` count
    as p = 1.
    """
    planned = len(pairs) if family is None else family
    measured = [_measure(pair, quantity, higher_is_better, unit) for pair in pairs]
    # What cannot be judged is never called; as p = 1 it stays in the family without making room for the others.
    p_values = [1.0 if each.p is None else each.p for each in measured]
    adjusted = holm(p_values + [1.0] * (planned - len(pairs)))
    return [_decide(each, p, planned) for each, p in zip(measured, adjusted, strict=False)]


def _measure(pair: Pair, quantity: str, higher_is_better: bool, unit: str) -> Comparison:
    """Compute the numbers of one comparison, with no outcome yet; the reason says where there can be none."""
    ran = (pair.values.keys() | pair.diverged) & (pair.reference.keys() | pair.diverged_reference)
    seeds = tuple(sorted(ran - pair.diverged - pair.diverged_reference))
    differences = tuple(float(pair.values[seed] - pair.reference[seed]) for seed in seeds)
    dust = DUST * max((max(abs(pair.values[seed]), abs(pair.reference[seed])) for seed in seeds), default=0.0)
    constant = bool(differences) and max(differences) - min(differences) <= dust
    mean = sd = low = high = p = None
    reason = ""
    if differences:
        mean = math.fsum(differences) / len(differences)
        mean = 0.0 if abs(mean) <= dust else mean
        if len(differences) >= 2:
            squares = math.fsum((value - mean) ** 2 for value in differences)
            sd = 0.0 if constant else math.sqrt(squares / (len(differences) - 1))
    if len(differences) < MINIMUM_PAIRS:
        reason = f"fewer than {MINIMUM_PAIRS} pairs"
        if len(ran) >= MINIMUM_PAIRS:
            reason += " without a diverged run"
    elif constant:
        reason = (
            f"the {quantity} is the same in every pair"
            if max(map(abs, differences)) <= dust
            else "every pair differs by the same amount, which leaves no spread to judge it by"
        )
    else:
        low, high = bootstrap_interval(differences)
        # An end that is 0 but for rounding must not leave 0 out.
        low, high = (0.0 if abs(end) <= dust else end for end in (low, high))
        p = paired_p_value(differences)
    return Comparison(
        subject=pair.subject,
        arm=pair.arm,
        against=pair.against,
        step=pair.step,
        seeds=seeds,
        differences=differences,
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        p=p,
        reason=reason,
        diverged=tuple(sorted(ran & pair.diverged)),
        diverged_against=tuple(sorted(ran & pair.diverged_reference)),
        quantity=quantity,
        higher_is_better=higher_is_better,
        unit=unit,
    )


def _decide(measured: Comparison, adjusted_p: float, family: int) -> Comparison:
    """Give a measured comparison its outcome, and where that is none the reason."""
    mean, low, high = measured.mean, measured.low, measured.high
    if mean is None or low is None or high is None:
        return measured
    measured = replace(measured, adjusted_p=adjusted_p)
    if low <= 0.0 <= high:
        return replace(measured, reason="the interval holds 0")
    if adjusted_p >= ALPHA:
        correction = f" after Holm's correction over {family} comparisons" if family > 1 else ""
        return replace(measured, reason=f"p is not below {ALPHA}{correction}")
    called = replace(measured, outcome=f"{'lower' if mean < 0.0 else 'higher'} {measured.quantity}")
    more_often = len(measured.diverged) - len(measured.diverged_against)
    if more_often > 0 and called.better:
        return replace(measured, reason=f"{measured.arm} diverged more often")
    if more_often < 0 and called.worse:
        return replace(measured, reason=f"{measured.against} diverged more often")
    return called
