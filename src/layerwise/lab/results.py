"""Finished runs gathered: summaries over seeds, the verdict, and one long table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerwise.lab.solvers import SOLVERS
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import Comparison, compare

if TYPE_CHECKING:
    import polars

Key = tuple[str, str, int]
"""Solver, arm, seed."""


@dataclass(frozen=True)
class Cell:
    """Mean and spread over seeds of one quantity at one iteration.

    Attributes:
        iteration: updates done.
        mean: over seeds.
        sd: over seeds (n - 1); nan for one seed.
        count: seeds.
    """

    iteration: int
    mean: float
    sd: float
    count: int


@dataclass
class Results:
    """The finished runs of a demo.

    Attributes:
        solvers: solvers of the plan, in order.
        seeds: seeds of the plan.
        record_at: iterations at which the error was measured.
        records: the finished runs.
    """

    solvers: tuple[str, ...]
    seeds: tuple[int, ...]
    record_at: tuple[int, ...]
    records: dict[Key, dict[str, Any]] = field(default_factory=dict)

    @property
    def family(self) -> int:
        """Number of comparisons planned: two a solver."""
        return 2 * len(self.solvers)

    def of(self, solver: str, arm: str) -> dict[int, dict[str, Any]]:
        """Give the finished runs of an arm: seed -> record."""
        return {seed: self.records[solver, arm, seed] for seed in self.seeds if (solver, arm, seed) in self.records}

    def diverged(self, solver: str, arm: str) -> int:
        """Count the runs of an arm that diverged."""
        return sum(record["diverged_at"] is not None for record in self.of(solver, arm).values())

    def cells(self, solver: str, arm: str, quantity: str = "test_error") -> list[Cell]:
        """Summarise a quantity over seeds.

        Args:
            solver: key of ``solvers.SOLVERS``.
            arm: key of ``training.ARMS``.
            quantity: ``"test_error"`` (%) or ``"training_loss"`` (nats).

        Returns:
            One cell an iteration, in order; empty without a finished run.
        """
        gathered: dict[int, list[float]] = {}
        for record in self.of(solver, arm).values():
            for iteration, value in record[quantity]:
                gathered.setdefault(iteration, []).append(value)
        return [
            Cell(iteration, statistics.fmean(values), _sd(values), len(values))
            for iteration, values in sorted(gathered.items())
        ]

    def comparisons(self) -> list[tuple[Comparison, Comparison]]:
        """Compare the method with plain and with the control at the last recorded iteration."""
        last = self.record_at[-1]
        return [
            (self._compare(solver, "plain", last), self._compare(solver, "control", last)) for solver in self.solvers
        ]

    def _compare(self, solver: str, against: str, iteration: int) -> Comparison:
        ours, theirs = self.of(solver, "layer-adaptive"), self.of(solver, against)
        pairs = ours.keys() & theirs.keys()
        return compare(
            {seed: dict(ours[seed]["test_error"])[iteration] for seed in pairs},
            {seed: dict(theirs[seed]["test_error"])[iteration] for seed in pairs},
            self.family,
            solver=SOLVERS[solver],
            arm=ARMS["layer-adaptive"],
            against=ARMS[against],
            iteration=iteration,
            diverged=sum(arm[seed]["diverged_at"] is not None for arm in (ours, theirs) for seed in pairs),
        )

    def layer_factors(self, solver: str) -> dict[str, dict[str, float]]:
        """Give each layer's lowest, mean and highest factor over all iterations and seeds of the method."""
        found: dict[str, list[dict[str, float]]] = {}
        for record in self.of(solver, "layer-adaptive").values():
            for layer, values in record["factor"]["layers"].items():
                found.setdefault(layer, []).append(values)
        return {
            layer: {
                "lowest": min(values["lowest"] for values in runs),
                "mean": statistics.fmean(values["mean"] for values in runs),
                "highest": max(values["highest"] for values in runs),
            }
            for layer, runs in found.items()
        }

    def spread(self, solver: str) -> float | None:
        """Give the largest factor over the smallest of one iteration, averaged over iterations and seeds."""
        runs = self.of(solver, "layer-adaptive").values()
        return statistics.fmean(record["factor"]["spread"] for record in runs) if runs else None

    def mean_factor(self, solver: str) -> float | None:
        """Give the mean factor over layers, iterations and seeds of the method."""
        runs = self.of(solver, "layer-adaptive").values()
        return statistics.fmean(record["factor"]["mean"] for record in runs) if runs else None

    def frame(self) -> polars.DataFrame:
        """Gather every number in one long table.

        Returns:
            Columns ``solver``, ``arm``, ``seed``, ``iteration``, ``quantity`` (``test_error`` in %,
            ``training_loss`` in nats, ``rate``, ``factor``), ``layer`` (null but for the last two),
            ``value``, ``diverged``.
        """
        import polars

        schema = {
            "solver": polars.String,
            "arm": polars.String,
            "seed": polars.Int64,
            "iteration": polars.Int64,
            "quantity": polars.String,
            "layer": polars.String,
            "value": polars.Float64,
            "diverged": polars.Boolean,
        }
        rows = [row for key, record in sorted(self.records.items()) for row in _rows(key, record)]
        return polars.DataFrame(rows, schema=schema, orient="row")


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _rows(key: Key, record: dict[str, Any]) -> Iterable[tuple[object, ...]]:
    """Give the rows of one run."""
    diverged = record["diverged_at"] is not None
    for quantity in ("test_error", "training_loss"):
        for iteration, value in record[quantity]:
            yield (*key, iteration, quantity, None, value, diverged)
    for quantity in ("rate", "factor"):
        for layer, values in record["rates"][quantity].items():
            for iteration, value in zip(record["rates"]["iterations"], values, strict=True):
                yield (*key, iteration, quantity, layer, value, diverged)
