"""A hook of mkdocs: the table of rules, their entries in the API and in the navigation follow from their docstrings.

`<!-- rules -->` stands for the table in `rules.md` and for the entries in `api/rules.md`. The table links a rule to its
page `rules/its-name.md`, or where there is none to its entry in the API.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from layerwise import rules

MARK = "<!-- rules -->"
DOCS = Path(__file__).parent


def every_rule() -> list[str]:
    """Return the names of the public rules, but for the classes that rules derive from."""
    bases = (rules.Rule, rules.ElementwiseRule)
    kinds = {name: getattr(rules, name) for name in sorted(rules.__all__, key=str.casefold)}
    return [name for name, k in kinds.items() if isinstance(k, type) and issubclass(k, bases) and k not in bases]


def page_of(name: str) -> str | None:
    """Return the page of a rule, or None."""
    path = f"rules/{re.sub(r'(?<=[a-z])(?=[A-Z])', '-', name).lower()}.md"
    return path if (DOCS / path).exists() else None


def table() -> str:
    """Return the table of rules: signature, summary, equation and source of each."""
    rows = ["| rule | what it is | factor of layer l | source |", "|---|---|---|---|"]
    for name in every_rule():
        text = inspect.getdoc(getattr(rules, name)) or ""
        summary, equation = (" ".join(part.split()) for part in text.split("\n\n")[:2])
        parameters = inspect.signature(getattr(rules, name)).parameters.values()
        required = ", ".join(one.name for one in parameters if one.default is one.empty)
        link = page_of(name) or f"api/rules.md#layerwise.rules.{name}"
        rows.append(f"| [`{name}({required})`]({link}) | {summary} | {re.split(': ', equation)[0]} | {source(text)} |")
    return "\n".join(rows)


def source(docstring: str) -> str:
    """Return the authors and the year of a docstring's reference."""
    reference = " ".join(docstring.partition("Reference:")[2].split())
    until_year = re.match(r"(.*?)\b((?:19|20)\d\d)\b", reference)
    return "" if until_year is None else f"{until_year[1].partition(':')[0].strip()} {until_year[2]}"


def entries(page: str) -> str:
    """Return the entries in the API of the rules that the page does not name itself."""
    named = re.findall(r"^::: layerwise\.rules\.(\w+)$", page, re.M)
    return "\n\n".join(
        f"::: layerwise.rules.{name}\n    options: {{members: false}}" for name in every_rule() if name not in named
    )


def expanded(uri: str, markdown: str) -> str:
    """Return the Markdown of a page with the mark replaced."""
    return markdown.replace(MARK, table() if uri == "rules.md" else entries(markdown)) if MARK in markdown else markdown


def on_config(config: Any) -> None:
    """Add the pages of rules to the navigation, after the table."""
    nav = next(entry["Rules"] for entry in config.nav if "Rules" in entry)
    nav[1:1] = [{name: page} for name in every_rule() if (page := page_of(name))]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the mark."""
    return expanded(page.file.src_uri, markdown)
