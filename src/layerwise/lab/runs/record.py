"""The numbers of a run, in memory while it runs, as a table when it is written; a finished run, read again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.lab.errors import UsageError
from layerwise.lab.runs import schema
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.store import LARGEST_NUMBER, LARGEST_TABLE, digest_of, kind_of, read_bytes, read_signed

if TYPE_CHECKING:
    import polars

SCHEMA_COLUMNS = ("step", "epoch", "quantity", "layer", "value")
"""Columns of ``metrics.parquet``. The step is the number of updates done; the layer of the whole network is null."""

TOGETHER, LARGEST_TOGETHER = 256, 1 << 25
"""The most tables and bytes that are read by one call, which takes about as long as for one table that is small."""

LARGEST_STEP = 2**53

LARGEST_ROWS = 100_000_000
"""Rows of a run's table; a million updates of a network of a hundred layers have less."""

ROWS, ROWS_A_BYTE = 1_000_000, 40
"""The most rows of a table, and the rows added for each byte: a small file may claim more than fit into memory."""

ROW = np.dtype([("series", "<i4"), ("epoch", "<i4"), ("step", "<i8"), ("value", "<f8")])
"""A number as it is kept; ``series`` is the index of its quantity and layer."""


class Recorder:
    """Series of numbers: quantity and layer -> steps and values.

    They are kept in the order in which they come, each in 24 bytes, so that a checkpoint need only add the new ones to
    those that are on the disk.
    """

    def __init__(self) -> None:
        self._series: dict[tuple[str, str | None], int] = {}
        self._rows = np.zeros(1024, ROW)
        self._size = 0

    def add(self, quantity: str, step: int, epoch: int, value: float, layer: str | None = None) -> None:
        """Append one number; a layer of None is the whole network, and "" the layer of the root module."""
        series = self._series.setdefault((quantity, layer), len(self._series))
        if self._size == len(self._rows):  # a new array: what ``state_dict`` gave may be part of the old one
            self._rows = np.concatenate([self._rows, np.zeros(self._size + 1024, ROW)])
        self._rows[self._size] = series, epoch, step, value
        self._size += 1

    def add_layers(self, quantity: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one number a layer."""
        for layer, value in values.items():
            self.add(quantity, step, epoch, value, layer)

    def _table(self) -> np.ndarray:
        return self._rows[: self._size]

    def _values(self, quantity: str) -> dict[str, list[float]]:
        table = self._table()
        return {
            layer: table["value"][table["series"] == number].tolist()
            for (name, layer), number in self._series.items()
            if name == quantity and layer is not None
        }

    def last(self, quantity: str) -> tuple[int, float]:
        """Give step and value of the last number of a quantity of the whole network."""
        table = self._table()
        row = table[np.flatnonzero(table["series"] == self._series[quantity, None])[-1]]
        return int(row["step"]), float(row["value"])

    def finals(self) -> dict[str, float]:
        """Give the last value of each quantity of the whole network, in the order in which they came."""
        return {quantity: self.last(quantity)[1] for quantity, layer in self._series if layer is None}

    def layer_means(self, quantity: str) -> dict[str, float]:
        """Give the mean of a quantity over the steps, for each layer; values that are not finite are left out."""
        finite = {layer: list(filter(math.isfinite, values)) for layer, values in self._values(quantity).items()}
        return {layer: math.fsum(values) / len(values) for layer, values in finite.items() if values}

    def spread(self, quantity: str) -> float | None:
        """Give the largest value over the smallest among the layers of a step, averaged over steps."""
        ratios = [
            max(column) / min(column)
            for column in zip(*self._values(quantity).values(), strict=True)
            if min(column) > 0 and math.isfinite(max(column))
        ]
        return math.fsum(ratios) / len(ratios) if ratios else None

    def state_dict(self) -> dict[str, Any]:
        """Give everything as ``torch.load(weights_only=True)`` reads it; ``rows`` only grows from one to the next."""
        import torch

        rows = torch.from_numpy(self._table().view(np.uint8))
        return {"series": [list(key) for key in self._series], "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._series = {(quantity, layer): number for number, (quantity, layer) in enumerate(state["series"])}
        self._rows = state["rows"].numpy().view(ROW)
        self._size = len(self._rows)
        if not set(self._table()["series"].tolist()) <= set(self._series.values()):
            raise ValueError("rows of unknown series")

    def frame(self) -> polars.DataFrame:
        """Gather everything in one long table with the columns ``SCHEMA_COLUMNS``, one series after another."""
        import polars

        table = self._table()
        table = table[np.argsort(table["series"], kind="stable")]
        words = {"quantity": polars.String, "layer": polars.String}
        names = polars.DataFrame(list(self._series), schema=words, orient="row")
        columns = {name: np.ascontiguousarray(table[name]) for name in ("step", "epoch", "value")}
        return polars.DataFrame(columns).hstack(names[table["series"]]).select(SCHEMA_COLUMNS)


def _schema() -> dict[str, Any]:
    import polars

    kinds = (polars.Int64, polars.Int32, polars.String, polars.String, polars.Float64)
    return dict(zip(SCHEMA_COLUMNS, kinds, strict=True))


@contextmanager
def _refusing(path: object) -> Iterator[None]:
    """Make a UsageError of whatever polars raises on a damaged file; by a panic, which is no Exception, too."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: cannot be read ({reason}); remove the run's folder and do it again") from error


