"""What an experiment is: subjects, arms, seeds, and what is looked at; from a recipe or a user's own task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Configuration, Constants

Take = Literal["last", "best", "first"]
"""Which value of a run counts: that at a step, the best of all tests, or the first step at which a level is reached."""

Layout = Literal["steps", "curves", "thresholds", "best", "times"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""What the paper shows: values at some steps; curves over steps; the last value over thresholds; the best value of each
group of arms; running times of each group of arms."""

LARGEST_SEEDS = 1000
Table = Mapping[str, Any]  # of a recipe


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What arms are compared by."""

    name: str = "test_error"  # in the metrics of a run; "seconds" is the running time
    words: str = "test error"
    unit: str = "%"
    difference_unit: str = "points"
    higher_is_better: bool = False
    take: Take = "last"
    level: float = 0.0  # that "first" waits for


QUANTITIES = {
    "test_error": Quantity(),
    "accuracy": Quantity(name="accuracy", words="accuracy", higher_is_better=True),
    "best_accuracy": Quantity(name="accuracy", words="best accuracy", higher_is_better=True, take="best"),
    "training_accuracy": Quantity(name="training_accuracy", words="training accuracy", higher_is_better=True),
    "test_loss": Quantity(name="test_loss", words="test loss", unit="nats", difference_unit="nats"),
    "seconds": Quantity(name="seconds", words="running time", unit="s", difference_unit="s"),
}


def quantity_of(name: str) -> Quantity:
    """Give a quantity: a key of ``QUANTITIES``, or "reach 57.5", the iterations until the accuracy is at least this."""
    begin, _, level = name.partition(" ")
    if begin == "reach" and level.replace(".", "", 1).isdigit():
        words = f"number of iterations until {level} % accuracy"
        return Quantity(
            name="accuracy", words=words, unit="", difference_unit="iterations", take="first", level=float(level)
        )
    if name not in QUANTITIES:
        raise UsageError(f"quantity={name!r}: use one of {', '.join(QUANTITIES)}, or 'reach 57.5'")
    return QUANTITIES[name]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing that all arms are tried on: a solver of Table I, a network."""

    name: str
    words: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""  # tells subjects with other phases and other thresholds apart
    varied: Mapping[str, Any] = field(default_factory=dict)  # values of a sweep, which hold for every arm
    origin: str = ""  # name of the recipe's subject that a sweep varies
    stands_for: str = ""  # name of the paper's subject that it is a smaller kind of

    @property
    def row(self) -> str:
        """Name of the recipe's subject that it is, or that a sweep varies."""
        return self.origin or self.name


Control = Literal[
    "mean factor",
    "weighted mean factor",
    "frozen factors",
    "first factors",
    "reversed factors",
    "mean factor of each role",
    "first factor of each shape",
    "shuffled layers",
    "shuffled within shapes",
]
CONTROLS: tuple[Control, ...] = get_args(Control)
RATES: tuple[Control, ...] = CONTROLS[:2]
"""Those that are plain training at another rate."""

TRIALS = "Runs of a tuning"
"""How the note of a plan begins whose runs only choose settings."""

Role = Literal["method", "plain", "control"]
ROLES: tuple[Role, ...] = get_args(Role)

CONTROL_SELECTIONS = ("AllLayers", "RandomLayers", "ShuffledLayers")
"""Choices of layers that measure nothing, or not where: what a choice that measures must be better than."""

