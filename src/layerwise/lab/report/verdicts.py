"""What is judged: each method against each arm that the plan compares it with, and one sentence on all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.lab.experiments.plan import RATES, Arm, Role
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.words import capital, item_of, item_words, last_step, place_words, value_words
from layerwise.lab.stats.comparison import ALPHA, MINIMUM_PAIRS, Comparison
from layerwise.lab.stats.wording import counted, decimals_of, listed, probability, signed

NAMED = 4  # most methods that the sentence names; more are counted
LONGEST = 90  # letters of names in the sentence; longer ones are left to the table

FIRST: dict[Role, int] = {"plain": 0, "method": 1, "control": 2}
"""With what a method is compared first: its plain arm, else another method, else a control."""


@dataclass(frozen=True)
class Verdict:
    """A method, which is an arm or a group of arms, against another at the plan's last column."""

    subject: str
    subject_words: str
    item: str
    words: str
    against: str  # words of the other arm or group
    role: Role  # of the other
    comparisons: tuple[tuple[str, Comparison], ...]  # of a group one for each value, else one with the value ""
    grouped: bool
    first: bool  # against what the method is compared with first
    global_rate: bool = False  # whether the other is plain training at a mean factor

    @property
    def better(self) -> list[str]:
        """Values at which the method is shown to be better; ``[""]`` without a group."""
        return [value for value, each in self.comparisons if each.better]

    @property
    def worse(self) -> list[str]:
        """Values at which it is shown to be worse."""
        return [value for value, each in self.comparisons if each.worse]

    @property
    def alone(self) -> Comparison | None:
        """The comparison, if there is only one."""
        return self.comparisons[0][1] if len(self.comparisons) == 1 else None

    def answer(self, *, named: bool = False) -> str:
        """``YES``: shown to be better; ``no``: worse; ``unclear``: neither. Of a group at how many values, or which."""
        shown = {word: values for word, values in (("YES", self.better), ("no", self.worse)) if values}
        if not shown:
            return "unclear"
        if self.alone:
            return next(iter(shown))
        if named:
            return ", ".join(f"{word} at {listed(values)}" for word, values in shown.items())
        return ", ".join(f"{word} at {len(values)}" for word, values in shown.items()) + f" of {len(self.comparisons)}"

    def difference(self, *, whole: bool = True) -> tuple[str, str]:
        """Write the mean difference, of a group the lowest and the highest, and the interval or "".

        Without the interval, the number of decimals follows from the mean alone.
        """
        means = sorted(each.mean for _, each in self.comparisons if each.mean is not None)
        ends = [end for end in (self.alone.low, self.alone.high) if end is not None] if self.alone and whole else []
        decimals = decimals_of([*means, *ends])
        words = " to ".join(signed(mean, decimals) for mean in dict.fromkeys([*means[:1], *means[-1:]]))
        interval = ", ".join(signed(end, decimals) if end else "0" for end in ends)
        return words, f"[{interval}]" if ends else ""

    @property
    def remarks(self) -> str:
        """What keeps the difference of a single comparison from being called, in brackets."""
        each = self.alone
        if each is None:
            return ""
        found = [counted(len(each.seeds), "pair")] if len(each.seeds) < MINIMUM_PAIRS else []
        if each.low is not None and each.high is not None and each.adjusted_p is not None:
            beyond = each.low * each.high > 0
            found += [f"p {probability(each.adjusted_p, ALPHA)}"] if beyond and each.adjusted_p >= ALPHA else []
        if each.diverged or each.diverged_against:
            found.append(f"diverged: {len(each.diverged)} against {len(each.diverged_against)}")
        return f"({', '.join(found)})" if found else ""

    def split(self) -> list[Verdict]:
        """Give a verdict for each value of a group, named by it."""
        if not self.grouped:
            return [self]
        return [
            replace(self, words=f"{self.words} at {value}", comparisons=((value, each),))
            for value, each in self.comparisons
        ]


def verdicts(results: Results) -> list[Verdict]:
    """Give what is judged, groups of arms together, in the plan's order."""
    return results.once(_verdicts)


