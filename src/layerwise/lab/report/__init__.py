"""The report of an experiment: one HTML page that needs no network, with its tables beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerwise.lab.experiments.runner import Outcome


def write(
    outcomes: Outcome | Sequence[Outcome],
    command: str,
    show: Callable[[float, float | None], None] = lambda done, total: None,
    *,
    figures: bool = False,
) -> Path:
    """Write the report of an outcome, or of several as sections of one page, and give the page.

    Into the outcome's folder: ``report.html``, ``table.md``, ``tables/*.parquet`` and, of one outcome, ``plan.json``
    and ``runs.json``; with ``figures`` every figure as ``figures/*.svg`` and ``figures/*.png``. A copy of the page goes
    to ``report.html`` in the folder of ``--out``. ``show`` gets how many figures are written, and of how many.
    """
    from layerwise.lab.report.files import write_all

    return write_all(outcomes if isinstance(outcomes, Sequence) else [outcomes], command, show, figures=figures)


def prepare() -> None:
    """Import what a report needs, so that an interrupted experiment does not wait for it.

    Meant for a thread beside the runs. A module that is missing is reported where it is needed.
    """
    with suppress(ImportError, OSError):
        import jinja2  # noqa: F401
        import polars  # noqa: F401
        import scipy.special  # noqa: F401

        from layerwise.lab.report.rendering import bundle

        bundle()
