"""Records as TensorBoard scalars."""

from __future__ import annotations

import os
from typing import Any

from .._arguments import StaysBehind
from .delivery import optional
from .record import Record


class TensorBoard(StaysBehind):
    """Writes one scalar per quantity and layer, `layerwise/QUANTITY/LAYER`, at the record's step.

    Needs the package tensorboard, unless `target` is a writer.

    Args:
        target: A folder for a new event file, which is flushed every ten seconds, or a writer with `add_scalar`, such
            as a `torch.utils.tensorboard.SummaryWriter` or Lightning's `logger.experiment`, which stays open.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: `target` is neither.

    Example:
        >>> import tempfile
        >>> sink = TensorBoard(tempfile.mkdtemp())
        >>> sink(Record(50, ("conv",), [0.5], [2.0], [0.01], [1.5], [0.15], [0.005]))
        >>> sink.close()
    """

    def __init__(self, target: Any) -> None:
        self._own = isinstance(target, str | os.PathLike)
        if not self._own and not callable(getattr(target, "add_scalar", None)):
            raise TypeError(f"target={target!r} must be a folder, or a writer with add_scalar")
        if self._own:
            module = optional("torch.utils.tensorboard", "TensorBoard", "tensorboard")
            target = module.SummaryWriter(os.fspath(target), flush_secs=10)
        self._writer = target

    def __call__(self, record: Record) -> None:
        """Write a record."""
        for name, value in record.scalars():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flush the writer, and close it if this sink created it."""
        if self._own:
            self._writer.close()
        elif hasattr(self._writer, "flush"):
            self._writer.flush()

    def __repr__(self) -> str:
        return f"TensorBoard({str(getattr(self._writer, 'log_dir', self._writer))!r})"
