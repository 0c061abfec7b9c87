"""What is judged of each arm, or group of arms, on each subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.lab.arms import Arm
from layerwise.lab.judgement import MINIMUM_PAIRS, Comparison, conclusion
from layerwise.lab.report.words import item_of, last_step, listed, plain_arm, value_words
from layerwise.lab.results import Results


@dataclass(frozen=True)
class Verdict:
    """What is judged of one arm, or of one group of arms, on one subject.

    Attributes:
        subject: name of the subject.
        subject_words: of it, for people.
        words: of the arm or the group.
        item: name of the group, or of the arm where it has none.
        conclusion: in words.
        rows: label and comparison at the plan's last column, as they are drawn.
        comparisons: all of them, at every column and against every arm.
        beats_plain: names of what is better than the plain arm: the arm, or values of the group.
        beats_all: of these, what is better than every control too; None where no control was planned.
        does_worse: names of what is worse than the plain arm.
        grouped: it is of a group of arms.
    """

    subject: str
    subject_words: str
    words: str
    item: str
    conclusion: str
    rows: tuple[tuple[str, Comparison], ...]
    comparisons: tuple[Comparison, ...]
    beats_plain: tuple[str, ...]
    beats_all: tuple[str, ...] | None
    does_worse: tuple[str, ...]
    grouped: bool = False

    @property
    def worse(self) -> bool:
        """Something of it is shown to be worse than the plain arm."""
        return bool(self.does_worse)

    @property
    def pairs(self) -> int:
        """The largest number of pairs of a comparison at the last column."""
        return max((len(comparison.seeds) for _, comparison in self.rows), default=0)


def verdicts(results: Results) -> list[Verdict]:
    """Judge every arm, or group of arms, that the plan compares with others.

    Args:
        results: the finished runs.

    Returns:
        One verdict a subject and arm, groups of arms together, in the plan's order.
    """
    plan, found = results.plan, []
    for subject in plan.subjects:
        arms = [arm for arm in plan.arms_of(subject.name) if any(True for _ in _against(results, subject.name, arm))]
        for item in dict.fromkeys(item_of(arm) for arm in arms):
            members = [arm for arm in arms if item_of(arm) == item]
            judge = _judged_group if members[0].group else _judged_arm
            found.append(judge(results, subject.name, members))
    return found


def _against(results: Results, subject: str, arm: Arm) -> dict[str, Comparison]:
    """Give the comparisons of an arm at the last column: name of the other arm -> comparison, the plain one first."""
    plan, step = results.plan, last_step(results.plan)
    plain = plain_arm(plan, subject)
    found = {
        other.name: results.comparisons()[subject, arm.name, other.name, step]
        for name, one, other in plan.pairs()
        if name == subject and one.name == arm.name
    }
    if plain is not None and plain.name in found:
        return {plain.name: found[plain.name], **found}
    return found


def _all_of(results: Results, subject: str, members: Sequence[Arm]) -> tuple[Comparison, ...]:
    names = {arm.name for arm in members}
    return tuple(
        comparison
        for (place, arm, _, _), comparison in results.comparisons().items()
        if place == subject and arm in names
    )


def _judged_arm(results: Results, subject: str, members: Sequence[Arm]) -> Verdict:
    """Judge one arm against the plain one and its controls."""
    (arm,) = members
    first, *controls = _against(results, subject, arm).values()
    beats = (arm.words,) if first.better else ()
    return Verdict(
        subject=subject,
        subject_words=results.plan.subject(subject).words,
        words=arm.words,
        item=arm.name,
        conclusion=conclusion(first, controls),
        rows=tuple((f"against {each.against}", each) for each in (first, *controls)),
        comparisons=_all_of(results, subject, members),
        beats_plain=beats,
        beats_all=(beats if all(each.better for each in controls) else ()) if controls else None,
        does_worse=(arm.words,) if first.worse else (),
    )


def _judged_group(results: Results, subject: str, members: Sequence[Arm]) -> Verdict:
    """Judge the arms of a group, each against the same other arm."""
    rows = [(value_words(arm.value) or arm.words, _against(results, subject, arm)) for arm in members]
    firsts = [(label, next(iter(found.values()))) for label, found in rows]
    better = tuple(label for label, each in firsts if each.better)
    controlled = [(label, found) for label, found in rows if len(found) > 1]
    beyond = tuple(label for label, found in controlled if all(each.better for each in found.values()))
    return Verdict(
        subject=subject,
        subject_words=results.plan.subject(subject).words,
        words=members[0].group,
        item=members[0].group,
        conclusion=_group_conclusion(firsts, beyond if controlled else None),
        rows=tuple(firsts),
        comparisons=_all_of(results, subject, members),
        beats_plain=better,
        beats_all=beyond if controlled else None,
        does_worse=tuple(label for label, each in firsts if each.worse),
        grouped=True,
    )


def _group_conclusion(firsts: Sequence[tuple[str, Comparison]], beyond: Sequence[str] | None) -> str:
    """Say what the comparisons of a group's arms with the plain arm mean together."""
    each = firsts[0][1]
    if max(len(comparison.seeds) for _, comparison in firsts) < MINIMUM_PAIRS:
        return f"Too few runs to tell: fewer than {MINIMUM_PAIRS} pairs are finished."
    better = [label for label, comparison in firsts if comparison.better]
    worse = [label for label, comparison in firsts if comparison.worse]
    count = len(firsts)
    if not better and not worse:
        words = f"None of {count} values is shown to differ from {each.against} in its {each.quantity}."
    else:
        parts = [f"it beats {each.against} at {listed(better)}"] if better else []
        parts += [f"it does worse at {listed(worse)}"] if worse else []
        words = f"Of {count} values, {listed(parts)}."
    if better and beyond is not None:
        words += (
            f" It beats the controls too at {listed(beyond)}." if beyond else " At none is that more than its controls."
        )
    diverged = sum(len(comparison.diverged) for _, comparison in firsts)
    return f"{words} {diverged} of its runs diverged." if diverged else words
