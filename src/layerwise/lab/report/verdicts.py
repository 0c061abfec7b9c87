"""What is judged of each arm, or group of arms, on each subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerwise.lab.experiments.plan import Arm
from layerwise.lab.experiments.results import Results
from layerwise.lab.report.words import capital, item_of, last_step, value_words
from layerwise.lab.stats.comparison import MINIMUM_PAIRS, NONE, Comparison
from layerwise.lab.stats.conclusions import conclusion
from layerwise.lab.stats.wording import decimals_of, listed, signed


@dataclass(frozen=True)
class Compared:
    """The comparisons of one arm at the last column, by what the other arm is to it.

    Attributes:
        first: with the plain arm that it names first; with its first rival, or control, where it names none.
        controls: with what asks what a gain is made of.
        rivals: with what is neither, as another method or a plain arm of another length.
    """

    first: Comparison
    controls: tuple[Comparison, ...] = ()
    rivals: tuple[tuple[Arm, Comparison], ...] = ()

    @property
    def all(self) -> tuple[Comparison, ...]:
        """Every one, the first one first."""
        return (self.first, *self.controls, *(each for _, each in self.rivals))


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
    return results.once(_verdicts)


def _verdicts(results: Results) -> list[Verdict]:
    plan, found = results.plan, []
    for subject in plan.subjects:
        items: dict[str, list[Arm]] = {}
        for arm in plan.arms_of(subject.name):
            if _compared(results, subject.name, arm) is not None:
                items.setdefault(item_of(arm), []).append(arm)
        for members in items.values():
            judge = _judged_group if members[0].group else _judged_arm
            found.append(judge(results, subject.name, members))
    return found


def _compared(results: Results, subject: str, arm: Arm) -> Compared | None:
    """Sort the comparisons of an arm at the last column; None where it has none."""
    step = last_step(results.plan)
    arms = results.arms
    found = [
        (arms[other], each) for other, column, each in results.compared.get((subject, arm.name), ()) if column == step
    ]
    if not found:
        return None
    # The arm's own plain arm: the first one that it names, which need not be the subject's first.
    order = {"plain": 0, "method": 1, "control": 2}
    first = min(range(len(found)), key=lambda place: order[found[place][0].kind])
    rest = [pair for place, pair in enumerate(found) if place != first]
    return Compared(
        first=found[first][1],
        controls=tuple(each for other, each in rest if other.kind == "control"),
        rivals=tuple((other, each) for other, each in rest if other.kind != "control"),
    )


def _all_of(results: Results, subject: str, members: Sequence[Arm]) -> tuple[Comparison, ...]:
    return tuple(each for arm in members for _, _, each in results.compared.get((subject, arm.name), ()))


def _judged_arm(results: Results, subject: str, members: Sequence[Arm]) -> Verdict:
    """Judge one arm against the plain one, its controls and its rivals."""
    (arm,) = members
    found = _compared(results, subject, arm)
    assert found is not None
    beats = (arm.words,) if found.first.better else ()
    beyond = beats if all(each.better for each in found.controls) else ()
    words = [conclusion(found.first, found.controls), *(_rival_words(each) for _, each in found.rivals)]
    return Verdict(
        subject=subject,
        subject_words=results.plan.subject(subject).words,
        words=arm.words,
        item=arm.name,
        conclusion=" ".join(words),
        rows=tuple((f"against {each.against}", each) for each in found.all),
        comparisons=_all_of(results, subject, members),
        beats_plain=beats,
        beats_all=beyond if found.controls else None,
        does_worse=(arm.words,) if found.first.worse else (),
    )


def _rival_words(each: Comparison) -> str:
    """Say what the comparison with another method, or another plain arm, shows."""
    if len(each.seeds) < MINIMUM_PAIRS:
        words = f"Against {each.against} there are too few pairs to tell."
    elif each.outcome == NONE:
        words = f"Against {each.against} no difference is shown."
    else:
        words = f"Against {each.against} it has a {each.outcome}."
    if each.diverged or each.diverged_against:
        words += (
            f" Of {each.runs} seeds it diverged in {len(each.diverged)}, {each.against} in "
            f"{len(each.diverged_against)}."
        )
    return words


def _judged_group(results: Results, subject: str, members: Sequence[Arm]) -> Verdict:
    """Judge the arms of a group, each against the same other arm."""
    rows = [
        (value_words(arm.value) or arm.words, found)
        for arm in members
        if (found := _compared(results, subject, arm)) is not None
    ]
    firsts = [(label, found.first) for label, found in rows]
    better = tuple(label for label, each in firsts if each.better)
    controlled = [(label, found) for label, found in rows if found.controls]
    beyond = tuple(label for label, found in controlled if all(each.better for each in (found.first, *found.controls)))
    return Verdict(
        subject=subject,
        subject_words=results.plan.subject(subject).words,
        words=members[0].group,
        item=members[0].group,
        conclusion=" ".join([_group_conclusion(firsts, beyond if controlled else None), *_group_rivals(rows)]),
        rows=tuple(firsts),
        comparisons=_all_of(results, subject, members),
        beats_plain=better,
        beats_all=beyond if controlled else None,
        does_worse=tuple(label for label, each in firsts if each.worse),
        grouped=True,
    )


def _group_rivals(rows: Sequence[tuple[str, Compared]]) -> Iterator[str]:
    """Say what the comparisons of a group's arms with each rival show, the arms of another group taken together."""
    rivals: dict[str, list[tuple[str, Comparison]]] = {}
    for label, found in rows:
        for other, each in found.rivals:
            name = f"“{other.group}” at the same value" if other.group else other.words
            rivals.setdefault(name, []).append((label, each))
    for name, found in rivals.items():
        told = [(label, each) for label, each in found if len(each.seeds) >= MINIMUM_PAIRS]
        if not told:
            yield f"Against {name} there are too few pairs to tell."
            continue
        shown: dict[str, list[str]] = {}
        for label, each in told:
            if each.outcome != NONE:
                shown.setdefault(each.outcome, []).append(label)
        where = f"Of {len(told)} values" if len(told) > 1 else f"At {told[0][0]}"
        parts = [f"it has a {outcome} at {listed(labels)}" for outcome, labels in shown.items()]
        if len(told) == 1:
            parts = [f"it has a {outcome}" for outcome in shown]
        ends = listed(parts) if parts else "no difference is shown" + " at any" * (len(told) > 1)
        yield f"{where}, compared with {name}, {ends}."


