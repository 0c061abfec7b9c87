"""Numbers on hand-written pages are those of the script or of the pages that they come from."""

from __future__ import annotations

import importlib.util
import re

import pytest

from documents import ROOT

pytestmark = pytest.mark.full

MADE = ROOT / "docs" / "reproductions"
TABLE_1, TABLE_2 = (
    (MADE / name / "README.md").read_text(encoding="utf-8")
    for name in ("singh2015-table1-full", "singh2015-table2-reduced")
)
LARGER = (ROOT / "docs" / "larger-rate.md").read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Return the rows of a text's tables by their first cell, without the paper's numbers and without bold type."""
    lines = [re.sub(r"\*\*|\s*\(paper[^)]*\)", "", line) for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def section(text: str, name: str) -> str:
    return text.split(f"\n## {name}")[1].split("\n## ")[0]


@pytest.mark.skipif(not hasattr(__import__("torch").optim, "Muon"), reason="this torch has no Muon")
def test_the_table_of_the_page_on_places_is_what_its_script_measures(caplog: pytest.LogCaptureFixture) -> None:
    path = ROOT / "docs" / "measure_places.py"
    specification = importlib.util.spec_from_file_location("measure_places", path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8").split(script.BEGIN)[1].split(script.END)[0]
    measured, told = rows(script.table()), rows(page)
    assert list(told) == list(measured)
    assert told.keys() - {""} == script.OPTIMIZERS.keys()
    for name in script.OPTIMIZERS:
        for here, there in zip(measured[name], told[name], strict=True):
            assert here == there or float(here) == pytest.approx(float(there), abs=0.02), name


def test_the_first_table_on_larger_rates_is_that_of_table_i_after_1800_iterations() -> None:
    solvers = ("SGD", "NAG", "AdaGrad")
    of = {solver: rows(section(TABLE_1, solver + "\n")) for solver in solvers}
    told = rows(section(LARGER, "MNIST"))
    assert told.pop("") == list(solvers)
    assert told == {name: [of[solver][name][-1] for solver in solvers] for name in of["SGD"] if name in told}
    assert len(told) == 5


def test_the_second_table_on_larger_rates_is_that_of_table_ii() -> None:
    assert rows(section(LARGER, "CIFAR-10")) == rows(section(TABLE_2, "SGD\n"))


@pytest.mark.parametrize(("name", "source"), [("MNIST", TABLE_1), ("CIFAR-10", TABLE_2)])
def test_every_difference_and_p_on_larger_rates_stands_in_its_source(name: str, source: str) -> None:
    words = section(LARGER, name).split("\n\n**", 1)[1]
    source += (MADE / "README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"[+−]\d\.\d+ to [+−]\d\.\d+|[+−]?\d\.\d+", words)
    assert len(numbers) >= 2
    assert [number for number in numbers if number not in source] == []
