"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import optim

import layerwise
from optimizer_cases import ALL, CASES, LATE, REFUSED, Case, network

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_its_code_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"layerwise": layerwise}
    exec(BLOCKS[0], namespace)
    assert re.fullmatch(r"\{'1': 0\.0[12]\d+, '3': 0\.0[12]\d+\}\n", capsys.readouterr().out)
    for block in BLOCKS[1:]:
        exec(block, namespace)
    assert isinstance(namespace["InverseNorm"](), layerwise.rules.Rule)


def rows() -> dict[str, list[str]]:
    table = README.split("## Where the factor acts")[1].split("## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize("case", [c for c in CASES if not c.form], ids=str)
def test_its_table_names_the_place_that_auto_takes(case: Case) -> None:
    name = case.optimizer.__name__
    if case.optimizer is optim.SGD:
        momentum = "momentum" in case.options
        row = "SGD with momentum, Nesterov" if momentum else "SGD without momentum"
    else:
        row = next(row for row in rows() if name in re.split(r",\s*", row))
    model = network(case)
    adapter = layerwise.LayerwiseLR(case.make(model.parameters()), layerwise.rules.LayerAdaptive(), model)
    assert rows()[row][0].startswith(f'`"{adapter.apply}"`')
    assert ("refused" in rows()[row][2]) == (case.optimizer in LATE)


def test_its_table_names_every_optimizer() -> None:
    named = {name for row in rows() for name in re.split(r",\s*|\s", row)}
    assert {c.__name__ for c in ALL} <= named
    assert {c.__name__ for c in REFUSED} == {"LBFGS"}
