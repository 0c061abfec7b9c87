"""Records as charts of Weights & Biases."""

from __future__ import annotations

import atexit
from typing import Any

from .._arguments import StaysBehind
from .delivery import optional
from .record import Record

STEP = "layerwise/step"
"""The horizontal axis of the charts."""


class WandB(StaysBehind):
    """Logs a record as one row of a Weights & Biases run, over its own axis, `layerwise/step`.

    Each record is one `run.log(…)`, which increments W&B's own step. Log other values without `step=`, because W&B
    drops values of past steps. Needs the package wandb.

    Args:
        run: A run, which stays open. None creates one, which ends with the sink.
        settings: Arguments of `wandb.init`, such as `project="digits", mode="offline"`.

    Raises:
        ImportError: wandb is not installed.
        TypeError: `run` is no run, or there are both a run and settings.

    Example:
        >>> sink = WandB(project="digits", mode="offline")  # doctest: +SKIP
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        if run is not None and settings:
            raise TypeError(f"run={run!r} is there already, so {sorted(settings)} would have no effect; leave one out")
        if run is not None and not (hasattr(run, "log") and hasattr(run, "define_metric")):
            raise TypeError(f"run={run!r} must be a run of Weights & Biases, or None for a new one")
        self._own = run is None
        self._run: Any = optional("wandb", "WandB", "wandb").init(**settings) if self._own else run
        if self._own:
            atexit.register(self.close)  # before W&B's own exit handler, after which no run can be ended
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("layerwise/*", step_metric=STEP)

    def __call__(self, record: Record) -> None:
        """Log a record."""
        self._run.log({STEP: record.step, **dict(record.scalars())})

    def close(self) -> None:
        """End the run if this sink created it."""
        if self._own:
            self._own = False
            atexit.unregister(self.close)
            self._run.finish()

    def __repr__(self) -> str:
        return f"WandB({getattr(self._run, 'name', None) or getattr(self._run, 'id', None)!r})"
