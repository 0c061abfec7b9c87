"""The page of what is supported names tests that exist, for every trap one of its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "support.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| feature")]
TEST = re.compile(r"\[\w+\]\(\.\./(tests/[\w/]+\.py)#(\w+)\)")


def test_every_row_names_a_test():
    assert len(ROWS) > 40
    assert [row for row in ROWS if not TEST.search(row)] == []


@pytest.mark.parametrize(("file", "name"), TEST.findall(PAGE))
def test_a_test_that_is_named_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_trap_has_a_file_of_its_number():
    numbers = sorted({int(path.name.split("_")[2]) for path in (ROOT / "tests" / "traps").glob("test_trap_*.py")})
    assert numbers == list(range(1, 12))
