"""The finished runs of a plan gathered: summaries over seeds, curves, comparisons, one long table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import polars

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.plan import Arm, PaperValue, Plan, Quantity, quantity_of
from layerwise.lab.runs.record import Record, read_tables
from layerwise.lab.stats.comparison import Comparison, Pair, judge

Key = tuple[str, str, int]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Cell:
    """Mean and spread over seeds of one quantity at one step."""

    step: int  # updates or epochs, as the plan counts
    mean: float  # over the seeds that did not diverge; nan if all did
    sd: float  # over them (n - 1); nan for fewer than two
    count: int  # of them
    diverged: int = 0  # seeds that diverged before


def summarise(step: int, values: list[float], diverged: int = 0) -> Cell:
    """Make a cell of the values of the seeds that did not diverge; ``diverged`` is the number of those that did."""
    mean = statistics.fmean(values) if values else math.nan
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(step, mean, sd, len(values), diverged)


@dataclass
class Results:
    """The records of a plan's finished runs, by subject, arm and seed, and everything that is worked out from them."""

    plan: Plan
    records: dict[Key, Record] = field(default_factory=dict)
    _series: dict[tuple[Key, str], list[tuple[int, float]]] = field(default_factory=dict, repr=False)
    tables: dict[Path, polars.DataFrame] = field(default_factory=dict, repr=False)  # read so far
    _made: dict[Callable[[Results], Any], tuple[int, Plan, Any]] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[Results], Made]) -> Made:
        """Give what a function makes of these results; it is called again when runs have come, or for another plan.

        A record is never exchanged for another of the same run.
        """
        count, plan, made = self._made.get(make, (-1, self.plan, None))
        if count != len(self.records) or plan is not self.plan:
            made = make(self)
            self._made[make] = len(self.records), self.plan, made
        return made

    def of(self, subject: str, arm: str) -> dict[int, Record]:
        """Give the finished runs of an arm: seed -> record."""
        found = {seed: self.records.get((subject, arm, seed)) for seed in self.plan.seeds}
        return {seed: record for seed, record in found.items() if record is not None}

    def diverged(self, subject: str, arm: str) -> frozenset[int]:
        """Find the seeds of an arm's finished runs that diverged."""
        return frozenset(seed for seed, record in self.of(subject, arm).items() if record.diverged)

    def metrics(self, key: Key) -> polars.DataFrame:
        """Give every number of one run; those of all runs are read together, and once."""
        file = self.records[key].metrics_file  # runs of one configuration are one run, under several names
        if file not in self.tables:
            broken = self._read()
            if file in broken:
                raise UsageError(broken[file])
        return self.tables[file]

    def _read(self) -> dict[Path, str]:
        """Read the tables that are not read yet; give those that are damaged, and why."""
        left = (each.metrics_file for each in self.records.values() if each.metrics_file not in self.tables)
        tables, broken = read_tables(left)
        self.tables.update(tables)
        return broken

    def leave_out_unreadable(self) -> list[str]:
        """Read every table, and leave the runs out whose table is damaged; say which and why."""
        broken = self._read()
        self.records = {key: each for key, each in self.records.items() if each.metrics_file not in broken}
        return list(broken.values())

    def series(self, key: Key, quantity: str) -> list[tuple[int, float]]:
        """Give the pairs of step and value of one run; steps are epochs where the plan counts epochs."""
        if (key, quantity) not in self._series:
            frame = self.metrics(key)
            # Lists and no queries: of thousands of small tables those would take most of the time.
            whole = [layer is None for layer in frame["layer"].to_list()]
            by_epoch = self.plan.step_unit == "epoch"
            names = ("quantity", "epoch" if by_epoch else "step", "value")
            kept = (compress(frame[name].to_list(), whole) for name in names)
            found: dict[str, list[tuple[int, float]]] = {quantity: []}
            for name, place, value in zip(*kept, strict=True):
                found.setdefault(name, []).append((place, value))
            if by_epoch and "training_loss" in found:
                epochs = groupby(found["training_loss"], key=itemgetter(0))
                found["training_loss"] = [(epoch, statistics.fmean(map(itemgetter(1), rows))) for epoch, rows in epochs]
            self._series.update({(key, name): pairs for name, pairs in found.items()})
        return self._series[(key, quantity)]

    def values(self, subject: str, arm: str, step: int | None = None) -> dict[int, float]:
        """Give the plan's quantity at a step (None: the last) of an arm's runs that did not diverge: seed -> value."""
        runs = {seed: record for seed, record in self.of(subject, arm).items() if not record.diverged}
        found = {seed: self._value(record, (subject, arm, seed), step) for seed, record in runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def _value(self, record: Record, key: Key, step: int | None) -> float | None:
        quantity = self.plan.quantity
        if quantity.name == "seconds":
            return record.summary["seconds"] - record.summary["test_seconds"]
        if quantity.take != "last":
            return _taken(quantity, self.series(key, quantity.name))
        if step is None:
            return record.summary["finals"].get(quantity.name)
        return dict(self.series(key, quantity.name)).get(step)

    def cell(self, subject: str, arm: str, step: int | None = None) -> Cell | None:
        """Summarise the plan's quantity of an arm over seeds at a column (None: the last step); None without a run."""
        return self.once(_cells).get((subject, arm, step))

    def cells(self, subject: str, arm: str) -> list[Cell | None]:
        """Give the cells of an arm at the plan's columns, or the last one alone."""
        return [self.cell(subject, arm, step) for step in self.plan.columns or (None,)]

    def layer_names(self, subject: str, arm: str) -> list[str]:
        """Give the names of the layers in the network's order, and then those that the rule alone has, as LARS does."""
        for record in self.of(subject, arm).values():
            factor = record.summary["factor"]
            return list(dict.fromkeys([*record.summary["layers"], *(factor.get("names") or factor.get("layers", ()))]))
        return []

    def mean_factor(self, subject: str, arm: str) -> float | None:
        """Give the mean factor over layers, updates and seeds."""
        records = self.of(subject, arm).values()
        return statistics.fmean(record.summary["factor"]["mean"] for record in records) if records else None

    def spread(self, subject: str, arm: str) -> float | None:
        """Give the largest factor over the smallest of one update, averaged over updates and seeds."""
        records = self.of(subject, arm).values()
        return statistics.fmean(record.summary["factor"]["spread"] for record in records) if records else None

    @cached_property
    def family(self) -> int:
        """Number of comparisons planned together."""
        return len(list(self.plan.pairs())) * max(1, len(self.plan.columns))

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """The plan's arms by name, in its order."""
        return {arm.name: arm for arm in self.plan.arms}

    @cached_property
    def planned(self) -> Counter[tuple[str, str]]:
        """Number of runs that the plan has of each subject and arm."""
        return Counter((run.subject, run.arm.name) for run in self.plan.runs)

    @property
    def compared(self) -> dict[tuple[str, str], list[tuple[str, int | None, Comparison]]]:
        """What each arm is compared with: subject and arm -> other arm, step, and what that shows."""
        return self.once(_compared)

    def comparisons(self) -> dict[tuple[str, str, str, int | None], Comparison]:
        """Give every planned comparison: subject, arm, other arm, step -> what it shows, Holm over all of them."""
        return self.once(_judged)

    def paper(self, subject: str, arm: str, step: int | None = None) -> PaperValue | None:
        """Find the paper's value of the plan's own quantity at a step (None: the last); None if the paper has none."""
        wanted = (subject, arm, step, "")
        rows = (row for row in self.plan.paper if (row.subject, row.arm, row.step, row.quantity) == wanted)
        return next(rows, None)

    def beside(self) -> list[Results]:
        """Give the same runs under each of the plan's other quantities, to be shown and compared in the same way."""
        found = []
        for name in self.plan.beside:
            quantity = quantity_of(name)
            paper = tuple(replace(row, quantity="") for row in self.plan.paper if row.quantity == name)
            columns = self.plan.columns if quantity.take == "last" else ()
            plan = replace(self.plan, quantity=quantity, columns=columns, paper=paper, beside=())
            found.append(Results(plan, self.records, self._series, self.tables))
        return found

    def frame(self) -> polars.DataFrame:
        """Gather every number in one long table: subject, arm, seed, step, epoch, quantity, layer, value, diverged."""
        keys = sorted(self.records)
        if not keys:
            return polars.DataFrame()
        frames = [self.metrics(key) for key in keys]
        of = places_of(frames)
        names = ("subject", "arm", "seed")
        told = [polars.Series(name, list(column)) for name, column in zip(names, zip(*keys, strict=True), strict=True)]
        diverged = polars.Series("diverged", [self.records[key].diverged for key in keys])
        before = polars.DataFrame([column.gather(of) for column in told])
        return before.hstack(polars.concat(frames).get_columns()).hstack([diverged.gather(of)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the rows of the table of the plan's own quantity."""
        quantity = self.plan.quantity
        for subject in self.plan.subjects:
            for arm in self.plan.arms_of(subject.name):
                for step, cell in zip(self.plan.columns or (None,), self.cells(subject.name, arm.name), strict=True):
                    paper = self.paper(subject.name, arm.name, step)
                    yield {
                        "subject": subject.name,
                        "arm": arm.name,
                        "group": arm.group or None,
                        "value": arm.value,
                        "step": step,
                        "quantity": quantity.name if quantity.take == "last" else quantity.words,
                        "mean": cell.mean if cell and cell.count else None,
                        "sd": cell.sd if cell and cell.count > 1 else None,
                        "seeds": cell.count if cell else 0,
                        "diverged": cell.diverged if cell else 0,
                        "paper_mean": paper.mean if paper else None,
                        "paper_sd": paper.sd if paper else None,
                    }

    def table(self) -> polars.DataFrame:
        """Give the tables of the plan's quantities beside the paper's: a row a quantity, subject, arm and column."""
        rows = [row for results in (self, *self.beside()) for row in results.rows()]
        floats = dict.fromkeys(("value", "mean", "sd", "paper_mean", "paper_sd"), polars.Float64)
        return polars.DataFrame(rows, schema_overrides={**floats, "step": polars.Int64, "group": polars.String})


def _taken(quantity: Quantity, pairs: Sequence[tuple[int, float]]) -> float | None:
    """Give the best value after the first update, or the first step at which a level is reached; None without one."""
    trained = [(step, value) for step, value in pairs if step > 0]
    if quantity.take == "first":
        return next((float(step) for step, value in trained if value >= quantity.level), None)
    return (max if quantity.higher_is_better else min)((value for _, value in trained), default=None)


def _cells(results: Results) -> dict[tuple[str, str, int | None], Cell]:
    found: dict[tuple[str, str, int | None], Cell] = {}
    for subject, arm in dict.fromkeys((subject, arm) for subject, arm, _ in results.records):
        diverged = len(results.diverged(subject, arm))
        for step in (*results.plan.columns, None):
            values = list(results.values(subject, arm, step).values())
            found[subject, arm, step] = summarise(-1 if step is None else step, values, diverged)
    return found


def _judged(results: Results) -> dict[tuple[str, str, str, int | None], Comparison]:
    plan, quantity = results.plan, results.plan.quantity
    pairs = {
        (subject, arm.name, other.name, step): Pair(
            subject=plan.subject(subject).words,
            arm=arm.words,
            against=other.words,
            values=results.values(subject, arm.name, step),
            reference=results.values(subject, other.name, step),
            diverged=results.diverged(subject, arm.name),
            diverged_reference=results.diverged(subject, other.name),
            step=-1 if step is None else step,
        )
        for subject, arm, other in plan.pairs()
        for step in plan.columns or (None,)
    }
    found = judge(
        list(pairs.values()),
        quantity=quantity.words,
        higher_is_better=quantity.higher_is_better,
        unit=quantity.difference_unit,
        family=max(1, results.family),
    )
    return dict(zip(pairs, found, strict=True))


def _compared(results: Results) -> dict[tuple[str, str], list[tuple[str, int | None, Comparison]]]:
    found: dict[tuple[str, str], list[tuple[str, int | None, Comparison]]] = {}
    for (subject, arm, other, step), each in results.comparisons().items():
        found.setdefault((subject, arm), []).append((other, step, each))
    return found


def places_of(frames: Sequence[polars.DataFrame]) -> polars.Series:
    """Give for each row of all tables together the place of its table."""
    import numpy

    heights = [frame.height for frame in frames]
    return polars.Series("place", numpy.repeat(numpy.arange(len(frames), dtype=numpy.uint32), heights))


def layer_means(results: Results, subject: str, arm: str, quantity: str) -> polars.DataFrame:
    """Give the mean over seeds of the layers' quantity: layer, step, value, in the order of their records."""
    empty = polars.DataFrame(schema={"layer": polars.String, "step": polars.Int64, "value": polars.Float64})
    return results.once(_means_by_arm).get((subject, arm, quantity), empty)


def layer_ranges(results: Results, quantity: str) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """Give mean, smallest and largest value of each layer over the steps, of the finite means over seeds."""
    arms, means = results.once(_means_of_layers)
    rows = (
        means.lazy()
        .filter((polars.col("quantity") == quantity) & polars.col("value").is_not_nan())
        .group_by("arm", "layer", maintain_order=True)
        .agg(polars.mean("value"), polars.min("value").alias("low"), polars.max("value").alias("high"))
        .collect()
    )
    found: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
    for place, layer, mean, low, high in rows.iter_rows():
        found.setdefault(arms[place], {})[layer] = mean, low, high
    return found


def _means_of_layers(results: Results) -> tuple[list[tuple[str, str]], polars.DataFrame]:
    """Give subjects with arms, and the means over seeds: place of the arm, quantity, layer, step, value."""
    arms = list(dict.fromkeys((subject, arm) for subject, arm, _ in results.records))
    keys = [(place, (*arm, seed)) for place, arm in enumerate(arms) for seed in results.of(*arm)]
    frames = [results.metrics(key) for _, key in keys]
    places = polars.Series("arm", [place for place, _ in keys], polars.UInt32)
    means = (
        polars.concat(frames)
        .with_columns(places.gather(places_of(frames)))
        .lazy()
        .filter(polars.col("layer").is_not_null())
        .group_by("arm", "quantity", "layer", "step", maintain_order=True)
        .agg(polars.col("value").mean())
        .collect()
    )
    return arms, means


def _means_by_arm(results: Results) -> dict[tuple[str, str, str], polars.DataFrame]:
    """Give the means of the layers: subject, arm, quantity -> layer, step, value."""
    if not results.records:
        return {}
    arms, means = results.once(_means_of_layers)
    parts = means.partition_by("arm", "quantity", as_dict=True, include_key=False, maintain_order=True)
    return {(*arms[place], quantity): rows for (place, quantity), rows in parts.items()}
