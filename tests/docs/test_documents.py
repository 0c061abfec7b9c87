"""Every block of Python on a page runs and prints what the page says; every command of ours can be typed."""

from __future__ import annotations

import ast
import contextlib
import io
import random
import re
import shlex
from pathlib import Path

import pytest
import rule_pages
import torch

import layerwise
from documents import PAGES, ROOT, agrees, blocks

pytestmark = pytest.mark.full

OPTIONAL = {"accelerate", "lightning", "peft", "polars", "ray", "tensorboard", "transformers", "tyro"}
NOT_RUN = {"docs/sharded.md": 1}
"""How many blocks of a page are not run by any test; a new one is added here, with its reason on the page."""

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", [name for name in NAMES if any(not (b.test or b.reason) for b in blocks(name))])
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])  # what a script of the page reads is not how the tests were called
    random.seed(0)
    namespace: dict[str, object] = {"__name__": "__page__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(name):
            if block.test or block.reason:
                continue
            printed = io.StringIO()
            code = compile("\n" * block.line + block.code, str(block.page), "exec")
            try:
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"{error.name} is not installed")
            if block.output is not None:
                where = f"{name}, line {block.line}, prints\n{printed.getvalue()}"
                assert agrees(block.output, printed.getvalue()), where


def test_blocks_that_are_not_run_are_few_and_known() -> None:
    counted = {name: sum(block.reason is not None for block in blocks(name)) for name in NAMES}
    assert {name: count for name, count in counted.items() if count} == NOT_RUN


def test_a_block_that_another_test_runs_is_read_by_that_test() -> None:
    for name in NAMES:
        for block in blocks(name):
            if block.test:
                text = (ROOT / block.test).read_text(encoding="utf-8")
                assert Path(name).name in text, f"{name}, line {block.line}: {block.test} does not name the page"
                ast.parse(block.code)


def commands() -> list[tuple[str, str]]:
    found = []
    for name in NAMES:
        for block in blocks(name, "sh"):
            lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
            found += [(name, line) for line in lines if re.match(r"(\.venv/bin/)?layerwise ", line)]
    return found


@pytest.mark.parametrize(("name", "line"), commands())
def test_a_command_of_a_page_is_understood(name: str, line: str) -> None:
    pytest.importorskip("tyro", reason="the lab is not installed")
    from layerwise.lab import options
    from layerwise.lab.experiments import recipe

    asked = options.parse(shlex.split(line.partition(" > ")[0], comments=True)[1:])
    if isinstance(asked, options.Run | options.Sweep):
        assert asked.recipe in recipe.names()
        assert asked.scale is None or asked.scale in recipe.load(asked.recipe).content["scales"]
    for words in (getattr(asked, "vary", ()), getattr(asked, "tune", ())):
        assert all(options.assignments([word], "vary") for word in words)


def test_output_is_compared_and_dots_stand_for_anything_in_a_line() -> None:
    assert agrees("a … c\nd\n", "a b c\nd\n")
    assert not agrees("a … c", "a b\nc")
    assert not agrees("0.5", "0.50")


@pytest.mark.parametrize("name", NAMES)
def test_links_of_the_pages_lead_somewhere(name: str) -> None:
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    ):
        if not link.startswith("http"):
            assert ((ROOT / name).parent / link.partition("#")[0]).exists() or link.startswith("#"), link


def test_the_pages_of_the_api_name_everything_public() -> None:
    pages = {
        f"api/{page}": (ROOT / "docs" / "api" / page).read_text(encoding="utf-8") for page in ("index.md", "rules.md")
    }
    shown = "".join(rule_pages.expanded(uri, text) for uri, text in pages.items())
    public = {*layerwise.__all__, *layerwise.rules.__all__}
    assert {name for name in public if not re.search(rf"\b{name}\b", shown)} == set()