FACTORS_ALONE = "for its factors alone"
"""How the words of an arm end that is compared with nothing: a method at the values of a control that repeats it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str  # as in --arms and in tables of numbers
    words: str  # as in tables for people
    rule: Mapping[str, Any] | None = None  # name and arguments; None trains without an adapter
    apply: str = "auto"
    control: Control | None = None  # what it repeats of the run of `of`
    of: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    subjects: tuple[str, ...] = ()  # names of the only subjects that have this arm; empty for all
    group: str = ""  # arms of a group stand together in tables and figures, told apart by `value`
    value: float | None = None
    against: tuple[str, ...] = ()  # names of the arms that it is compared with
    role: Role | None = None  # what it is to the others where that does not follow from its rule
    search: Mapping[str, Any] | None = None  # roles whose multipliers each of its trials draws, with ``low``, ``high``

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise UsageError(f"role={self.role!r} of arm {self.name!r}: use one of {', '.join(ROLES)}")
        if self.control is not None and self.control not in CONTROLS:
            raise UsageError(f"control={self.control!r} of arm {self.name!r}: use one of {', '.join(CONTROLS)}")
        if (self.control is None) != (self.of is None):
            raise UsageError(f"arm {self.name!r}: a control names the arm that it is 'of', and only a control does")

    @property
    def kind(self) -> Role:
        """What it is to the arms that are compared with it: what they are better than, what they must be more than."""
        if self.role is not None:
            return self.role
        if self.control is not None:
            return "control"
        if self.rule is None:
            return "plain"
        selection = self.rule.get("selection")
        name = selection.get("name") if isinstance(selection, Mapping) else None
        return "control" if name in CONTROL_SELECTIONS else "method"


@dataclass(frozen=True, kw_only=True)
class PaperValue:
    """A number of the paper; a lost one has no mean."""

    subject: str
    arm: str  # or a group of arms
    step: int | None = None  # updates or, in runs counted in epochs, epochs; None for the last
    mean: float | None = None
    sd: float | None = None
    note: str = ""  # what else the paper says, or why the value is lost
    gain: str = ""  # what the paper prints as the difference to the original, in its own digits
    full_scale: bool = False  # the runs beside it are of a smaller scale
    quantity: str = ""  # one of the plan's other quantities; "" for its own

    @property
    def label(self) -> str:
        """What tables call it; where the runs beside it are of a smaller scale, this says so."""
        return "paper, full scale" if self.full_scale else "paper"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting that an arm tried on validation data before the comparison."""

    setting: Mapping[str, Any]
    score: float | None  # mean of the validation over the seeds of the tuning; None where one diverged
    extension: bool = False  # beyond the grid, as the best so far was at its edge


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What an arm tried on a subject, and what it has chosen."""

    subject: str
    arm: str
    trials: tuple[Trial, ...]
    chosen: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> Trial:
        """The trial of the chosen setting."""
        return next(trial for trial in self.trials if trial.setting == self.chosen)

    @property
    def extensions(self) -> int:
        """Number of trials beyond the grid."""
        return sum(trial.extension for trial in self.trials)

    @property
    def diverged(self) -> int:
        """Number of trials of which a run diverged: the worst of all."""
        return sum(trial.score is None for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the arms of a plan came to their settings, and what that took."""

    words: str  # what was tried, by whom and on what
    quantity: str  # of the scores, in words
    seeds: tuple[int, ...]
    runs: int  # different ones, those among them that only give a control its method's factors
    seconds: float  # of all of them together
    arms: tuple[Tuned, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One arm on one subject with one seed: what a worker does, or finds done."""

    subject: str
    arm: Arm
    seed: int
    configuration: Configuration  # of a control, without what follows from its method's run
    task: Any = None  # a user's own, as tasks.task makes it

    @property
    def key(self) -> tuple[str, str, int]:
        """Names of subject and arm, and seed: no other run of the plan has these, and results are kept under them."""
        return self.subject, self.arm.name, self.seed

    @property
    def label(self) -> str:
        """Subject, arm and seed in words: what messages and failures call it."""
        return f"{self.subject} {self.arm.name} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment before it is done: all of its runs, and what tables, figures and comparisons show of them."""

    name: str  # of its folder
    title: str
    source: str  # paper and section, or the user's file
    layout: Layout
    quantity: Quantity
    columns: tuple[int, ...]  # steps that the table shows; empty for the last one alone
    step_unit: str  # "iteration" or "epoch": what columns and curves count
    subjects: tuple[Subject, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    paper: tuple[PaperValue, ...] = ()
    beside: tuple[str, ...] = ()  # quantities that are shown and compared too, as `quantity_of` takes them
    claims: tuple[str, ...] = ()  # what the paper says in words, each a sentence with its place
    constants: Mapping[str, tuple[Any, str]] = field(default_factory=dict)  # name -> value and source, for the page
    notes: tuple[str, ...] = ()  # what differs from the paper, and what the page does not show
    scale: str = ""  # "smoke", "reduced", "full", or "" for a user's own task
    data_title: str = ""
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beside", tuple(self.beside))
        for name in self.beside:
            quantity_of(name)

    @property
    def of_trials(self) -> bool:
        """Whether its runs only choose settings, so that nothing is concluded from them."""
        return any(words.startswith(TRIALS) for words in self.notes)

    def arms_of(self, subject: str) -> list[Arm]:
        """List the arms that the subject of this name is tried with, in the plan's order."""
        return [arm for arm in self.arms if not arm.subjects or subject in arm.subjects]

    def arm(self, name: str) -> Arm:
        """Find the arm of this name, which must be in the plan."""
        return next(arm for arm in self.arms if arm.name == name)

    def subject(self, name: str) -> Subject:
        """Find the subject of this name, which must be in the plan."""
        return next(subject for subject in self.subjects if subject.name == name)

    def pairs(self) -> Iterator[tuple[str, Arm, Arm]]:
        """Give every comparison that was planned: subject, arm, and the arm that it is compared with."""
        for subject in self.subjects:
            present = {arm.name: arm for arm in self.arms_of(subject.name)}
            for arm in present.values():
                yield from ((subject.name, arm, present[other]) for other in arm.against if other in present)

    def labels(self, subject: str) -> dict[str, Any]:
        """Say what the runs of a subject belong to and are judged by, for what reads them without this plan."""
        words = self.subject(subject).words
        return {"experiment": self.name, "subject_words": words, "quantity": asdict(self.quantity)}

    def chains(self) -> list[tuple[PlannedRun, ...]]:
        """Group the runs into chains: a method's run and then the controls that need it; other runs stand alone.

        Seeds come first, so that what is finished early is complete for some seeds.
        """
        chains: dict[tuple[str, str, int], list[PlannedRun]] = {}
        for run in sorted(self.runs, key=lambda run: (run.seed, run.arm.control is not None)):
            chains.setdefault((run.subject, run.arm.of or run.arm.name, run.seed), []).append(run)
        return [tuple(chain) for chain in chains.values()]


def check_seeds(count: int) -> tuple[int, ...]:
    """Give the seeds 0, 1, ... of a number of seeds."""
    if not 1 <= count <= LARGEST_SEEDS:
        raise UsageError(f"seeds={count!r}: must be from 1 to {LARGEST_SEEDS}; fewer than 5 never show a difference")
    return tuple(range(count))


def check_names(kind: str, names: Sequence[str]) -> None:
    """Refuse names that occur twice."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UsageError(f"{kind} {twice[0]!r} is named twice; names tell runs apart")


DEFAULTS = {field.name: field.default for field in fields(Constants)}


def sourced(
    content: Table, chosen: Table, subjects: Sequence[Subject], arms: Sequence[Arm]
) -> dict[str, tuple[Any, str]]:
    """Give each constant's value at a scale of a recipe, and its source.

    A constant that runs have several values of has them all, and the source says which of them is whose: as swept, by
    subject, by arm; what it would be without stands after "else", with its source.
    """
    given, changed = content["constants"], chosen.get("constants", {})
    base = {name: entry["value"] for name, entry in given.items()} | changed
    # A sweep makes many subjects of one, which have its constants: they are named together.
    known = {row["name"]: row["words"] for row in content["subjects"]}
    of_subjects = [(known.get(subject.row, subject.words), subject.constants) for subject in subjects]
    of_arms = [(arm.words, arm.constants) for arm in arms]
    each = [
        {**base, **subject.constants, **arm.constants, **subject.varied}
        for subject in subjects
        for arm in arms
        if not arm.subjects or subject.name in arm.subjects
    ]

    def source(name: str) -> str:
        """Say where the values of a constant come from: what sets it last comes first."""
        cited = f"{written(given[name]['value'])}: {given[name]['source']}" if name in given else "not set"
        scale = f"this scale; else {cited}"
        rest = f"{written(changed[name])}: {scale}" if name in changed else cited
        if any(name in subject.varied for subject in subjects):
            return f"as swept; else {rest}" if name in base else "as swept"
        parts = []
        for kind, changes in (("arm", of_arms), ("subject", of_subjects)):
            owners: dict[str, list[str]] = {}
            for words, constants in changes:
                if name in constants:
                    owners.setdefault(written(constants[name]), []).append(f"“{words}”")
            if owners:
                whose = (f"{value} for {' and '.join(dict.fromkeys(words))}" for value, words in owners.items())
                parts.append(f"differs by {kind}: {', '.join(whose)}")
        if parts:
            return "; ".join([*parts, f"else {rest}"])
        return scale if name in changed else given[name]["source"]

    found = {}
    for name in dict.fromkeys(name for constants in (base, *each) for name in constants):
        values = distinct(constants.get(name, DEFAULTS.get(name)) for constants in each)
        found[name] = (values[0] if len(values) == 1 else ", ".join(map(written, values)), source(name))
    return found


def distinct(values: Iterable[Any]) -> list[Any]:
    """Give each value once, in order; lists count as equal where they are written alike."""
    return list({written(value): value for value in values}.values())


def written(value: Any) -> str:
    """Write a value: a name as it is, anything else as JSON has it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