def _verdicts(results: Results) -> list[Verdict]:
    plan, step = results.plan, last_step(results.plan)
    words = {arm.name: arm.words for arm in plan.arms} | item_words(plan)
    made: list[Verdict] = []
    for subject in plan.subjects:
        found: dict[str, dict[str, list[tuple[Arm, Arm, Comparison]]]] = {}
        for arm in plan.arms_of(subject.name):
            for name, column, each in results.compared.get((subject.name, arm.name), ()):
                if column == step:
                    other = results.arms[name]
                    against = item_of(other) if arm.group else other.name  # groups are compared value by value
                    found.setdefault(item_of(arm), {}).setdefault(against, []).append((arm, other, each))
        for item, others in found.items():
            first = min(others.values(), key=lambda rows: FIRST[rows[0][1].kind])
            for against, rows in others.items():
                verdict = Verdict(
                    subject=subject.name,
                    subject_words=subject.words,
                    item=item,
                    words=words[item],
                    against=words[against],
                    role=rows[0][1].kind,
                    comparisons=tuple((value_words(arm.value) if arm.group else "", each) for arm, _, each in rows),
                    grouped=bool(rows[0][0].group),
                    first=rows is first,
                    global_rate=rows[0][1].control in RATES,
                )
                made.append(verdict)
    return made


@dataclass(frozen=True)
class Standing:
    """What a method is on a subject, where every arm was tuned, in one of four fixed words."""

    subject: str
    subject_words: str
    item: str
    words: str
    word: str  # "helps", "a larger rate", "hurts" or "not shown"


MEANINGS = (
    "helps: better than tuned plain training, and than plain training at every mean factor of the method. "
    "a larger rate: better than tuned plain training, but not shown to be better than that at a mean factor. "
    "hurts: worse than tuned plain training. not shown: none of these."
)


def standings(results: Results) -> list[Standing]:
    """Give what each method is on each subject; empty where the arms were not tuned."""
    if results.plan.tuning is None:
        return []
    of: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts(results):
        arm = results.arms.get(verdict.item)  # None of a group
        if arm is not None and arm.kind == "method" and arm.rule is not None:
            of.setdefault((verdict.subject, verdict.item), []).append(verdict)
    return [
        Standing(subject, own[0].subject_words, item, own[0].words, standing(own))
        for (subject, item), own in of.items()
    ]


def standing(own: Sequence[Verdict]) -> str:
    """Give the word for a method's verdicts on a subject; without a mean factor nothing is shown of a better one."""
    plain = [each for each in own if each.role == "plain"]
    rates = [each for each in own if each.global_rate]
    if plain and rates and all(map(_beaten, plain)):
        return "helps" if all(map(_beaten, rates)) else "a larger rate"
    return "hurts" if any(map(_lost, plain)) else "not shown"


def _beaten(verdict: Verdict) -> bool:
    """Tell whether the other is shown to be worse: by the comparison, or since it diverged in every run."""
    each = verdict.alone
    return each is not None and (each.better or _diverged_always(each, each.diverged_against, each.diverged))


def _lost(verdict: Verdict) -> bool:
    """Tell whether the method is shown to be worse: by the comparison, or since it diverged in every run."""
    each = verdict.alone
    return bool(verdict.worse) or (each is not None and _diverged_always(each, each.diverged, each.diverged_against))


def _diverged_always(each: Comparison, diverged: Sequence[int], other: Sequence[int]) -> bool:
    return each.runs >= MINIMUM_PAIRS and len(diverged) == each.runs and not other


