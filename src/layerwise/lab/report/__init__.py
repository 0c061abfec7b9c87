"""The report of an experiment: one HTML page that needs no network, with its tables and figures beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerwise.lab.experiments.runner import Outcome


def write(
    outcome: Outcome, command: str, show: Callable[[float, float | None], None] = lambda done, total: None
) -> Path:
    """Write the report of an outcome.

    Into the outcome's folder: ``report.html``, ``table.md``, ``plan.json``, ``runs.json``, ``tables/*.parquet``,
    ``figures/*.svg`` and ``figures/*.png``. A copy of the page goes to ``report.html`` in the folder of ``--out``.

    Args:
        outcome: of any plan.
        command: the command line that made it, or "".
        show: told how many figures are written, and of how many; that is not known while they are drawn.

    Returns:
        The page.
    """
    from layerwise.lab.report.files import write_all

    return write_all(outcome, command, show)


def prepare() -> None:
    """Import what a report needs and start its renderer, so that an interrupted experiment does not wait for them.

    Meant for a thread beside the runs. A module that is missing is reported where it is needed.
    """
    with suppress(ImportError, OSError):
        import jinja2  # noqa: F401
        import polars  # noqa: F401
        import scipy.special  # noqa: F401

        from layerwise.lab.report.drawing import vega

        vega("nothing", "", {"data": {"values": [{}]}, "mark": "point"})
