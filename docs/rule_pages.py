"""A hook of mkdocs: tables, pages, entries in the API and in the navigation of the rules follow from their docstrings.

`<!-- rules: Name, Name -->` stands in `rules.md` for a table of these rules, `<!-- rules -->` for one of those that no
other mark names. `<!-- rules -->` in `api/rules.md` stands for the entries there. A rule has the page
`rules/its-name.md`. It begins with what the docstring says under "Start:", also where the rest of it is written by
hand; else all of it is made of the docstring.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import layerwise
from layerwise import rules
from layerwise.rules import by_name
from layerwise.rules.by_role import PRESETS

MARK = re.compile(r"<!-- rules(?:: ([\w, ]+))? -->")
DOCS = Path(__file__).parent
PARTS = {"When it helps": "When it helps", "When not": "When not", "Costs": "What it costs", "Presets": "Presets"}
"""What a docstring says in a paragraph, and the headings of its page."""


class Docstring(NamedTuple):
    """The parts of a rule's docstring; `parts` has those of `PARTS` and the sections such as `Args`."""

    summary: str
    equation: str
    start: str
    details: list[str]
    parts: dict[str, str]


def every_rule() -> list[str]:
    """Return the names of the public rules, but for the classes that rules derive from."""
    return [*by_name.every_rule()]


def docstring_of(name: str) -> Docstring:
    """Return the parts of a rule's docstring."""
    text, *sections = re.split(r"^(\w+):\n(?=    )", inspect.getdoc(getattr(rules, name)) or "", flags=re.M)
    parts = {key: inspect.cleandoc("\n" + body) for key, body in zip(sections[::2], sections[1::2], strict=True)}
    summary, equation, *paragraphs = (re.sub(r" *\n *", " ", one) for one in text.strip().split("\n\n"))
    start, details = "", []
    for paragraph in paragraphs:
        _, *said = re.split(rf"(?:^| )({'|'.join(PARTS)}): ", paragraph)
        if paragraph.startswith("Start: "):
            start = paragraph.removeprefix("Start: ")
        elif paragraph.startswith(tuple(f"{one}: " for one in PARTS)):
            parts |= {key: body[0].upper() + body[1:] for key, body in zip(said[::2], said[1::2], strict=True)}
        else:
            details.append(paragraph)
    return Docstring(summary, equation, start, details, parts)


def page_of(name: str) -> str:
    """Return the path of a rule's page."""
    return f"rules/{by_name.hyphenated(name)}.md"


# --- Tables and entries -----------------------------------------------------------------------------------------------


def table(names: list[str]) -> str:
    """Return a table of rules: signature, summary, equation and source of each."""
    if not names:
        return ""
    rows = ["| rule | what it is | factor of layer l | source |", "|---|---|---|---|"]
    for name in names:
        text = docstring_of(name)
        parameters = inspect.signature(getattr(rules, name)).parameters.values()
        required = ", ".join(one.name for one in parameters if one.default is one.empty)
        equation = re.split(": ", text.equation)[0]
        rows.append(f"| [`{name}({required})`]({page_of(name)}) | {text.summary} | {equation} | {source(text)} |")
    return "\n".join(['<div class="rules" markdown>', "", *rows, "", "</div>"])


def source(text: Docstring) -> str:
    """Return the authors and the year of a docstring's reference."""
    until_year = re.match(r"(.*?)\b((?:19|20)\d\d)\b", " ".join(text.parts.get("Reference", "").split()))
    return "" if until_year is None else f"{until_year[1].partition(':')[0].strip()} {until_year[2]}"


def entries(page: str) -> str:
    """Return the entries in the API of the rules that the page does not name itself."""
    named = re.findall(r"^::: layerwise\.rules\.(\w+)$", page, re.M)
    return "\n\n".join(
        f"::: layerwise.rules.{name}\n    options: {{members: false}}" for name in every_rule() if name not in named
    )


def expanded(uri: str, markdown: str) -> str:
    """Return the Markdown of a page with its marks replaced, or a hand-written page of a rule with its start."""
    if uri != "rules.md":
        written = next((name for name in every_rule() if page_of(name) == uri and "\n## Start\n" not in markdown), None)
        if written is not None:
            start = f"{docstring_of(written).summary}\n\n{beginning(written)}"
            return re.sub(r"\A# .*\n", lambda title: f"{title[0]}\n{start}", markdown)
        return MARK.sub(lambda _: entries(markdown), markdown)
    named = re.findall(r"\w+", " ".join(MARK.findall(markdown)))
    rest = [name for name in every_rule() if name not in named]
    return MARK.sub(lambda mark: table(re.findall(r"\w+", mark[1] or "") or rest), markdown)


# --- A page -----------------------------------------------------------------------------------------------------------


def beginning(name: str) -> str:
    """Return what a page begins with: what to type, and the rate to begin with."""
    call, made, words = start_of(name)
    code = f"{made}\nadapter = {call}" if made else f"adapter = {call}"
    used = set(re.findall(r"\b[A-Za-z]\w*(?=\()", code))
    imports = ["from layerwise import LayerwiseLR"]
    for package, names in (("layerwise.rules", rules.__all__), ("torch.optim", used - {*rules.__all__, "LayerwiseLR"})):
        if found := sorted(used & {*names} - {"parameters"}, key=str.casefold):
            imports.append(f"from {package} import {', '.join(found)}")
    return f"## Start\n\n```python\n{chr(10).join(imports)}\n\n{code}\n```\n\n{words}\n"


