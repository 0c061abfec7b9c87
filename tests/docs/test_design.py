"""The page of decisions has sections of one form that name tests; the map names all files of the core."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from documents import code_of

pytestmark = pytest.mark.full

DOCS = Path(__file__).parents[2] / "docs"
CORE = DOCS.parent / "src" / "layerwise"
MAP = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
TEXT = (DOCS / "design.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+)\n((?:(?!##).*\n)*)", TEXT, flags=re.MULTILINE))
AREAS = ["Optimizer", "Layers", "Statistics", "Rule", "Place", "Step", "The lab"]
PARTS = ["Decision", "Why", "Rejected", "Where"]


def test_the_page_is_short_and_in_the_order_of_the_data() -> None:
    assert len(TEXT.splitlines()) <= 300
    assert re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE) == AREAS
    assert len(SECTIONS) == TEXT.count("\n### ")


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_has_its_parts_and_names_tests_that_exist(title: str) -> None:
    text = SECTIONS[title]
    assert re.findall(r"\*\*(\w+)\.\*\*", text) == PARTS
    named = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)#(\w+)\)", text)
    assert named
    for file, test in named:
        tree = ast.parse((DOCS.parent / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}: {test}"


def test_the_map_names_every_file_of_the_core_and_no_other() -> None:
    rows = MAP.partition("| `src/layerwise/` |")[2].partition("### ")[0]
    named = {name for row in re.findall(r"^\| (`.+?) \|", rows, flags=re.M) for name in re.findall(r"`(.+?)`", row)}
    packages = {f"{path.parent.name}/" for path in CORE.glob("*/__init__.py")} - {"lab/"}
    assert named == {path.name for path in CORE.glob("*.py")} | packages


def test_a_step_takes_no_more_calls_than_the_walk_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = re.search(r"a step: (\d+) in (\d+) files, (\d+) of them", MAP)
    assert said
    (block,) = code_of("CONTRIBUTING.md")
    exec(block, {})
    calls, files, before = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert (calls <= int(said[1]), files, before <= int(said[3])) == (True, int(said[2]), True)
