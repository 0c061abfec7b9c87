"""Records as metrics of MLflow."""

from __future__ import annotations

import os
import random
import re
import time
from typing import Any

from .._arguments import StaysBehind
from .delivery import optional
from .record import Record

MOST = 1000
"""Metrics that MLflow takes in one call."""


class MLflow(StaysBehind):
    """Logs a record as metrics of an MLflow run, in one call per thousand metrics.

    MLflow allows letters, digits, `_`, `-`, `.` and blanks in a layer's name; any other character becomes `_`. The step
    waits for the server. Needs the package mlflow or mlflow-skinny.

    Args:
        run: A run or the id of one, which stays open. None takes the active run, or creates one that ends with the sink
            if there is none.
        tracking_uri: A server, a folder or a database; None takes MLflow's own setting. Recent versions accept a folder
            only with `MLFLOW_ALLOW_FILE_STORE=true` in the environment.
        experiment: The name of a new run's experiment, which is created if needed.

    Raises:
        ImportError: MLflow is not installed.
        TypeError: `run` is no run.

    Example:
        >>> sink = MLflow(tracking_uri="sqlite:///mlflow.db", experiment="digits")  # doctest: +SKIP
    """

    def __init__(
        self,
        run: Any = None,
        *,
        tracking_uri: str | os.PathLike[str] | None = None,
        experiment: str = "layerwise",
    ) -> None:
        if run is not None and not isinstance(run, str):
            run = getattr(getattr(run, "info", None), "run_id", run)
            if not isinstance(run, str):
                raise TypeError(f"run={run!r} must be a run of MLflow, the id of one, or None")
        state = random.getstate()  # MLflow draws its names from Python's random numbers
        try:
            mlflow = optional("mlflow", "MLflow", "mlflow-skinny")
            self._client = mlflow.MlflowClient(None if tracking_uri is None else os.fspath(tracking_uri))
            self._metric = mlflow.entities.Metric
            if run is None and tracking_uri is None and mlflow.active_run() is not None:
                run = mlflow.active_run().info.run_id
            self._own = run is None
            if run is None:
                found = self._client.get_experiment_by_name(experiment)
                number = self._client.create_experiment(experiment) if found is None else found.experiment_id
                run = self._client.create_run(number).info.run_id
            self.run_id: str = run
        finally:
            random.setstate(state)

    def __call__(self, record: Record) -> None:
        """Log a record."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, record.step) for name, value in record.scalars(legal_name)]
        for first in range(0, len(metrics), MOST):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + MOST])

    def close(self) -> None:
        """End the run if this sink created it."""
        if self._own:
            self._client.set_terminated(self.run_id)

    def __repr__(self) -> str:
        return f"MLflow({self.run_id!r})"


def legal_name(layer: str) -> str:
    """Return a layer's name with `_` for each character that MLflow refuses or reads as a folder.

    Example:
        >>> legal_name("blocks.*/attention")
        'blocks.__attention'
    """
    return re.sub(r"[^\w.\- ]", "_", layer)