def start_of(name: str) -> tuple[str, str, str]:
    """Return the call and the optimizer that "Start:" names, "" for one of the user's own, and its other words."""
    start = re.fullmatch(r"`(LayerwiseLR\(.*?\))`(?: with `(optimizer = .*?)`)?\. (.*)", docstring_of(name).start)
    if start is None:
        raise ValueError(
            f"{name}: its docstring needs 'Start: `LayerwiseLR(…)`.' or '… with `optimizer = …`.', and a rate"
        )
    return start[1], start[2] or "", start[3]


def page(name: str) -> str:
    """Return the page of a rule, all of it from the docstring."""
    text = docstring_of(name)
    equation = re.sub(r"[,;]  ", "\n", text.equation)
    said = [f"## {heading}\n\n{text.parts[key]}" for key, heading in PARTS.items() if key in text.parts]
    in_the_api = f"[API](../api/rules.md#layerwise.rules.{name})."
    parts = [
        f"# {name}\n\n{text.summary}",
        beginning(name).rstrip(),
        f"## Equation\n\n```{{ .text .equation }}\n{equation}\n```",
        *text.details,
        *said,
        *([presets()] if "Presets" in text.parts else []),
        f"## Example\n\n```pycon\n{example(name)}\n```",
        f"## Arguments\n\n{arguments(name)}\n\n{defaults(name)}",
        f"## Source\n\n{text.parts.get('Reference', 'This rule is ours.')} {in_the_api}",
    ]
    return "\n\n".join(parts) + "\n"


def presets() -> str:
    """Return a table of the presets of `ByRole`."""
    rows = (
        f"| `{key}` | {', '.join(f'{role} {ratio:g}' for role, ratio in preset.items())} |"
        for key, preset in PRESETS.items()
    )
    return "\n".join(["| preset | factors; 1 for every other role |", "|---|---|", *rows])


def example(name: str) -> str:
    """Return the example of the docstring after the imports that it needs."""
    text = docstring_of(name).parts["Example"]
    module = importlib.import_module(getattr(rules, name).__module__)
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>> ", "... ", "...")))
    used = dict.fromkeys(node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))
    return "\n".join([*sorted(filter(None, (imported(module, one) for one in used))), text])


def imported(module: Any, name: str) -> str | None:
    """Return the line that imports what a name of a module stands for; None for a name that it does not have."""
    thing = vars(module).get(name)
    if inspect.ismodule(thing):
        package, _, own = thing.__name__.rpartition(".")
        return f">>> from {package} import {own}" if package else f">>> import {own}"
    if thing is None:
        return None
    public = next((one.__name__ for one in (rules, layerwise) if name in one.__all__), thing.__module__)
    return f">>> from {public} import {name}"


def arguments(name: str) -> str:
    """Return a table of the arguments and their defaults."""
    parameters = inspect.signature(getattr(rules, name)).parameters
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", docstring_of(name).parts["Args"], re.M)
    rows = []
    for key, words in entries:
        default = parameters[key].default
        shown = "required" if default is parameters[key].empty else f"`{default!r}`"
        rows.append(f"| `{key}` | {shown} | {' '.join(words.split())} |")
    return "\n".join(["| argument | default | |", "|---|---|---|", *rows])


def defaults(name: str) -> str:
    """Return a table of what attaching takes for the rule."""
    return "\n".join(["| by default | |", "|---|---|", *(f"| {key} | {words} |" for key, words in chosen(name))])


def chosen(name: str) -> Iterator[tuple[str, str]]:
    """Yield what `"auto"` stands for."""
    kind = getattr(rules, name)
    yield "layers", "single parameters" if kind.default_layers == "parameter" else "modules"
    if kind.default_exclude is not None:
        yield "left out", "parameters of at most one dimension; they keep the factor 1"
    where = "[where a factor acts](../places.md)"
    if len(kind.places) == 1:
        yield "place", f'`"{kind.places[0]}"`, and no other ({where})'
    elif kind.default_place == "gradient":
        others = "refused for optimizers such as Adam" if kind.needs_scale else '`"lr"` for others'
        yield "place", f'`"gradient"` for SGD with momentum, {others} ({where})'
    else:
        yield "place", f'`"lr"` ({where})'
    if kind.default_place == "gradient":
        yield "coupled weight decay", "scaled" if kind.default_decay == "scaled" else "not scaled"


# --- What mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> None:
    """Add the pages of rules to the navigation, after the tables."""
    nav = next(entry["Rules"] for entry in config.nav if "Rules" in entry)
    nav[1:1] = [{name: page_of(name)} for name in every_rule()]


def on_files(files: Any, config: Any) -> None:
    """Add the page of each rule that is not written by hand."""
    from mkdocs.structure.files import File  # here, so that tests of the pages need no mkdocs

    for name in every_rule():
        if not (DOCS / page_of(name)).exists():
            files.append(File.generated(config, page_of(name), content=page(name)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the marks."""
    return expanded(page.file.src_uri, markdown)
