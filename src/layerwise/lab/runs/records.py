"""A finished run, read from its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs import schema
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.record import read_frame
from layerwise.lab.runs.store import digest_of, read_signed

if TYPE_CHECKING:
    import polars


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

    def series(self, quantity: str) -> list[tuple[int, float]]:
        """Give the pairs of step and value of a quantity of the whole network."""
        import polars

        rows = self.metrics().filter((polars.col("quantity") == quantity) & polars.col("layer").is_null())
        return list(zip(rows["step"].to_list(), rows["value"].to_list(), strict=True))


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
