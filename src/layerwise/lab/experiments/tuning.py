"""Tuning: before a comparison every arm tries as many settings as any other, on validation data and seeds of its own.

What is tuned lies on a ``Bench``: a user's own task, or a recipe. Rounds of trials follow one another, each the plan of
all trials so far, so that a tuning that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import FACTORS_ALONE, Arm, Plan, Subject, Trial, Tuned, Tuning
from layerwise.lab.experiments.results import Results
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.runs.values import Value
from layerwise.lab.stats.wording import counted

FIRST_SEED = 10_000
"""Above every seed of a comparison, which are below ``plan.LARGEST_SEEDS``: what was tuned on is never judged on."""

SEEDS = 2
LARGEST_GRID = 1000
EXTENSIONS = 3
"""Steps beyond its grid that an arm may take on a subject, one after another."""

DIGITS = 4  # of a value of a range, so that it is written as it is
RATIOS = "ratios"  # of a setting: the multipliers of roles that it has drawn, an argument of the arm's rule

Setting = Mapping[str, Any]
Grid = Mapping[str, Sequence[Value] | str]
"""Parameter -> values, or a range "low:high:count", and "low:high" where settings are drawn."""


# --- What is tried ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Values of one parameter from ``low`` to ``high``, each the same multiple of the one before; or to be drawn."""

    low: float
    high: float
    count: int | None = None
    whole: bool = False  # whether the values are whole numbers

    @property
    def ratio(self) -> float:
        """A value by the one before."""
        return (self.high / self.low) ** (1.0 / ((self.count or 2) - 1))

    def values(self) -> tuple[float, ...]:
        """Give the values: low · ratio^k; whole numbers once each."""
        return tuple(dict.fromkeys(self._fit(self.low * self.ratio**place) for place in range(self.count or 0)))

    def draw(self, source: random.Random) -> float:
        """Draw one, its logarithm uniform."""
        return self._fit(math.exp(source.uniform(math.log(self.low), math.log(self.high))))

    def _fit(self, value: float) -> float:
        return round(value) if self.whole else rounded(value)


def rounded(value: float) -> float:
    """Keep so many digits that the value can be typed."""
    return float(f"{value:.{DIGITS}g}")


