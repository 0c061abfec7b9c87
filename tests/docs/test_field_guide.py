"""The field guide says what the stored tables of finished experiments show."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import polars
import pytest

from documents import ROOT
from layerwise.lab.stats.comparison import Comparison, Pair, judge

pytestmark = pytest.mark.full

specification = importlib.util.spec_from_file_location("field_guide", ROOT / "docs" / "field_guide.py")
assert specification is not None
assert specification.loader is not None
field_guide = importlib.util.module_from_spec(specification)
specification.loader.exec_module(field_guide)
FOLDERS = field_guide.experiments()


def tables(folder: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the comparisons and the verdicts of an experiment."""
    names = ("comparisons", "standings")
    compared, told = (polars.read_parquet(folder / "tables" / f"{name}.parquet") for name in names)
    return compared.to_dicts(), told.to_dicts()


def judged(rows: list[dict[str, Any]]) -> list[Comparison]:
    """Return what the stored differences of all planned comparisons show."""
    pairs = [
        Pair(
            subject=row["subject"],
            arm=row["arm"],
            against=row["against"],
            step=-1,
            values=dict(zip(row["seeds"], row["differences"], strict=True)),
            reference=dict.fromkeys(row["seeds"], 0.0),
        )
        for row in rows
    ]
    return judge(pairs, quantity=rows[0]["quantity"], higher_is_better=False, unit="points")


def test_the_matrix_is_that_of_the_stored_tables() -> None:
    page = field_guide.PAGE.read_text(encoding="utf-8")
    assert page.split(field_guide.BEGIN)[1].split(field_guide.END)[0].strip() == field_guide.matrix()
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_interval_follows_from_the_stored_differences(folder: Any) -> None:
    rows, _ = tables(folder)
    for row, each in zip(rows, judged(rows), strict=True):
        assert len(row["seeds"]) >= 5
        assert (row["diverged"], row["diverged_against"]) == (0, 0)
        assert row["mean"] == pytest.approx(math.fsum(row["differences"]) / len(row["differences"]), rel=1e-12)
        for name in ("mean", "low", "high", "adjusted_p"):
            assert getattr(each, name) == pytest.approx(row[name], rel=1e-9), (row["arm"], row["against"], name)
        assert each.outcome == row["outcome"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_verdict_follows_from_the_stored_differences(folder: Any) -> None:
    rows, told = tables(folder)
    found = list(zip(rows, judged(rows), strict=True))
    assert told
    for verdict in told:
        own = [
            (row, each) for row, each in found if (row["subject"], row["arm"]) == (verdict["subject"], verdict["item"])
        ]
        plain = [each for row, each in own if row["against_kind"] == "plain"]
        mean = [each for row, each in own if row["against_control"] in ("mean factor", "weighted mean factor")]
        assert plain
        assert mean
        if all(each.better for each in plain):
            expected = "helps" if all(each.better for each in mean) else "a larger rate"
        else:
            expected = "hurts" if any(each.worse for each in plain) else "not shown"
        assert verdict["word"] == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_mean_of_the_page_is_in_the_stored_table(folder: Any) -> None:
    table = polars.read_parquet(folder / "tables" / "table.parquet").filter(polars.col("quantity") == "test_error")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for row in table.to_dicts():
        assert f"{row['mean']:.2f}" in text
