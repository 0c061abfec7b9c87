"""A hook of mkdocs: links that leave `docs/` lead to pages that show those files, so that the site is whole by itself.

`../tests/test_x.py#test_y` becomes a page with the code of the file and a heading at that test. Markdown outside
`docs/` (`CONTRIBUTING.md`) becomes a page like any other.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = "source"  # of these pages in the site
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md")  # shown even if no page links to them
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?:#([^)\s]*))?(?=\))")

logger = get_plugin_logger("source_pages")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for every file of the repository that a page links to."""
    names: dict[str, set[str]] = {path: set() for path in PROJECT}
    texts = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    texts += [(path, (ROOT / path).read_text(encoding="utf-8")) for path in PROJECT]
    for origin, text in texts:
        for link in LINK.finditer(text):
            path = target(origin, link[1])
            if not path.startswith("docs/") and (ROOT / path).is_file():
                names.setdefault(path, set()).update([link[2]] if link[2] else [])
    for path, wanted in names.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        content = text if path.endswith(".md") else code_page(path, text, wanted)
        files.append(File.generated(config, page_of(path), content=content))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of `docs/` into links to those pages."""
    here: str = page.file.src_uri
    if here.startswith(f"{FOLDER}/") and here.endswith(".py.md"):
        return markdown  # nothing but code
    origin = here.removeprefix(f"{FOLDER}/") if here.startswith(f"{FOLDER}/") else f"docs/{here}"

    def led(link: re.Match[str]) -> str:
        path = target(origin, link[1])
        if path.startswith("docs/") and origin.startswith("docs/"):
            return link[0]
        if not (ROOT / path).is_file():
            logger.warning("%s links to %s, which is no file", origin, path)
            return link[0]
        return posixpath.relpath(page_of(path), posixpath.dirname(here)) + (f"#{link[2]}" if link[2] else "")

    return LINK.sub(led, markdown)


def target(origin: str, link: str) -> str:
    """Return the path in the repository that a link in the file `origin` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def page_of(path: str) -> str:
    """Return the page that shows a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def code_page(path: str, text: str, names: set[str]) -> str:
    """Show a Python file, with a heading before each function that is linked to."""
    lines = text.splitlines()
    starts = {0: ""}
    for node in ast.parse(text).body:
        for name in names & {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}:
            starts[min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1] = name
    order = sorted(starts)
    parts = [f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{path}`"]
    for first, last in zip(order, [*order[1:], len(lines)], strict=True):
        heading = f"\n## `{starts[first]}` {{ #{starts[first]} }}\n" if starts[first] else ""
        parts.append(heading + "\n`````python\n" + "\n".join(lines[first:last]).strip("\n") + "\n`````")
    return "\n".join(parts) + "\n"
