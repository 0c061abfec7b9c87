"""Records kept in memory."""

from __future__ import annotations

from .record import Record


class Memory:
    """Keeps every record in a list, for notebooks.

    Example:
        >>> sink = Memory()
        >>> sink(Record(50, ("conv",), [0.5], [2.0], [0.01], [1.5], [0.15], [0.005]))
        >>> [record.step for record in sink.records]
        [50]
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __call__(self, record: Record) -> None:
        """Append a record."""
        self.records.append(record)

    def __repr__(self) -> str:
        return f"Memory({len(self.records)} records)"
