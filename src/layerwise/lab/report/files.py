"""The files of a report: page, tables, figures, Markdown, and the list of its runs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.lab.errors import shown
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.drawing import Drawing
from layerwise.lab.report.found import RUNS
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.page import build, maps_drawn
from layerwise.lab.report.saved import PLAN, as_json
from layerwise.lab.report.sheets import Entry
from layerwise.lab.report.verdicts import verdicts
from layerwise.lab.report.words import FOUND, capital, place_words
from layerwise.lab.runs.files import OwnFolder, check_page, remove_leftovers
from layerwise.lab.runs.store import signed, usable_cores, write_whole
from layerwise.lab.stats.conclusions import note

if TYPE_CHECKING:
    import polars

MEANT = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]|#"} | {sign: f"&#{ord(sign)};" for sign in "<>&"})
"""Signs of Markdown and HTML -> how they are written to mean themselves."""


def write_all(
    outcome: Outcome, command: str, show: Callable[[float, float | None], None] = lambda done, total: None
) -> Path:
    """Write everything.

    Args:
        outcome: of a plan.
        command: the command line that made it.
        show: told how many figures are written, and of how many.

    Returns:
        The page. It comes last, so that a page that is there has its tables and figures.

    Raises:
        UsageError: a place where a file is to be written holds one that layerwise has not written.
    """
    show(0, None)
    results, own = outcome.results, OwnFolder(outcome.folder, outcome.settings.out)
    copy = outcome.settings.out / "report.html"
    check_page(copy, outcome.settings.out)
    remove_leftovers(outcome.settings.out, [copy.name])
    # Other processes draw the figures: tables are made meanwhile.
    pool, beside = ThreadPoolExecutor(usable_cores() + 1), ThreadPoolExecutor(1)
    try:
        images: list[Future[dict[str, bytes]]] = []

        def drawn(drawing: Drawing) -> None:
            images.append(pool.submit(_image, drawing))

        for drawing in maps_drawn(results):  # first, as most figures are maps
            drawn(drawing)
        # Made before two threads ask for the same.
        verdicts(results)
        sheet(results)
        for key in results.records:
            results.metrics(key)
        rest = beside.submit(_rest, outcome)
        page = build(outcome, command, drawn)
        contents: dict[str, bytes] = {}
        for done, image in enumerate(images):
            show(done, len(images))
            if rest.done():
                rest.result()
            contents |= image.result()
        html = _bytes(page.html)
        # All is there before anything is written, so that one file of somebody else's keeps all as they were.
        own.write({**contents, **rest.result(), outcome.report.name: html})
    finally:  # an interrupt does not wait for the figures that are left
        pool.shutdown(cancel_futures=True)
        beside.shutdown()
    write_whole(copy, html)
    return outcome.report


def _rest(outcome: Outcome) -> dict[str, bytes]:
    """Make what is neither page nor figure."""
    return {
        **(_tables(outcome) if outcome.results.records else {}),
        "table.md": _bytes(markdown(outcome)),
        PLAN: signed(json.loads(as_json(outcome.plan)), indent=None),
        RUNS: json.dumps(_run_list(outcome), indent=1).encode(),
    }


def _bytes(text: str) -> bytes:
    """Write a page, table or drawing, with whatever is not seen in it written out."""
    return shown(text, lines=True).encode()


def _tables(outcome: Outcome) -> dict[str, bytes]:
    frames = {
        "table": outcome.results.table(),
        "metrics": outcome.results.frame(),
        "comparisons": comparison_frame(outcome),
    }
    return {f"tables/{name}.parquet": _parquet(frame) for name, frame in frames.items()}


def _parquet(frame: polars.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def comparison_frame(outcome: Outcome) -> polars.DataFrame:
    """Give every planned comparison as a row: names, numbers, outcome and sentence."""
    import polars

    rows = [
        {
            "subject": subject,
            "arm": arm,
            "against": against,
            "step": step,
            "quantity": each.quantity,
            "pairs": len(each.seeds),
            "mean": each.mean,
            "sd": each.sd,
            "low": each.low,
            "high": each.high,
            "p": each.p,
            "adjusted_p": each.adjusted_p,
            "outcome": each.outcome,
            "reason": each.reason,
            "diverged": len(each.diverged),
            "diverged_against": len(each.diverged_against),
            "seeds": list(each.seeds),
            "differences": list(each.differences),
            "sentence": each.sentence,
        }
        for (subject, arm, against, step), each in outcome.results.comparisons().items()
    ]
    floats = dict.fromkeys(("mean", "sd", "low", "high", "p", "adjusted_p"), polars.Float64)
    lists = {"seeds": polars.List(polars.Int64), "differences": polars.List(polars.Float64)}
    return polars.DataFrame(rows, schema_overrides={**floats, **lists, "step": polars.Int64}, infer_schema_length=None)


def _run_list(outcome: Outcome) -> dict[str, object]:
    """Name the experiment and where its finished runs are, relative to its folder."""
    above: dict[Path, str] = {}

    def place(folder: Path) -> str:
        if folder.parent not in above:
            above[folder.parent] = os.path.relpath(folder.parent, outcome.folder)
        return os.path.normpath(os.path.join(above[folder.parent], folder.name))

    return {
        "plan": outcome.plan.name,
        "runs": [
            {"subject": subject, "arm": arm, "seed": seed, "folder": place(record.folder)}
            for (subject, arm, seed), record in sorted(outcome.results.records.items())
        ],
    }


def _image(drawing: Drawing) -> dict[str, bytes]:
    """Make the files of a figure, SVG and PNG."""
    place = f"figures/{drawing.name}"
    return {f"{place}.svg": _bytes(drawing.file), f"{place}.png": drawing.png}


def markdown(outcome: Outcome) -> str:
    """Write the table of results and the verdict in Markdown.

    Args:
        outcome: of a plan.

    Returns:
        The text, with what Markdown or HTML would read as signs of their own escaped.
    """
    return "\n".join(_markdown(outcome)) + "\n"


def _markdown(outcome: Outcome) -> Iterator[str]:
    plan, results = outcome.plan, outcome.results
    table = sheet(results)
    scale = f", {plan.scale} scale" if plan.scale else ""
    yield f"# {escaped(plan.title)}"
    yield f"\n{escaped(plan.source)}{scale}. {len(results.records)} of {outcome.planned} runs finished.\n"
    if plan.found:
        yield f"{escaped(FOUND)}\n"
    yield f"**{escaped(headline(outcome))}**\n"
    yield f"{escaped(capital(table.lead))}.\n"
    for title, rows in table.sections:
        if title:
            yield f"\n## {escaped(title)}\n"
        yield f"| {escaped(table.corner)} | " + " | ".join(map(escaped, table.columns)) + " |"
        yield "|---|" + "---:|" * len(table.columns)
        for row in rows:
            remark = f" ({escaped(row.remark)})" if row.remark else ""
            cells = [cell_markdown(one) for one in row.entries]
            yield f"| {escaped(row.words)}{remark} | " + " | ".join(cells) + " |"
    for words in table.notes:
        yield f"\n- {escaped(words)}"
    yield f"\n## Verdict, {escaped(place_words(plan))}\n"
    for verdict in verdicts(results):
        yield f"- {escaped(verdict.subject_words)}, {escaped(verdict.words)}: {escaped(verdict.conclusion)}"
        for _, comparison in verdict.rows:
            yield f"  - {escaped(capital(comparison.sentence))}"
    yield f"\n{escaped(note(max(1, results.family), len(plan.seeds), planned=not plan.found))}"


def cell_markdown(one: Entry) -> str:
    """Write a cell in one line."""
    below = [f"{name} {words}".strip() for name, words in one.lines]
    if one.off is not None:
        below.append(one.off_words)
    main = f"**{one.main}** {one.spread}".rstrip() if one.best else one.text
    return escaped(main.replace("**", "\0")).replace("\0", "**") + (f" ({escaped(', '.join(below))})" if below else "")


def escaped(text: str) -> str:
    """Take their meaning from the signs of Markdown and HTML, and keep a text on one line."""
    return " ".join(text.split()).translate(MEANT)
