"""The pages of decisions: numbered without a gap, in the table and the navigation, and held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "decisions"
PAGES = sorted(path.name for path in FOLDER.glob("[0-9]*.md"))
TITLES = {name: (FOLDER / name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for name in PAGES}
PARTS = ["Question", "Decision", "Why", "Costs and alternatives", "Where"]


def test_they_are_numbered_without_a_gap():
    assert [TITLES[name][:5] for name in PAGES] == [f"{number:03d}. " for number in range(1, len(PAGES) + 1)]
    assert all(TITLES[name].startswith(name[:3]) for name in PAGES)


def test_the_table_names_each_once_with_its_title():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \|", table, flags=re.MULTILINE)
    assert [(page, f"{number}. {title}") for number, title, page in rows] == list(TITLES.items())


def test_the_navigation_holds_each_once():
    assert re.findall(r"decisions/(\d.*\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_parts_and_names_tests_that_exist(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == PARTS
    assert re.search(r"^Status: (accepted|replaced by \[\d{3}\]\(.+\))\.$", text, flags=re.MULTILINE)
    named = re.findall(r"\]\(\.\./\.\./(tests/[\w/]+\.py)#(\w+)\)", text)
    assert named
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}: {test}"