def headline(outcome: Outcome) -> str:
    """Say in one sentence what the comparisons show, and never more."""
    plan, found = outcome.plan, verdicts(outcome.results)
    if not outcome.results.records:
        return "No run is finished yet."
    if not found:
        return "Nothing was planned to be compared."
    place, quantity = capital(place_words(plan)), plan.quantity.words
    compared = [each for verdict in found for _, each in verdict.comparisons]
    if max(len(each.seeds) for each in compared) < MINIMUM_PAIRS:
        seeds = len(plan.seeds)
        if seeds >= MINIMUM_PAIRS:
            ran = max(each.runs for each in compared)
            few = "pairs are without a diverged run" if ran >= MINIMUM_PAIRS else "runs are finished"
            return f"{place}, too few {few} to compare the {quantity}."
        many = f"{seeds} seeds are" if seeds > 1 else "1 seed is"
        return f"{place}, {many} too few to show a difference in {quantity}; it takes {MINIMUM_PAIRS}."
    ways = ("higher", "lower") if plan.quantity.higher_is_better else ("lower", "higher")
    firsts = [verdict for verdict in found if verdict.first]
    others = {verdict.against for verdict in firsts}
    than = others.pop() if len(others) == 1 else "what they are compared with"
    better = [(verdict, verdict.better) for verdict in firsts if verdict.better]
    words = f"{place}, {_count(firsts, better)} a {ways[0]} {quantity} than {than}"
    beyond = [answer for verdict, _ in better if (answer := _beats_controls(found, verdict)) is not None]
    if beyond:
        count = sum(beyond)
        words += f", and {count or 'none'} {'beat' if count > 1 else 'beats'} every control"
    elif better:
        words += ", without a control to tell why"
    worse = [(verdict, verdict.worse) for verdict in firsts if verdict.worse]
    if worse:
        words += f"; {_count(firsts, worse)} a {ways[1]} one"
    return f"{words}."


def _beats_controls(found: Sequence[Verdict], first: Verdict) -> bool | None:
    """Tell whether a method beats its controls too at a value where it is better; None without a control."""
    method = [verdict for verdict in found if (verdict.subject, verdict.item) == (first.subject, first.item)]
    controls = [each for each in method if each.role == "control" and not each.first]
    at = {value: [each for one in controls for own, each in one.comparisons if own == value] for value in first.better}
    return any(rows and all(each.better for each in rows) for rows in at.values()) if controls else None


def _count(found: Sequence[Verdict], chosen: Sequence[tuple[Verdict, Sequence[str]]]) -> str:
    """Count the methods of which something is shown, and name them, with how many values, if they are few."""
    names = {verdict.words for verdict in found}
    if not chosen:
        return f"{found[0].words} shows no sign of" if len(found) == 1 else f"none of {len(found)} comparisons shows"
    count = f"{len(chosen)} of {len(found)} comparisons {'shows' if len(chosen) == 1 else 'show'}"
    if len(chosen) > NAMED:
        return count
    several = len({verdict.subject for verdict in found}) > 1
    told: list[str] = []
    for verdict, values in chosen:
        name = f"{verdict.words} ({verdict.subject_words})" if several else verdict.words
        told.append(f"{name} at {len(values)} of {len(verdict.comparisons)} values" if verdict.grouped else name)
    if len(names) == 1 and several:
        told = [f"{found[0].words} with {listed([verdict.subject_words for verdict, _ in chosen])}"]
        told[0] += " at some values" if any(verdict.grouped for verdict, _ in chosen) else ""
    named = f" {listed(told)} to have"
    return count + (named if len(named) <= LONGEST else "")


def note(family: int, seeds: int) -> str:
    """Say how the intervals of ``family`` comparisons over so many planned seeds were made."""
    correction = f" after Holm's correction over {family} comparisons" if family > 1 else ""
    # The table in layerwise.lab.stats.bootstrap: 0.92 at n = 5 where the interval and the p-value together reach 0.95.
    narrow = " With fewer than 7 pairs the intervals are too narrow (about 92 % at 5); the p-value makes up for it."
    return (
        "Intervals: 95 % bootstrap (expanded percentile) of the mean difference, paired by seed "
        f"({counted(seeds, 'seed')} planned), each by itself. A difference is called where "
        f"there are at least {MINIMUM_PAIRS} pairs, the interval leaves out 0 and Student's paired t has p < {ALPHA}"
        f"{correction}."
    ) + (narrow if seeds < 7 else "")
