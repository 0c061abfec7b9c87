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
    """A finished run.

    Attributes:
        folder: the folder of the run.
        configuration: the configuration of the run.
        summary: the content of ``record.json``: ``finals`` (quantity -> last value), ``diverged_at`` (number of updates
            before the first non-finite loss, or None), ``iterations``, ``epochs``, ``parameters``, ``seconds``
            and ``test_seconds`` (over all sessions), ``sessions``, ``processes`` (how many shared it, each once),
            ``factor`` (mean, spread and means by layer), ``weights`` (SHA-256 of the final weights), ``selections``,
            ``threads``, ``peak_memory`` (bytes, of the device that trained it).
        about: the content of ``run.json``: versions, hardware, times.
    """

    folder: Path
    configuration: Configuration
    summary: dict[str, Any]
    about: dict[str, Any]

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
    """Read the configuration of a run.

    Args:
        folder: the folder of the run.

    Returns:
        Its configuration, and the content of ``run.json``.

    Raises:
        OSError: the file does not exist or cannot be read.
        UsageError: it is damaged, or from another version of layerwise.
    """
    path = f"{folder}/run.json"
    about = read_signed(path)
    schema.check(about, schema.RUN, path)
    try:
        return Configuration(**about["configuration"]), about
    except TypeError as error:
        raise UsageError(f"{path}: is of another version of layerwise ({error})") from None


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the summary of a finished run; errors are those of ``read_about``."""
    path = f"{folder}/record.json"
    summary = read_signed(path)
    schema.check(summary, schema.RECORD, path)
    return summary


def read_run(place: Path) -> Record:
    """Read a finished run, and check that its files belong together.

    Args:
        place: its folder.

    Returns:
        The run.

    Raises:
        OSError: a file does not exist or cannot be read.
        UsageError: a file is damaged or no plain file, or the folder is a link.
    """
    folder = os.fspath(place)  # with thousands of runs, joining paths would take as long as reading them
    if os.path.islink(folder):
        raise UsageError(f"{folder}: is a link, not a folder of a run")
    configuration, about = read_about(folder)
    summary = read_summary(folder)
    if digest_of(f"{folder}/metrics.parquet") != summary["metrics_sha256"]:
        raise UsageError(f"{folder}: damaged: record.json does not belong to metrics.parquet")
    return Record(place, configuration, summary, about)
