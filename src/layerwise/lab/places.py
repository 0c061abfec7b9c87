"""Where data sets are looked for and put."""

from __future__ import annotations

import os
from pathlib import Path

from layerwise.lab import data
from layerwise.lab.errors import UsageError


def home() -> Path:
    """Give the folder in which ``layerwise data`` puts data sets where no other is named."""
    from platformdirs import user_data_path

    return user_data_path("layerwise") / "data"


def data_dir(given: Path | None) -> Path | None:
    """Give the folder of the data sets.

    Args:
        given: by ``--data-dir``.

    Returns:
        It, or that of the environment variable LAYERWISE_DATA, or ``home()`` if it is there, or None.

    Raises:
        UsageError: the folder that was named does not exist.
    """
    if given is None and os.environ.get("LAYERWISE_DATA"):
        given = Path(os.environ["LAYERWISE_DATA"])
    if given is None:
        return home() if home().is_dir() else None
    if not given.is_dir():
        raise UsageError(
            f"data-dir={str(given)!r} is not a folder: give an existing one; layerwise data NAME says what it must hold"
        )
    return given


def require(name: str, folder: Path | None) -> None:
    """Refuse to begin without the data.

    Args:
        name: of the data set.
        folder: of ``data_dir``.

    Raises:
        UsageError: it is not there; the text says how to get it.
    """
    if data.present(name, folder):
        return
    where = "no folder of data sets is known" if folder is None else f"{folder} does not hold it"
    raise UsageError(
        f"this needs {data.known(name).title}, and {where}: layerwise data {name} fetches it or says where to put it; "
        "give its folder with --data-dir or LAYERWISE_DATA (--scale smoke needs no data)"
    )
