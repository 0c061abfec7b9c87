"""The finished runs of the LeNet demo: comparisons, factors, and the rows of the long table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from layerwise.lab.records import Records, Row
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.training import ARMS
from layerwise.lab.verdict import Comparison


@dataclass
class Results(Records):
    """The finished runs of the LeNet demo; their keys are solver, arm, seed.

    Attributes:
        solvers: solvers of the plan, in order.
        seeds: seeds of the plan.
        record_at: iterations at which the error was measured.
        records: the finished runs.
    """

    solvers: tuple[str, ...]
    seeds: tuple[int, ...]
    record_at: tuple[int, ...]
    records: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    key_columns = ("solver", "arm")
    step_column = "iteration"
    main_quantity = "test_error"

    @property
    def family(self) -> int:
        """Number of comparisons planned: two a solver."""
        return 2 * len(self.solvers)

    def comparisons(self) -> list[tuple[Comparison, Comparison]]:
        """Compare the method with plain and with the control at the last recorded iteration."""
        return [(self._compare(solver, "plain"), self._compare(solver, "control")) for solver in self.solvers]

    def _compare(self, solver: str, against: str) -> Comparison:
        last = self.record_at[-1]
        return self.paired(
            (solver, "layer-adaptive"),
            (solver, against),
            lambda record: dict(record["test_error"])[last],
            solver=SOLVERS[solver],
            arm=ARMS["layer-adaptive"],
            against=ARMS[against],
            iteration=last,
        )

    def rows_of(self, record: dict[str, Any]) -> Iterable[Row]:
        """Give the numbers of one run: iteration, quantity, layer, value."""
        for quantity in ("test_error", "training_loss"):
            for iteration, value in record[quantity]:
                yield iteration, quantity, None, value
        for quantity in ("rate", "factor"):
            for layer, values in record["rates"][quantity].items():
                for iteration, value in zip(record["rates"]["iterations"], values, strict=True):
                    yield iteration, quantity, layer, value

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
