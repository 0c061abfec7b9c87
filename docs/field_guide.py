"""The matrix of the field guide, made of the tables of finished experiments: `python docs/field_guide.py --write`."""

from __future__ import annotations

import sys
from pathlib import Path

import polars

DOCS = Path(__file__).parent
PAGE = DOCS / "field-guide.md"
BEGIN, END = "<!-- begin: docs/field_guide.py -->", "<!-- end -->"


def experiments() -> list[Path]:
    """Return the folders of the experiments, each with the files that its report wrote."""
    return sorted(path.parent.parent for path in (DOCS / "field-guide").glob("*/tables/standings.parquet"))


def matrix() -> str:
    """Return a row for each setting and method: the verdict, and the differences to both plain arms."""
    lines = ["| setting | method | verdict | to tuned plain | to plain at the mean factor |", "|---|---|---|---:|---:|"]
    for folder in experiments():
        compared = polars.read_parquet(folder / "tables" / "comparisons.parquet")
        for row in polars.read_parquet(folder / "tables" / "standings.parquet").iter_rows(named=True):
            own = compared.filter((polars.col("subject") == row["subject"]) & (polars.col("arm") == row["item"]))
            plain = own.filter(polars.col("against_kind") == "plain")
            mean = own.filter(polars.col("against_control").is_in(["mean factor", "weighted mean factor"]))
            setting = f"[{row['subject_words']}](field-guide/{folder.name}/README.md)"
            cells = [setting, row["words"], f"**{row['word']}**", _difference(plain), _difference(mean)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(rows: polars.DataFrame) -> str:
    """Return the mean difference and its interval, or how many runs diverged where there is none."""
    row = rows.row(0, named=True)
    if row["low"] is None:
        return (
            f"{row['diverged']} and {row['diverged_against']} diverged" if row["mean"] is None else _signed(row["mean"])
        )
    return f"{_signed(row['mean'])} [{_signed(row['low'])}, {_signed(row['high'])}]"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


if __name__ == "__main__":
    made = matrix()
    sys.stdout.write(f"{made}\n")
    if "--write" in sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
