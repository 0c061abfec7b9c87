"""Finished runs gathered: summaries over seeds, paired comparisons, and one long table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from layerwise.lab.verdict import Comparison, Quantity, compare

if TYPE_CHECKING:
    import polars

Row = tuple[int, str, str | None, float | None]
"""Step, quantity, layer (None for a quantity of the whole run), value."""


@dataclass(frozen=True)
class Cell:
    """Mean and spread over seeds of one quantity at one step.

    Attributes:
        iteration: updates done, or epochs, as the demo counts.
        mean: over seeds.
        sd: over seeds (n - 1); nan for one seed.
        count: seeds.
    """

    iteration: int
    mean: float
    sd: float
    count: int


def cell(iteration: int, values: list[float]) -> Cell:
    """Summarise the values of one quantity, one a seed; at least one."""
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(iteration, statistics.fmean(values), sd, len(values))


class Records:
    """The finished runs of a demo: key -> record, where a key ends with the seed.

    A kind of results names its columns and gives the rows of one run; ``seeds`` are those of the plan.
    """

    seeds: tuple[int, ...]
    records: dict[tuple[Any, ...], dict[str, Any]]
    key_columns: ClassVar[tuple[str, ...]] = ()
    step_column: ClassVar[str] = "iteration"
    main_quantity: ClassVar[str] = ""

    @property
    def family(self) -> int:
        """Number of comparisons planned together."""
        raise NotImplementedError

    def rows_of(self, record: dict[str, Any]) -> Iterable[Row]:
        """Give the numbers of one run."""
        raise NotImplementedError

    def of(self, *key: str) -> dict[int, dict[str, Any]]:
        """Give the finished runs of an arm: seed -> record."""
        return {seed: self.records[(*key, seed)] for seed in self.seeds if (*key, seed) in self.records}

    def diverged(self, *key: str) -> int:
        """Count the runs of an arm that diverged."""
        return sum(record["diverged_at"] is not None for record in self.of(*key).values())

    def cells(self, *key: str, quantity: str = "") -> list[Cell]:
        """Summarise a quantity over seeds.

        Args:
            key: of the arm, without the seed.
            quantity: field of the records, pairs of step and value; the main one if left out.

        Returns:
            One cell a step, in order; empty without a finished run.
        """
        gathered: dict[int, list[float]] = {}
        for record in self.of(*key).values():
            for step, value in record[quantity or self.main_quantity]:
                gathered.setdefault(step, []).append(value)
        return [cell(step, values) for step, values in sorted(gathered.items())]

    def paired(
        self,
        key: tuple[str, ...],
        against_key: tuple[str, ...],
        value: Callable[[dict[str, Any]], float],
        *,
        quantity: Quantity = "error",
        **words: Any,
    ) -> Comparison:
        """Compare two arms over the seeds that both have.

        Args:
            key: of the arm, without the seed.
            against_key: of the other arm.
            value: the number of a record that is compared, in %.
            quantity: what that number is.
            words: ``solver``, ``arm``, ``against`` and ``iteration`` of the comparison.

        Returns:
            The comparison with its outcome.
        """
        ours, theirs = self.of(*key), self.of(*against_key)
        pairs = ours.keys() & theirs.keys()
        return compare(
            {seed: value(ours[seed]) for seed in pairs},
            {seed: value(theirs[seed]) for seed in pairs},
            self.family,
            diverged=sum(arm[seed]["diverged_at"] is not None for arm in (ours, theirs) for seed in pairs),
            quantity=quantity,
            **words,
        )

    def frame(self) -> polars.DataFrame:
        """Gather every number in one long table.

        Returns:
            The columns of the key, ``seed``, the step, ``quantity``, ``layer`` (null where the quantity is that of the
            whole run), ``value``, ``diverged``.
        """
        import polars

        schema = {
            **dict.fromkeys(self.key_columns, polars.String),
            "seed": polars.Int64,
            self.step_column: polars.Int64,
            "quantity": polars.String,
            "layer": polars.String,
            "value": polars.Float64,
            "diverged": polars.Boolean,
        }
        rows = [
            (*key, *row, record["diverged_at"] is not None)
            for key, record in sorted(self.records.items())
            for row in self.rows_of(record)
        ]
        return polars.DataFrame(rows, schema=schema, orient="row")
