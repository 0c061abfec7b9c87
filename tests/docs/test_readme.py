"""The README and the pages on arguments, rules and places say what is true."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import optim

import layerwise
from documents import ROOT, code_of
from layerwise.statistics import NEEDS
from optimizer_cases import ALL, CASES, LATE, REFUSED, Case, network

pytestmark = pytest.mark.full

PLACES = (ROOT / "docs" / "places.md").read_text(encoding="utf-8")


def test_its_code_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = code_of("README.md")
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rpartition("# ")[2].strip()


def test_it_is_short_and_begins_with_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 600
    assert text[: text.index("```python")].count("\n") <= 5


def test_the_code_of_the_page_on_arguments_excludes_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    exec(code_of("docs/arguments.md")[0], namespace)
    assert capsys.readouterr().out == "['[02]', '4']\n"
    adapter: Any = namespace["adapter"]
    assert adapter.get_last_factors()["4"] == 1.0


def test_the_rule_with_a_state_of_the_page_on_rules_of_ones_own_is_loaded() -> None:
    namespace: Any = {}
    for block in code_of("docs/own-rule.md"):
        exec(block, namespace)
        if "saved" in namespace and "Root" not in namespace:
            mean, fresh = namespace["saved"]["state"]["0"]["mean"], torch.ones(2)
            assert not torch.equal(mean, fresh)
            assert torch.equal(namespace["adapter"].state_dict()["state"]["0"]["mean"], mean)
    assert all(0 < factor <= 10 and factor != 1 for factor in namespace["adapter"].get_last_factors().values())


def test_the_page_on_rules_of_ones_own_shows_one_in_ten_lines_and_names_every_statistic_in_order() -> None:
    page = (ROOT / "docs" / "own-rule.md").read_text(encoding="utf-8")
    rule = code_of("docs/own-rule.md")[0].split("\n\n\n")[1]
    assert rule.startswith("class InverseNorm")
    assert len(rule.splitlines()) <= 10
    table = page.split("## What a rule may ask for")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == NEEDS


def test_a_negative_factor_goes_up_the_gradient_as_the_page_on_rules_of_ones_own_says() -> None:
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
    table = PLACES.split('## What `"auto"` takes')[1].split("## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize("case", [c for c in CASES if not c.form], ids=str)
def test_the_table_of_places_names_the_place_that_auto_takes(case: Case) -> None:
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


def test_the_table_of_places_names_every_optimizer() -> None:
    named = {name for row in rows() for name in re.split(r",\s*|\s", row)}
    assert {c.__name__ for c in ALL} <= named
    assert {c.__name__ for c in REFUSED} == {"LBFGS"}
