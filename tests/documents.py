"""The blocks of the README and of the pages in `docs/`, and how each of them is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>run by|not run:) (?P<words>[^\n]+?) -->\n)?"
    r"^(?P<fence>`{3,})(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=fence)\n(?:\n```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)


class Block(NamedTuple):
    """A block of code.

    `test` is the file of tests that runs it (`<!-- run by tests/file.py -->` in the line above the block), `reason` why
    it is not run (`<!-- not run: reason -->`); without either it is run after the blocks before it on its page.
    `output` is the block of text that follows it directly, which is what it prints; `…` stands for anything.
    """

    page: Path
    line: int
    language: str
    code: str
    output: str | None
    test: str | None
    reason: str | None


def blocks(page: str | Path, language: str = "python") -> list[Block]:
    """Return the blocks of a page in one language."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] != language:
            continue
        line = text.count("\n", 0, match.start("code"))
        test = match["words"] if match["kind"] == "run by" else None
        reason = match["words"] if match["kind"] == "not run:" else None
        found.append(Block(path, line, language, match["code"], match["output"], test, reason))
    return found


def code_of(page: str | Path, language: str = "python") -> list[str]:
    """Return the code of these blocks."""
    return [block.code for block in blocks(page, language)]


def agrees(expected: str, printed: str) -> bool:
    """Tell whether something printed is what a page says, in which `…` stands for anything within a line."""
    pattern = ".*".join(map(re.escape, expected.strip().split("…")))
    return re.fullmatch(pattern, printed.strip()) is not None