def read_frame(path: Path) -> polars.DataFrame:
    """Read a table that ``Recorder.frame`` gave; a damaged one, or one with too many rows, is a UsageError."""
    import polars

    content = read_bytes(path, LARGEST_TABLE)
    most = _most_rows(len(content))
    with _refusing(path):
        height = polars.scan_parquet(content).select(polars.len()).collect().item()
        frame = polars.read_parquet(content, n_rows=min(height, most) + 1, parallel="none", use_statistics=False)
    if dict(frame.schema) != _schema() or max(height, frame.height) > most:
        raise UsageError(
            f"{path}: holds {max(height, frame.height)} rows of {', '.join(frame.columns)}, not up to {most} of "
            f"{', '.join(SCHEMA_COLUMNS)}; remove the run's folder and do it again"
        )
    if not _plain(frame):
        raise UsageError(f"{path}: holds numbers that no run writes; remove the run's folder and run it again")
    return frame.select(SCHEMA_COLUMNS)


def _most_rows(size: int) -> int:
    """Give the most rows that a table of this many bytes may have."""
    return min(LARGEST_ROWS, ROWS + ROWS_A_BYTE * size)


def _plain(frame: polars.DataFrame) -> bool:
    """Tell whether every row is complete, with numbers that later computations can use."""
    import polars

    step, epoch, value = polars.col("step"), polars.col("epoch"), polars.col("value")
    # Norms of layers may overflow where training diverges. Values of the whole network are finite, or the run ends.
    good = (step >= 0) & (step <= LARGEST_STEP) & (epoch >= 0) & polars.col("quantity").is_not_null()
    good &= polars.col("layer").is_not_null() | (value.abs() <= LARGEST_NUMBER)
    return bool(frame.select((good & value.is_not_null()).fill_null(False).all()).item())


def read_tables(paths: Iterable[Path]) -> tuple[dict[Path, polars.DataFrame], dict[Path, str]]:
    """Read many tables that ``Recorder.frame`` gave; of those that cannot be read, give what is wrong."""
    tables: dict[Path, polars.DataFrame] = {}
    broken: dict[Path, str] = {}
    for some in _batches(list(dict.fromkeys(paths))):
        together = _read_together(some)
        if together is not None:
            tables.update(zip(some, together, strict=True))
            continue
        for path in some:  # read one by one, for an error message of each
            try:
                tables[path] = read_frame(path)
            except (OSError, UsageError) as error:
                broken[path] = str(error)
    return tables, broken


def _batches(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield paths so many at a time, fewer of large files."""
    some: list[Path] = []
    size = 0
    for path in paths:
        length = _size(path)
        if some and (len(some) == TOGETHER or size + length > LARGEST_TOGETHER):
            yield some
            some, size = [], 0
        some.append(path)
        size += length
    if some:
        yield some


def _read_together(paths: Sequence[Path]) -> list[polars.DataFrame] | None:
    """Read some tables by one call; None where one of them is damaged or they are too large."""
    import polars

    if any(kind_of(path) is not None for path in paths):
        return None
    most = _most_rows(sum(map(_size, paths)))
    options: Any = {"schema": _schema(), "parallel": "none", "use_statistics": False, "glob": False}
    try:
        with _refusing("tables"):
            scanned = polars.scan_parquet(list(paths), include_file_paths="file", **options)
            if scanned.select(polars.len()).collect().item() > most:
                return None
            whole = scanned.head(most + 1).collect()
    except UsageError:
        return None
    if whole.height > most or not _plain(whole):
        return None
    lengths = dict(whole["file"].rle().struct.unnest().select("value", "len").iter_rows())
    whole, frames, begin = whole.drop("file"), [], 0
    for path in paths:
        length = lengths.pop(str(path), 0)
        frames.append(whole.slice(begin, length))
        begin += length
    return None if lengths else frames


def _size(path: Path) -> int:
    """Give the bytes of a file; 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class Record:
    """A finished run."""

    folder: Path
    configuration: Configuration
    summary: dict[str, Any]  # of ``record.json``
    about: dict[str, Any]  # of ``run.json``: versions, hardware, times

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite."""
        return self.summary["diverged_at"] is not None

    @property
    def metrics_file(self) -> Path:
        """The file with every number of the run."""
        return self.folder / "metrics.parquet"

    def metrics(self) -> polars.DataFrame:
        """Read every number of the run: step, epoch, quantity, layer, value."""
        return read_frame(self.metrics_file)


def read_about(folder: str | Path) -> tuple[Configuration, dict[str, Any]]:
    """Read the configuration of a run, and the content of ``run.json``."""
    path = f"{folder}/run.json"
    about = read_signed(path)
    schema.check(about, schema.RUN, path)
    try:
        return Configuration(**about["configuration"]), about
    except TypeError as error:
        raise UsageError(f"{path}: is of another version of layerwise ({error})") from None


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the summary of a finished run."""
    path = f"{folder}/record.json"
    summary = read_signed(path)
    schema.check(summary, schema.RECORD, path)
    return summary


def read_run(place: Path) -> Record:
    """Read a finished run from its folder, and check that its files belong together."""
    folder = os.fspath(place)  # with thousands of runs, joining paths would take as long as reading them
    if os.path.islink(folder):
        raise UsageError(f"{folder}: is a link, not a folder of a run")
    configuration, about = read_about(folder)
    summary = read_summary(folder)
    if digest_of(f"{folder}/metrics.parquet") != summary["metrics_sha256"]:
        raise UsageError(f"{folder}: damaged: record.json does not belong to metrics.parquet")
    return Record(place, configuration, summary, about)