def _group_conclusion(firsts: Sequence[tuple[str, Comparison]], beyond: Sequence[str] | None) -> str:
    """Say what the comparisons of a group's arms with the plain arm mean together."""
    each = firsts[0][1]
    if max(len(comparison.seeds) for _, comparison in firsts) < MINIMUM_PAIRS:
        ran = max(comparison.runs for _, comparison in firsts)
        pairs = "pairs are without a diverged run" if ran >= MINIMUM_PAIRS else "pairs are finished"
        return f"Too few runs to tell: fewer than {MINIMUM_PAIRS} {pairs}."
    better = [label for label, comparison in firsts if comparison.better]
    worse = [label for label, comparison in firsts if comparison.worse]
    count = len(firsts)
    if count == 1:
        words = f"At {firsts[0][0]}, the one value that is judged, it "
        words += (
            f"beats {each.against}."
            if better
            else f"does worse than {each.against}."
            if worse
            else (f"is not shown to differ from {each.against} in its {each.quantity}.")
        )
    elif not better and not worse:
        words = f"None of {count} values is shown to differ from {each.against} in its {each.quantity}."
    else:
        parts = [f"it beats {each.against} at {listed(better)}"] if better else []
        parts += [f"it does worse at {listed(worse)}"] if worse else []
        words = f"Of {count} values, {listed(parts)}."
    if better and beyond is not None:
        if count == 1:
            words += " It beats the controls too." if beyond else " That is not shown to be more than its controls."
        elif beyond:
            words += f" It beats the controls too at {listed(beyond)}."
        else:
            words += " At none is that shown to be more than its controls."
    diverged = sum(len(comparison.diverged) for _, comparison in firsts)
    return f"{words} {diverged} of its runs diverged." if diverged else words


@dataclass(frozen=True)
class Line:
    """One line of the verdict table.

    Attributes:
        subject: in words.
        item: the arm or group whose colour it has.
        method: in words, of a group with its value.
        against: the arm that it is compared with, in words.
        answer: whether the method is better: ``"yes"``, ``"no"`` where it is worse, or ``"unclear"``.
        difference: mean of the differences.
        interval: its 95 % interval, or "–".
        pairs: number of pairs.
        sentence: the whole comparison in words.
    """

    subject: str
    item: str
    method: str
    against: str
    answer: str
    difference: str
    interval: str
    pairs: int
    sentence: str


def verdict_lines(results: Results) -> list[Line]:
    """Give every comparison at the plan's last column as a line of a table, in the plan's order."""
    plan, step, found = results.plan, last_step(results.plan), []
    for subject in plan.subjects:
        for arm in plan.arms_of(subject.name):
            for _, column, each in results.compared.get((subject.name, arm.name), ()):
                if column != step:
                    continue
                numbers = [number for number in (each.mean, each.low, each.high) if number is not None]
                decimals = decimals_of(numbers)
                interval = "–"
                if each.low is not None and each.high is not None:
                    interval = f"[{signed(each.low, decimals)}, {signed(each.high, decimals)}]"
                line = Line(
                    subject=subject.words,
                    item=item_of(arm),
                    method=f"{arm.group} at {value_words(arm.value)}" if arm.group else arm.words,
                    against=each.against,
                    answer="yes" if each.better else "no" if each.worse else "unclear",
                    difference="–" if each.mean is None else signed(each.mean, decimals),
                    interval=interval,
                    pairs=len(each.seeds),
                    sentence=capital(each.sentence),
                )
                found.append(line)
    return found
