"""Every rule has a page; what it begins with can be typed, and its example runs by itself."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import rule_pages
import torch
from torch import nn

from documents import ROOT
from layerwise import LayerwiseLR
from layerwise.rules import ByRole, save_factors
from layerwise.rules.by_role import PRESETS

pytestmark = pytest.mark.full

NAMES = rule_pages.every_rule()
BY_HAND = [name for name in NAMES if (ROOT / "docs" / rule_pages.page_of(name)).exists()]


def shown(name: str) -> str:
    """Return the Markdown of a rule's page in the site."""
    uri = rule_pages.page_of(name)
    text = (ROOT / "docs" / uri).read_text(encoding="utf-8") if name in BY_HAND else rule_pages.page(name)
    return rule_pages.expanded(uri, text)


class Network(nn.Module):
    """One in which every rule finds what it needs: an embedding, blocks, LoRA's matrices and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 512)
        self.blocks = nn.ModuleList(nn.ModuleDict({"lora_B": nn.Linear(512, 512)}) for _ in range(4))
        self.head = nn.Linear(512, 2)

    def forward(self, x: Any) -> Any:
        x = self.embedding(x)
        for block in self.blocks:
            x = torch.tanh(block["lora_B"](x))
        return self.head(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_begins_with_what_to_type_and_it_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = shown(name)
    start = re.match(rf"# {name}\n\n[^\n#]+\n\n## Start\n\n```python\n(.*?)\n```\n\n\S", page, re.S)
    assert start, page[:300]
    if "Muon" in start[1] and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    monkeypatch.chdir(tmp_path)
    model = Network()
    save_factors(
        "factors.jsonl", [dict.fromkeys(["embedding", *(f"blocks.{i}.lora_B" for i in range(4)), "head"], 1.0)]
    )
    matrices = [block["lora_B"].weight for block in model.blocks]
    namespace: dict[str, Any] = {"model": model, "matrices": matrices}
    namespace["optimizer"] = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    exec(start[1], namespace)
    adapter = namespace["adapter"]
    assert isinstance(adapter, LayerwiseLR)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.arange(8)).square().mean().backward()
    namespace["optimizer"].step()
    assert not all(map(torch.equal, before, model.parameters()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_HAND])
def test_the_example_of_a_page_runs_where_nothing_is_imported(name: str) -> None:
    example = re.search(r"## Example\n\n```pycon\n(.*?)^```$", shown(name), re.S | re.M)
    assert example
    test = doctest.DocTestParser().get_doctest(example[1], {}, name, None, None)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_HAND])
def test_a_page_has_every_part(name: str) -> None:
    headings = re.findall(r"^## (.*)$", shown(name), re.M)
    own = ["Presets"] if name == "ByRole" else []
    before = ["Start", "Equation", "When it helps", "When not", "What it costs"]
    assert headings == [*before, *own, "Example", "Arguments", "Source"]
    assert shown(name).count("```{ .text .equation }\n") == 1


def test_the_tables_of_the_page_on_rules_name_each_rule_once() -> None:
    page = rule_pages.expanded("rules.md", (ROOT / "docs" / "rules.md").read_text(encoding="utf-8"))
    found = re.findall(r"^\| \[`(\w+)\([\w, ]*\)`\]\((rules/[\w-]+\.md)\)", page, re.M)
    assert sorted(found) == sorted((name, rule_pages.page_of(name)) for name in NAMES)
    assert "<!--" not in page


def test_a_rule_that_no_table_names_is_in_the_last_one() -> None:
    page = rule_pages.expanded("rules.md", "<!-- rules: LARS, LARC -->\n\n<!-- rules -->")
    first, last = page.split("</div>\n\n")
    assert re.findall(r"^\| \[`(\w+)", first, re.M) == ["LARS", "LARC"]
    assert len(re.findall(r"^\| \[`(\w+)", last, re.M)) == len(NAMES) - 2


def test_names_become_paths() -> None:
    assert [rule_pages.page_of(name) for name in ("LDoG", "LoRAPlus", "AdaGC", "InitialSNR", "AGC")] == [
        "rules/l-dog.md",
        "rules/lora-plus.md",
        "rules/ada-gc.md",
        "rules/initial-snr.md",
        "rules/agc.md",
    ]


def test_the_readme_names_rules_once_that_exist() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Rules\n")[1].split("\n## ")[0]
    named = re.findall(r"`([A-Z]\w+)`", table)
    assert len(named) >= 26
    assert len(set(named)) == len(named)
    assert set(named) <= set(NAMES)


def test_the_presets_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", rule_pages.presets(), re.M))
    read = {key: {w.split()[0]: float(w.split()[1]) for w in words.split(", ")} for key, words in rows.items()}
    assert read == PRESETS
    assert all(f'`"{key}"`' in (ByRole.__doc__ or "") for key in PRESETS)
