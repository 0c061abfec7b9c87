"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim

import layerwise
from layerwise.statistics import NEEDS
from optimizer_cases import ALL, CASES, LATE, REFUSED, Case, network

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_its_code_runs_and_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"layerwise": layerwise}
    exec(BLOCKS[0], namespace)
    assert re.fullmatch(r"\{'1': 0\.0[12]\d+, '3': 0\.0[12]\d+\}\n", capsys.readouterr().out)
    for block in BLOCKS[1:]:
        exec(block, namespace)
    assert isinstance(namespace["InverseNorm"](), layerwise.rules.Rule)


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


def test_the_code_of_the_page_on_arguments_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    exec(blocks_of("arguments.md")[0], namespace)
    assert capsys.readouterr().out == "['[02]', '4']\n"
    adapter: Any = namespace["adapter"]
    assert adapter.get_last_factors()["4"] == 1.0


def test_the_rules_of_the_page_on_rules_run_and_the_one_with_a_state_is_loaded() -> None:
    namespace: Any = {}
    inverse, stateful, elementwise = blocks_of("rules.md")
    exec(inverse, namespace)
    assert issubclass(namespace["InverseNorm"], layerwise.rules.Rule)
    exec(stateful, namespace)
    mean, fresh = namespace["saved"]["state"]["0"]["mean"], torch.ones(2)
    assert not torch.equal(mean, fresh)
    assert torch.equal(namespace["adapter"].state_dict()["state"]["0"]["mean"], mean)
    exec(elementwise, namespace)
    assert all(0 < factor <= 10 and factor != 1 for factor in namespace["adapter"].get_last_factors().values())


def test_the_page_on_rules_names_every_statistic_in_order() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    table = page.split("### What a rule may ask for")[1].split("###")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == NEEDS


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


def test_a_negative_factor_goes_up_the_gradient_as_the_page_on_rules_says() -> None:
    class Up(layerwise.rules.Rule):
        needs = ()

        def factors(self, statistics: Any, state: Any) -> Any:
            return torch.tensor([-0.5]), state

    for place in ("gradient", "lr", "update"):
        model = torch.nn.Linear(2, 1, bias=False)
        before, gradient = model.weight.detach().clone(), torch.tensor([[1.0, -2.0]])
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        layerwise.LayerwiseLR(optimizer, Up(), model, apply=place)
        model.weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before + 0.05 * gradient)


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
