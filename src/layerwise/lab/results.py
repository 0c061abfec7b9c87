"""The finished runs of a plan gathered: summaries over seeds, curves, comparisons, one long table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerwise.lab.judgement import Comparison, Pair, judge
from layerwise.lab.plan import PaperValue, Plan
from layerwise.lab.runs import Record

if TYPE_CHECKING:
    import polars

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Cell:
    """Mean and spread over seeds of one quantity at one step.

    Attributes:
        step: updates or epochs, as the plan counts.
        mean: over the seeds that did not diverge; nan if all did.
        sd: over them (n - 1); nan for fewer than two.
        count: of them.
        diverged: seeds that diverged before.
    """

    step: int
    mean: float
    sd: float
    count: int
    diverged: int = 0


def summarise(step: int, values: list[float], diverged: int = 0) -> Cell:
    """Summarise values, one a seed."""
    mean = statistics.fmean(values) if values else math.nan
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(step, mean, sd, len(values), diverged)


@dataclass
class Results:
    """The finished runs of a plan.

    Attributes:
        plan: what was to be done.
        records: subject, arm and seed -> record.
    """

    plan: Plan
    records: dict[Key, Record] = field(default_factory=dict)
    _series: dict[tuple[Key, str], list[tuple[int, float]]] = field(default_factory=dict, repr=False)
    _metrics: dict[Key, polars.DataFrame] = field(default_factory=dict, repr=False)

    def of(self, subject: str, arm: str) -> dict[int, Record]:
        """Give the finished runs of an arm: seed -> record."""
        found = {seed: self.records.get((subject, arm, seed)) for seed in self.plan.seeds}
        return {seed: record for seed, record in found.items() if record is not None}

    def diverged(self, subject: str, arm: str) -> frozenset[int]:
        """Give the seeds of an arm that diverged."""
        return frozenset(seed for seed, record in self.of(subject, arm).items() if record.diverged)

    def metrics(self, key: Key) -> polars.DataFrame:
        """Give every number of one run, read once."""
        if key not in self._metrics:
            self._metrics[key] = self.records[key].metrics()
        return self._metrics[key]

    def series(self, key: Key, quantity: str) -> list[tuple[int, float]]:
        """Give the pairs of step and value of one run; steps are epochs where the plan counts epochs."""
        if (key, quantity) not in self._series:
            import polars

            rows = self.metrics(key).filter(polars.col("layer").is_null())
            column = "epoch" if self.plan.step_unit == "epoch" else "step"
            for (name,), part in rows.partition_by("quantity", as_dict=True).items():
                if column == "epoch" and str(name) == "training_loss":
                    part = part.group_by("epoch", maintain_order=True).agg(polars.col("value").mean())
                pairs = zip(part[column].to_list(), part["value"].to_list(), strict=True)
                self._series[(key, str(name))] = list(pairs)
            self._series.setdefault((key, quantity), [])
        return self._series[(key, quantity)]

    def values(self, subject: str, arm: str, step: int | None = None) -> dict[int, float]:
        """Give the plan's quantity of the runs of an arm that did not diverge: seed -> value.

        Args:
            subject: its name.
            arm: its name.
            step: which one; None for the last.

        Returns:
            Seeds without this step are left out.
        """
        quantity = self.plan.quantity.name
        found = {}
        for seed, record in self.of(subject, arm).items():
            if record.diverged:
                continue
            if quantity == "seconds":
                found[seed] = record.summary["seconds"] - record.summary["test_seconds"]
            elif step is None:
                if record.summary["finals"].get(quantity) is not None:
                    found[seed] = record.summary["finals"][quantity]
            else:
                value = dict(self.series((subject, arm, seed), quantity)).get(step)
                if value is not None:
                    found[seed] = value
        return found

    def cell(self, subject: str, arm: str, step: int | None = None) -> Cell | None:
        """Summarise the plan's quantity of an arm over seeds at a step (None: the last); None without a run."""
        if not self.of(subject, arm):
            return None
        values = list(self.values(subject, arm, step).values())
        return summarise(step if step is not None else -1, values, len(self.diverged(subject, arm)))

    def cells(self, subject: str, arm: str) -> list[Cell | None]:
        """Give the cells of an arm at the plan's columns, or the last one alone."""
        return [self.cell(subject, arm, step) for step in self.plan.columns or (None,)]

    def layers(self, subject: str, arm: str, quantity: str) -> polars.DataFrame:
        """Give the mean over seeds of a layer's quantity: layer, step, value; empty if it was not recorded."""
        import polars

        parts = [
            self.metrics((subject, arm, seed)).filter(
                (polars.col("quantity") == quantity) & polars.col("layer").is_not_null()
            )
            for seed in self.of(subject, arm)
        ]
        if not parts:
            return polars.DataFrame(schema={"layer": polars.String, "step": polars.Int64, "value": polars.Float64})
        whole = polars.concat(parts)
        return (
            whole.group_by("layer", "step", maintain_order=True)
            .agg(polars.col("value").mean())
            .select("layer", "step", "value")
        )

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

    @property
    def family(self) -> int:
        """Number of comparisons planned together."""
        return len(list(self.plan.pairs())) * max(1, len(self.plan.columns))

    @cached_property
    def _judged(self) -> list[Comparison]:
        quantity = self.plan.quantity
        pairs = [
            Pair(
                subject=self.plan.subject(subject).words,
                arm=arm.words,
                against=other.words,
                values=self.values(subject, arm.name, step),
                reference=self.values(subject, other.name, step),
                diverged=self.diverged(subject, arm.name),
                diverged_reference=self.diverged(subject, other.name),
                step=-1 if step is None else step,
            )
            for subject, arm, other in self.plan.pairs()
            for step in self.plan.columns or (None,)
        ]
        return judge(
            pairs,
            quantity=quantity.words,
            higher_is_better=quantity.higher_is_better,
            unit=quantity.difference_unit,
            family=max(1, self.family),
        )

    def comparisons(self) -> dict[tuple[str, str, str, int | None], Comparison]:
        """Give every planned comparison: subject, arm, other arm, step -> what it shows, Holm over all of them."""
        keys = [
            (subject, arm.name, other.name, step)
            for subject, arm, other in self.plan.pairs()
            for step in self.plan.columns or (None,)
        ]
        return dict(zip(keys, self._judged, strict=True))

    def paper(self, subject: str, arm: str, step: int | None = None) -> PaperValue | None:
        """Give the paper's number for a cell, or None."""
        for value in self.plan.paper:
            if (value.subject, value.arm, value.step) == (subject, arm, step):
                return value
        return None

    def frame(self) -> polars.DataFrame:
        """Gather every number in one long table: subject, arm, seed, step, epoch, quantity, layer, value, diverged."""
        import polars

        parts = [
            self.metrics((subject, arm, seed)).select(
                polars.lit(subject).alias("subject"),
                polars.lit(arm).alias("arm"),
                polars.lit(seed).cast(polars.Int64).alias("seed"),
                polars.all(),
                polars.lit(record.diverged).alias("diverged"),
            )
            for (subject, arm, seed), record in sorted(self.records.items())
        ]
        return polars.concat(parts) if parts else polars.DataFrame()

    def table(self) -> polars.DataFrame:
        """Give the table of the plan's quantity beside the paper's: a row a subject, arm and column."""
        import polars

        rows: list[dict[str, Any]] = []
        for subject in self.plan.subjects:
            for arm in self.plan.arms_of(subject.name):
                for step, cell in zip(self.plan.columns or (None,), self.cells(subject.name, arm.name), strict=True):
                    paper = self.paper(subject.name, arm.name, step)
                    rows.append(
                        {
                            "subject": subject.name,
                            "arm": arm.name,
                            "group": arm.group or None,
                            "value": arm.value,
                            "step": step,
                            "quantity": self.plan.quantity.name,
                            "mean": cell.mean if cell and cell.count else None,
                            "sd": cell.sd if cell and cell.count > 1 else None,
                            "seeds": cell.count if cell else 0,
                            "diverged": cell.diverged if cell else 0,
                            "paper_mean": paper.mean if paper else None,
                            "paper_sd": paper.sd if paper else None,
                        }
                    )
        floats = dict.fromkeys(("value", "mean", "sd", "paper_mean", "paper_sd"), polars.Float64)
        return polars.DataFrame(rows, schema_overrides={**floats, "step": polars.Int64, "group": polars.String})
