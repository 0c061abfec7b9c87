"""Records as a folder of Parquet files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from .._arguments import StaysBehind, check_count
from .delivery import optional
from .record import QUANTITIES, Record


class Parquet(StaysBehind):
    """Writes a folder of Parquet files, one row per layer and step: `step`, `layer`, and one column per quantity.

    Every `records_per_file` records become one file `part-000001.parquet`. It is written under a name that begins with
    a dot and then renamed. So each file is whole, may be read while training goes on, and never changes again. A killed
    run loses at most the records that are not in a file yet. A folder that already holds files gets further ones, as a
    resumed run needs it. A step that was repeated appears twice, and the later file holds the later one. Needs the
    package polars.

    Args:
        path: The folder; created if needed. Read `FOLDER/*.parquet`.
        records_per_file: How many records make a file; at least 1.

    Raises:
        ImportError: polars is not installed.
        OSError: The folder cannot be created.
        TypeError: `records_per_file` is no whole number.
        ValueError: `records_per_file` is less than 1.

    Example:
        >>> import polars, tempfile
        >>> sink = Parquet(tempfile.mkdtemp())
        >>> sink(Record(50, ("conv",), [0.5], [2.0], [0.01], [1.5], [0.15], [0.005]))
        >>> sink.close()
        >>> polars.read_parquet(f"{sink.path}/*.parquet").row(0)
        (50, 'conv', 0.5, 2.0, 0.01, 1.5, 0.15, 0.005)
    """

    def __init__(self, path: str | os.PathLike[str], records_per_file: int = 20) -> None:
        check_count("records_per_file", records_per_file)
        self._polars = optional("polars", "Parquet", "polars")
        self.path = Path(path).absolute()  # the program may change its folder
        self.records_per_file = records_per_file
        self.path.mkdir(parents=True, exist_ok=True)
        self._gathered: list[Record] = []

    def __call__(self, record: Record) -> None:
        """Take a record, and write a file when there are enough."""
        self._gathered.append(record)
        if len(self._gathered) >= self.records_per_file:
            self.close()

    def close(self) -> None:
        """Write the records that are not in a file yet; later ones begin another file."""
        if not self._gathered:
            return
        polars, records = self._polars, self._gathered
        columns = {
            "step": [record.step for record in records for _ in record.layers],
            "layer": [layer for record in records for layer in record.layers],
            **{quantity: [x for record in records for x in getattr(record, quantity)] for quantity in QUANTITIES},
        }
        schema = {"step": polars.Int64, "layer": polars.String, **dict.fromkeys(QUANTITIES, polars.Float64)}
        numbers = [int(path.stem[5:]) for path in self.path.glob("part-*.parquet") if path.stem[5:].isdecimal()]
        temporary = self.path / f".part.parquet.{os.getpid()}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as stream:  # a new file: an existing link is not followed
                polars.DataFrame(columns, schema=schema).write_parquet(stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._give_name(temporary, max(numbers, default=0) + 1)
        finally:
            temporary.unlink(missing_ok=True)
        self._gathered = []

    def _give_name(self, temporary: Path, number: int) -> None:
        """Give a whole file the next free name; another process may have taken the first one."""
        for candidate in itertools.count(number):
            whole = self.path / f"part-{candidate:06}.parquet"
            if os.path.lexists(whole):
                continue
            try:
                os.link(temporary, whole)
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                os.replace(temporary, whole)
            return

    def __repr__(self) -> str:
        return f"Parquet({str(self.path)!r})"
