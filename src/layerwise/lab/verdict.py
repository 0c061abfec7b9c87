"""What paired runs show, and what they do not.

Every comparison is paired: both arms of a seed begin with the same weights and see the same batches, so the
differences between them are free of the spread between seeds. The interval is Student's t on the differences,

    mean ± t(n - 1; 1 - alpha / (2 m)) * sd / sqrt(n),

with alpha = 0.05 and Bonferroni's correction for the m comparisons that were planned: all m intervals hold at
once with at least 95 % confidence. A result is only called a difference where n >= 5 and the interval leaves
out 0.

Reference:
    Student 1908, Biometrika 6; Dunn 1961, Journal of the American Statistical Association 56 (the
    correction).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["error", "accuracy"]

ALPHA = 0.05
"""Chance, over all comparisons together, of calling a difference where there is none."""

MINIMUM_PAIRS = 5
"""Fewer pairs than this show nothing, whatever the interval."""

LOWER, HIGHER, NONE = "lower error", "higher error", "no difference shown"
"""The three outcomes where the quantity is an error; of another quantity, its name stands for "error"."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another, paired by seed.

    Attributes:
        solver: name of the solver, in words.
        arm: the arm in question, in words.
        against: the other arm, in words.
        iteration: updates after which the quantity was measured.
        seeds: the pairs.
        differences: quantity of ``arm`` minus that of ``against``, percentage points, one a pair.
        mean: of the differences; None without a pair.
        sd: of the differences (n - 1); None with fewer than two pairs.
        low: lower end of the interval; None where there is no interval.
        high: upper end.
        confidence: of this one interval, after the correction.
        outcome: ``LOWER``, ``HIGHER`` or ``NONE``; of another quantity than the error, in its words.
        reason: why the outcome is ``NONE``, or "".
        diverged: runs among the pairs that diverged.
        quantity: ``"error"`` or ``"accuracy"``.
    """

    solver: str
    arm: str
    against: str
    iteration: int
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    confidence: float
    outcome: str
    reason: str
    diverged: int = 0
    quantity: Quantity = "error"

    @property
    def better(self) -> bool:
        """The arm is shown to be better than the other."""
        return self.outcome == (LOWER if self.quantity == "error" else f"higher {self.quantity}")

    @property
    def worse(self) -> bool:
        """The arm is shown to be worse than the other."""
        return self.outcome != NONE and not self.better

    @property
    def statistics(self) -> str:
        """Mean difference, interval and number of pairs in one line."""
        if self.mean is None:
            return "no pair of finished runs"
        words = f"{signed(self.mean)} points"
        if self.low is not None and self.high is not None:
            words += f", interval {signed(self.low)} to {signed(self.high)}"
        return f"{words}, n = {len(self.seeds)}"

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        pair = f"{self.arm} and {self.against}"
        if self.outcome == NONE:
            words = f"no difference shown between {pair} ({self.statistics}; {self.reason})."
        else:
            words = f"{self.arm} has a {self.outcome} than {self.against} ({self.statistics})."
        if self.diverged:
            words += f" {self.diverged} of these runs diverged and count at the {self.quantity} they ended with."
        return words


def signed(value: float) -> str:
    """Write a difference with its sign and two decimals."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def student_interval(differences: tuple[float, ...], confidence: float) -> tuple[float, float, float, float]:
    """Compute Student's interval of a mean.

    Args:
        differences: at least two numbers.
        confidence: of the interval, in (0, 1).

    Returns:
        Mean, standard deviation (n - 1), lower and upper end.

    Raises:
        ValueError: fewer than two numbers, or a confidence outside (0, 1).
    """
    from scipy.special import stdtrit  # a tenth of the import time of scipy.stats

    count = len(differences)
    if count < 2:
        raise ValueError(f"differences={differences!r}: an interval needs at least two")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence!r}: must lie between 0 and 1, both left out")
    mean = math.fsum(differences) / count
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1))
    half = float(stdtrit(count - 1, 1.0 - (1.0 - confidence) / 2.0)) * sd / math.sqrt(count)
    return mean, sd, mean - half, mean + half


