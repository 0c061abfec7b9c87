"""A hook of mkdocs: the table of rules, their pages and their entries in the API follow from their docstrings.

`<!-- rules -->` stands for the table in `rules.md` and for the entries in `api/rules.md`. A rule without a page
`rules/its-name.md` of its own gets one of its docstring.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from layerwise import rules
from layerwise.rules.by_role import PRESETS

MARK = "<!-- rules -->"
DOCS = Path(__file__).parent


def every_rule() -> list[str]:
    """Return the names of the public rules, but for the classes that rules derive from."""
    bases = (rules.Rule, rules.ElementwiseRule)
    kinds = {name: getattr(rules, name) for name in sorted(rules.__all__, key=str.casefold)}
    return [name for name, k in kinds.items() if isinstance(k, type) and issubclass(k, bases) and k not in bases]


def page_of(name: str) -> str:
    """Return the page of a rule."""
    return f"rules/{re.sub(r'(?<=[a-z])(?=[A-Z][a-z])', '-', name).lower()}.md"


def page(name: str) -> str:
    """Return a page of a rule's docstring: what to type, what it is, when it helps and what it costs, an example."""
    text = inspect.getdoc(getattr(rules, name)) or ""
    sections = re.split(r"^(Args|Raises|Example|Reference):\n", text, flags=re.M)
    summary, equation, *rest = sections[0].strip().split("\n\n")
    parts = dict(zip(sections[1::2], map(inspect.cleandoc, sections[2::2]), strict=True))
    begin = [part for part in rest if part.startswith("Begin with")]
    formula = "```text\n" + equation.replace("`", "") + "\n```"
    lines = [f"# {name}", *begin, summary, formula, *(part for part in rest if part not in begin)]
    if name == "ByRole":
        lines += ["## Presets", presets()]
    lines += ["## Example", f"```python\n{parts['Example']}\n```", "## Source", parts["Reference"]]
    return "\n\n".join([*lines, f"Arguments and errors: [API](../api/rules.md#layerwise.rules.{name}).\n"])


def presets() -> str:
    """Return the table of `ByRole`'s presets."""
    rows = ["| preset | factor of each role or part of a name; all else has 1 |", "|---|---|"]
    for preset, ratios in PRESETS.items():
        rows.append(f"| `{preset}` | {', '.join(f'`{role}` {factor:g}' for role, factor in ratios.items())} |")
    return "\n".join(rows)


def table() -> str:
    """Return the table of rules: signature, summary, equation and source of each."""
    rows = ["| rule | what it is | factor of layer l | source |", "|---|---|---|---|"]
    for name in every_rule():
        text = inspect.getdoc(getattr(rules, name)) or ""
        summary, equation = (" ".join(part.split()) for part in text.split("\n\n")[:2])
        parameters = inspect.signature(getattr(rules, name)).parameters.values()
        required = ", ".join(one.name for one in parameters if one.default is one.empty)
        rows.append(
            f"| [`{name}({required})`]({page_of(name)}) | {summary} | {re.split(': ', equation)[0]} | {source(text)} |"
        )
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
    nav[1:1] = [{name: page_of(name)} for name in every_rule()]


def on_files(files: Any, config: Any) -> None:
    """Add the pages that follow from docstrings."""
    from mkdocs.structure.files import File  # the table is made where mkdocs is not installed, too

    for name in every_rule():
        if not (DOCS / page_of(name)).exists():
            files.append(File.generated(config, page_of(name), content=page(name)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the mark."""
    return expanded(page.file.src_uri, markdown)