def range_of(name: str, given: object) -> Range | None:
    """Read "low:high" or "low:high:count"; None for anything else."""
    parts = str(given).split(":")
    if not isinstance(given, str) or len(parts) not in (2, 3):
        return None
    try:
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2]) if len(parts) == 3 else None
    except ValueError:
        return None
    if not (0.0 < low < high < math.inf) or (count is not None and not 2 <= count <= LARGEST_GRID):
        raise UsageError(
            f"tune {name}={given!r}: a range is LOW:HIGH:COUNT with 0 < LOW < HIGH and a COUNT from 2 to "
            f"{LARGEST_GRID}, as {name}=1e-3:1e1:9"
        )
    return Range(low, high, count)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings that an arm tries first, in order."""

    settings: tuple[Setting, ...]
    words: str
    ratios: Mapping[str, float] = field(default_factory=dict)  # parameter -> step of its range, by which it is extended


def space_of(
    grid: Grid, draws: int | None = None, check: Callable[[Setting], object] = dict, whole: Sequence[str] = ()
) -> Space:
    """Give every combination of a grid's values, the last parameter first to change, or so many draws of its ranges.

    ``check`` refuses a value of a parameter; those named in ``whole`` are whole numbers. The draws depend on nothing
    but the names and their number, so that every arm has the same.
    """
    values = {name: _values_of(name, given, check, name in whole) for name, given in grid.items()}
    for name, each in values.items():
        if isinstance(each, Range):
            _check_count(name, each, draws)
    if draws is not None:
        if not 1 <= draws <= LARGEST_GRID:
            raise UsageError(f"tune random:{draws}: must be from 1 to {LARGEST_GRID} draws")
        settings = tuple({name: _drawn(name, each, n) for name, each in values.items()} for n in range(draws))
        words = "; ".join(_words(name, each) for name, each in values.items())
        return Space(settings=settings, words=f"{draws} draws of {words}")
    rows = {name: each.values() if isinstance(each, Range) else each for name, each in values.items()}
    count = math.prod(map(len, rows.values()))
    if count > LARGEST_GRID:
        raise UsageError(f"tune has {count} settings: must be at most {LARGEST_GRID}; give fewer values")
    return Space(
        settings=tuple(dict(zip(rows, row, strict=True)) for row in product(*rows.values())),
        words="; ".join(_words(name, row) for name, row in rows.items()),
        ratios={name: each.ratio for name, each in values.items() if isinstance(each, Range) and not each.whole},
    )


def _values_of(
    name: str, given: Sequence[Value] | str, check: Callable[[Setting], object], whole: bool
) -> Range | tuple[Value, ...]:
    """Read what a parameter is to be, and refuse what it cannot be."""
    listed = [given] if isinstance(given, str) else list(given)
    found = range_of(name, listed[0]) if len(listed) == 1 else None
    if found is None:
        if isinstance(given, str) or not listed:
            example = f"{name}=0.01,0.03,0.1 or {name}=1e-3:1:7"
            raise UsageError(f"tune {name}={given!r}: give a list of values, as {example}")
        for value in listed:
            check({name: value})
        return tuple(dict.fromkeys(listed))
    for end in (found.low, found.high):
        check({name: round(end) if whole else end})
    return replace(found, whole=whole)


def _check_count(name: str, each: Range, draws: int | None) -> None:
    """Refuse a range without a number of values, or with one where values are drawn."""
    ends = f"{name}={each.low:g}:{each.high:g}"
    if draws is None and each.count is None:
        raise UsageError(f"tune {ends} has no number of values: write {ends}:9, or add random:N")
    if draws is not None and each.count is not None:
        raise UsageError(f"tune {ends}:{each.count} has a number of values: write {ends}, of which values are drawn")


def _drawn(name: str, each: Range | tuple[Value, ...], number: int) -> Value:
    """Draw the value of a setting, from 0."""
    source = random.Random(f"setting {number} {name}")
    return each.draw(source) if isinstance(each, Range) else source.choice(each)


def _words(name: str, each: Range | Sequence[Value]) -> str:
    if isinstance(each, Range):
        return f"{name} from {each.low:g} to {each.high:g}"
    return f"{name} of {', '.join(map(value_words, each))}"


def with_ratios(space: Space, arm: Arm, arms: Sequence[Arm]) -> Space:
    """Let an arm of ``arms`` that searches draw the multipliers of its roles in each trial, and its controls the same.

    Other arms have the space as it is. Logarithms are uniform between those of ``low`` and ``high``, less their mean:
    the geometric mean is 1.
    """
    search = next((one.search for one in arms if one.name == (arm.of or arm.name)), None)
    if search is None:
        return space
    roles, low, high = search["roles"], search.get("low", 0.125), search.get("high", 8.0)

    def drawn(number: int) -> dict[str, float]:
        source = random.Random(f"multipliers {number}")
        logs = [source.uniform(math.log(low), math.log(high)) for _ in roles]
        return {
            role: rounded(math.exp(log - math.fsum(logs) / len(logs))) for role, log in zip(roles, logs, strict=True)
        }

    return replace(space, settings=tuple({**each, RATIOS: drawn(n)} for n, each in enumerate(space.settings)))


def setting_words(values: Setting) -> str:
    """Write values of parameters: "lr=0.01, weight_decay=0"."""
    return ", ".join(f"{name}={value_words(value)}" for name, value in values.items())


def value_words(value: Any) -> str:
    """Write a value, a number in its shortest form."""
    if isinstance(value, Mapping):
        return " ".join(f"{name} {value_words(each)}" for name, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def edges(setting: Setting, tried: Sequence[Setting]) -> list[str]:
    """Name the parameters whose value is the lowest or highest of several numbers; 0 has nothing below it."""
    found = []
    for name, value in setting.items():
        values = dict.fromkeys(each[name] for each in tried if not isinstance(each[name], Mapping))
        numbers = [each for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
        if len(numbers) < 2 or len(numbers) < len(values) or not isinstance(value, (int, float)):
            continue
        if value == max(numbers) or (value == min(numbers) and value != 0):
            found.append(name)
    return found


# --- Trials -----------------------------------------------------------------------------------------------------------


class Bench(Protocol):
    """What is tuned."""

    @property
    def subjects(self) -> Sequence[Subject]:
        """What all arms are tried on."""
        ...

    def arms_of(self, subject: str) -> Sequence[Arm]:
        """List the arms that are compared on a subject."""
        ...

    def space(self, subject: str, arm: Arm) -> Space:
        """Give what an arm tries first on a subject; every arm as many settings."""
        ...

    def trials(self, pairs: Sequence[tuple[Subject, Subject, Arm]], arms: Sequence[Arm], seeds: Sequence[int]) -> Plan:
        """Plan runs that see validation data alone: subject, that of a setting, and the arm at this setting."""
        ...

    def comparison(self, tuner: Tuner) -> Plan:
        """Plan the comparison of what was chosen."""
        ...


class Tuner:
    """The trials of a bench, round by round, and what is chosen by them."""

    def __init__(self, bench: Bench, seeds: int = SEEDS, extensions: int = EXTENSIONS) -> None:
        self.bench, self.extensions = bench, extensions
        self.seeds = tuple(range(FIRST_SEED, FIRST_SEED + seeds))
        self.spaces = {(one.name, arm.name): bench.space(one.name, arm) for one, arm in self._all()}
        counts = {len(space.settings) for space in self.spaces.values()}
        if len(counts) > 1:
            raise UsageError(
                f"arms have {' and '.join(map(str, sorted(counts)))} settings: give each as many as the others"
            )
        self.tried = {key: list(space.settings) for key, space in self.spaces.items()}
        self.outcome: Outcome | None = None

    def _all(self) -> Iterator[tuple[Subject, Arm]]:
        for subject in self.bench.subjects:
            for arm in self.bench.arms_of(subject.name):
                yield subject, arm

    @property
    def count(self) -> int:
        """Settings that every arm tries first."""
        return len(next(iter(self.spaces.values())).settings)

    @property
    def results(self) -> Results:
        """The finished runs of the trials."""
        assert self.outcome is not None
        return self.outcome.results

    def name_of(self, subject: Subject, setting: Setting) -> str:
        """Name a subject at a setting; of a single one the setting is enough."""
        return f"{subject.name} {setting_words(setting)}" if len(self.bench.subjects) > 1 else setting_words(setting)

    def plan(self) -> Plan:
        """Plan all trials so far. A control's method runs at the control's settings too, for its factors alone."""
        pairs: dict[tuple[str, str], tuple[Subject, Subject, Arm]] = {}
        for subject, arm in self._all():
            methods = [one for one in self.bench.arms_of(subject.name) if one.name == arm.of]
            for setting in self.tried[subject.name, arm.name]:
                name = self.name_of(subject, setting)
                words = setting_words(setting)
                at = replace(subject, name=name, words=f"{subject.words}, {words}" if name != words else words)
                for one in (*methods, arm):
                    pairs.setdefault((name, one.name), (subject, at, at_setting(one, setting)))
        ordered = sorted(pairs.values(), key=lambda pair: pair[2].control is not None)
        arms = dict.fromkeys(arm.name for _, arm in self._all())
        known = {arm.name: arm for _, arm in self._all()}
        names = dict.fromkeys(at.name for _, at, _ in pairs.values())
        shown = []
        for name in arms:
            having = tuple(at.name for _, at, arm in pairs.values() if arm.name == name)
            # Settings are not compared with one another.
            shown.append(replace(known[name], against=(), subjects=having if len(having) < len(names) else ()))
        return self.bench.trials(ordered, shown, self.seeds)

    def read(self, outcome: Outcome) -> bool:
        """Take in the outcome of a round; add what lies beyond the edges, and tell whether that is another round."""
        self.outcome = outcome
        found = False
        for subject, arm in self._all():
            key = (subject.name, arm.name)
            tried, left = self.tried[key], self.extensions - (len(self.tried[key]) - self.count)
            for further in self._beyond(subject, arm)[: max(0, left)]:
                tried.append(further)
                found = True
        return found

    def _beyond(self, subject: Subject, arm: Arm) -> list[Setting]:
        """Give the settings a step beyond the best one, for each parameter of which it is at the edge of a range.

        Where all diverged they are a step below the smallest.
        """
        key = (subject.name, arm.name)
        best, tried, ratios = self.chosen(*key), self.tried[key], self.spaces[key].ratios
        if not any(map(math.isfinite, self.scores(*key))):
            smallest = {name: rounded(min(each[name] for each in tried) / ratio) for name, ratio in ratios.items()}
            return [{**best, **smallest}] if smallest else []
        found = []
        for name in self._edges(subject, arm):
            if name in ratios:
                up = best[name] == max(each[name] for each in tried)
                further = {**best, name: rounded(best[name] * ratios[name] if up else best[name] / ratios[name])}
                found += [further] if further not in tried else []
        return found

    def _edges(self, subject: Subject, arm: Arm) -> list[str]:
        """Name the parameters of which the best setting is at the edge, unless one that is not at it is as good."""
        tried, scores = self.tried[subject.name, arm.name], self.scores(subject.name, arm.name)
        best = self.chosen(subject.name, arm.name)
        top = scores[tried.index(best)]
        equal = [each for each, score in zip(tried, scores, strict=True) if score == top and math.isfinite(score)]
        return [name for name in edges(best, tried) if all(name in edges(each, tried) for each in equal)]

    def scores(self, subject: str, arm: str) -> list[float]:
        """Give the mean validation of an arm at each setting; the worst of all where a seed diverged."""
        worst = -math.inf if self.results.plan.quantity.higher_is_better else math.inf
        of = next(one for one in self.bench.subjects if one.name == subject)
        found = []
        for setting in self.tried[subject, arm]:
            values = self.results.values(self.name_of(of, setting), arm)
            found.append(math.fsum(values.values()) / len(values) if len(values) == len(self.seeds) else worst)
        return found

    def chosen(self, subject: str, arm: str) -> Setting:
        """Give the best setting of an arm; of equal ones the first."""
        scores = self.scores(subject, arm)
        best = max if self.results.plan.quantity.higher_is_better else min
        return self.tried[subject, arm][scores.index(best(scores))]

    # --- In words ---

    def warnings(self, subject: Subject, arm: Arm) -> list[str]:
        """Say what makes a choice doubtful."""
        key, of = (subject.name, arm.name), f" on {subject.words}" if len(self.bench.subjects) > 1 else ""
        if not any(map(math.isfinite, self.scores(*key))):
            return [f"Warning: {arm.words}{of} diverged at every setting; the first one stands."]
        chosen, found = self.chosen(*key), []
        for name in self._edges(subject, arm):
            how = "though it was extended" if name in self.spaces[key].ratios else "so give more of them"
            where = f"{name}={value_words(chosen[name])}, at the edge of its values"
            found.append(f"Warning: {arm.words}{of} has {where}: better ones may lie beyond, {how}.")
        return found

    @property
    def choices(self) -> list[str]:
        """Say what was chosen, which grids were extended, and which choices are at the edge of what was tried."""
        several = len(self.bench.subjects) > 1
        notes = []
        for subject in self.bench.subjects:
            own = "; ".join(
                f"{arm.words}: {setting_words(self.chosen(subject.name, arm.name))}"
                for arm in self.bench.arms_of(subject.name)
            )
            notes.append(f"Chosen{f' for {subject.words}' if several else ''}: {own}.")
        for subject, arm in self._all():
            more = len(self.tried[subject.name, arm.name]) - self.count
            if more:
                of = f" on {subject.words}" if several else ""
                notes.append(f"{arm.words}{of} had {counted(more, 'setting')} more, beyond the edge of its range.")
        return notes + [words for subject, arm in self._all() for words in self.warnings(subject, arm)]

    @property
    def notes(self) -> list[str]:
        """Say what was tried, on what, and what was chosen."""
        return [self.words, *self.choices]

    @property
    def words(self) -> str:
        """What was tried, on what."""
        grids: dict[str, list[str]] = {}
        for subject, arm in self._all():
            grids.setdefault(self.spaces[subject.name, arm.name].words, []).append(arm.words)
        told = next(iter(grids))
        for words, names in list(grids.items())[1:]:
            told += f"; for {', '.join(dict.fromkeys(names))}: {words}"
        seeds, same = self.seeds, "the same " if len(grids) == 1 else ""
        settings = f"{same}{self.count} settings"
        on = f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
        return (
            f"Tuned: {told}. Every arm, the plain one and the controls too, had {settings} on the same "
            f"{on}, {self.count * len(seeds)} runs an arm, judged by the mean of validation alone; no seed of the "
            "tuning is among those of the comparison."
        )

    def told(self) -> Tuning:
        """Give what a page shows of it."""
        runs = {record.folder: record for record in self.results.records.values()}
        arms = []
        for subject, arm in self._all():
            key = (subject.name, arm.name)
            scores = [score if math.isfinite(score) else None for score in self.scores(*key)]
            trials = tuple(
                Trial(setting=dict(setting), score=score, extension=number >= self.count)
                for number, (setting, score) in enumerate(zip(self.tried[key], scores, strict=True))
            )
            told = {"subject": subject.name, "arm": arm.name, "trials": trials}
            arms.append(Tuned(**told, chosen=dict(self.chosen(*key)), warnings=tuple(self.warnings(subject, arm))))
        return Tuning(
            words=self.words,
            quantity=self.results.plan.quantity.words,
            seeds=self.seeds,
            runs=len(runs),
            seconds=math.fsum(record.summary["seconds"] for record in runs.values()),
            arms=tuple(arms),
        )


def at_setting(arm: Arm, setting: Setting) -> Arm:
    """Put an arm at a setting."""
    constants = {name: value for name, value in setting.items() if name != RATIOS}
    rule = arm.rule
    if rule is not None and RATIOS in setting:
        rule = {**rule, RATIOS: dict(setting[RATIOS])}
    return replace(arm, constants={**arm.constants, **constants}, rule=rule, search=None)


def at_own_settings(arms: Sequence[Arm], chosen: Mapping[str, Setting]) -> Iterator[Arm]:
    """Give each arm its chosen values, and a control at other values than its method's a method's arm of its own."""
    methods: dict[tuple[str, str], str] = {}
    for arm in arms:
        values = dict(chosen.get(arm.name, {}))
        if arm.of is not None and values != dict(chosen.get(arm.of, {})):
            key = (arm.of, setting_words(values))
            if key not in methods:
                method = next(one for one in arms if one.name == arm.of)
                words = f"{method.words} at {key[1]}, {FACTORS_ALONE}"
                methods[key] = f"{arm.of} {key[1]}"
                yield replace(at_setting(method, values), name=methods[key], words=words, against=())
            arm = replace(arm, of=methods[key])
        yield at_setting(arm, values)


def tune(
    bench: Bench,
    settings: Settings,
    display: Display | None = None,
    *,
    seeds: int = SEEDS,
    extensions: int = EXTENSIONS,
    carry: Callable[..., Outcome] = carry_out,
) -> Tuner:
    """Carry out the trials of a bench, round by round; the last outcome is incomplete where a run failed or is left."""
    tuner = Tuner(bench, seeds, extensions)
    while True:
        outcome = carry(tuner.plan(), settings, display)
        if not outcome.complete:
            tuner.outcome = outcome
            return tuner
        if not tuner.read(outcome):
            return tuner


def carry_out_tuned(tuner: Tuner, settings: Settings, display: Display | None = None) -> Outcome:
    """Compare what a tuning has chosen; where it is not complete, its own outcome is given."""
    assert tuner.outcome is not None
    if not tuner.outcome.complete:
        return tuner.outcome
    plan = tuner.bench.comparison(tuner)
    display = display or Display()
    for words in tuner.choices:
        display.say(words)
    return carry_out(replace(plan, tuning=tuner.told()), settings, display)