def compare(
    values: Mapping[int, float],
    reference: Mapping[int, float],
    family: int,
    *,
    solver: str,
    arm: str,
    against: str,
    iteration: int,
    diverged: int = 0,
    quantity: Quantity = "error",
) -> Comparison:
    """Compare two arms over the seeds that both have.

    Args:
        values: seed -> quantity of the arm, in %; a diverged run with the one it counts as.
        reference: seed -> quantity of the other arm.
        family: number of comparisons planned together, at least 1.
        solver: name in words.
        arm: name in words.
        against: name in words.
        iteration: updates after which the quantity was measured.
        diverged: runs among the pairs that diverged.
        quantity: what is compared.

    Returns:
        The comparison with its outcome.

    Raises:
        ValueError: ``family`` is less than 1.
    """
    if family < 1:
        raise ValueError(f"family={family!r}: at least one comparison is planned")
    seeds = tuple(sorted(values.keys() & reference.keys()))
    differences = tuple(values[seed] - reference[seed] for seed in seeds)
    confidence = 1.0 - ALPHA / family
    mean = sd = low = high = None
    if differences:
        mean = math.fsum(differences) / len(differences)
    # Equal differences have no spread to estimate. Subtraction leaves dust, so "equal" is to 1e-9 points.
    constant = bool(differences) and max(differences) - min(differences) <= 1e-9
    if len(differences) >= 2:
        mean, sd, low, high = student_interval(differences, confidence)
        if constant:
            sd, low, high = 0.0, None, None
    outcome, reason = NONE, ""
    if len(differences) < MINIMUM_PAIRS:
        reason = f"fewer than {MINIMUM_PAIRS} pairs"
    elif constant:
        reason = (
            f"the {quantity} is the same in every pair"
            if max(map(abs, differences)) <= 1e-9
            else "every pair differs by the same amount, which leaves no spread to judge it by"
        )
    elif low is not None and high is not None and low <= 0.0 <= high:
        reason = "the interval holds 0"
    else:
        outcome = f"{'lower' if mean is not None and mean < 0.0 else 'higher'} {quantity}"
    return Comparison(
        solver=solver,
        arm=arm,
        against=against,
        iteration=iteration,
        seeds=seeds,
        differences=differences,
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        confidence=confidence,
        outcome=outcome,
        reason=reason,
        diverged=diverged,
        quantity=quantity,
    )


@dataclass(frozen=True)
class Rivals:
    """What conclusions call the arms that a method is compared with.

    Attributes:
        plain: the arm without the method.
        global_rate: what the control does.
        control: the control as the subject of a sentence.
    """

    plain: str = "the plain solver"
    global_rate: str = "a larger global rate"
    control: str = "the same mean factor as a global rate"


DEFAULT_RIVALS = Rivals()


def conclusion(plain: Comparison, control: Comparison, rivals: Rivals = DEFAULT_RIVALS) -> str:
    """Say what the two comparisons of one method mean together.

    Args:
        plain: the method against the plain arm.
        control: the method against the control, which does the same to every layer.
        rivals: what these two are called.

    Returns:
        One or two sentences; never more than the intervals show.
    """
    if max(len(plain.differences), len(control.differences)) < MINIMUM_PAIRS:
        return f"Too few runs to tell: fewer than {MINIMUM_PAIRS} pairs are finished."
    if plain.better and control.better:
        return f"The gain is more than that of {rivals.global_rate}: it beats {rivals.plain} and the control."
    if plain.better and control.outcome == NONE:
        return (
            f"It beats {rivals.plain} but not the control: "
            f"the gain is not shown to be more than that of {rivals.global_rate}."
        )
    if control.worse:
        beats = f"It beats {rivals.plain}, but" if plain.better else "Here"
        return f"{beats} {rivals.control} does better."
    if plain.worse:
        return f"It does worse than {rivals.plain}."
    if control.better:
        return f"It beats the control, but is not shown to beat {rivals.plain}."
    return f"These runs do not show that the method changes the {plain.quantity}."


def confidence_note(family: int, seeds: int) -> str:
    """Say how the intervals were made.

    Args:
        family: number of comparisons planned together.
        seeds: number of pairs planned for each.

    Returns:
        One sentence.
    """
    confidence = 100.0 * (1.0 - ALPHA / family)
    return (
        f"Intervals: Student's t on the differences paired by seed ({seeds} seeds planned), "
        f"{confidence:.2f} % each, so that all {family} comparisons hold at once with 95 % (Bonferroni)."
    )
