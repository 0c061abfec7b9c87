"""The files of a report: page, tables, figures, Markdown, and the list of its runs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.lab.conclusions import note
from layerwise.lab.outcome import Outcome
from layerwise.lab.report.drawing import Drawing
from layerwise.lab.report.found import RUNS
from layerwise.lab.report.headline import headline
from layerwise.lab.report.layouts import sheet
from layerwise.lab.report.page import Page, build, maps_drawn
from layerwise.lab.report.saved import PLAN, as_json
from layerwise.lab.report.sheets import Entry
from layerwise.lab.report.verdicts import verdicts
from layerwise.lab.report.words import FOUND, capital, place_words
from layerwise.lab.store import remove_leftovers, signed, usable_cores, write_whole

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
    """
    show(0, None)
    folder, results = outcome.folder, outcome.results
    for place in (outcome.settings.out, folder, folder / "tables", folder / "figures"):
        remove_leftovers(place)
    # Other processes draw the figures: tables are made, and figures written, meanwhile.
    pool, beside = ThreadPoolExecutor(usable_cores() + 1), ThreadPoolExecutor(1)
    try:
        images: list[Future[None]] = []

        def drawn(drawing: Drawing) -> None:
            images.append(pool.submit(_image, folder / "figures", drawing))

        for drawing in maps_drawn(results):  # first, as most figures are maps
            drawn(drawing)
        # Made before two threads ask for the same.
        verdicts(results)
        sheet(results)
        for key in results.records:
            results.metrics(key)
        rest = beside.submit(_write_rest, outcome)
        page = build(outcome, command, drawn)
        for done, image in enumerate(images):
            show(done, len(images))
            if rest.done():
                rest.result()
            image.result()
        rest.result()
    finally:  # an interrupt or a full disk does not wait for the figures that are left
        pool.shutdown(cancel_futures=True)
        beside.shutdown()
    _remove_others(folder / "figures", page)
    write_whole(outcome.report, _bytes(page.html))
    write_whole(outcome.settings.out / "report.html", _bytes(page.html))
    return outcome.report


def _write_rest(outcome: Outcome) -> None:
    """Write what is neither page nor figure."""
    folder = outcome.folder
    if outcome.results.records:
        _tables(outcome)
    write_whole(folder / "table.md", _bytes(markdown(outcome)))
    write_whole(folder / PLAN, signed(json.loads(as_json(outcome.plan)), indent=None))
    write_whole(folder / RUNS, json.dumps(_run_list(outcome), indent=1).encode())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _tables(outcome: Outcome) -> None:
    results, folder = outcome.results, outcome.folder / "tables"
    write_whole(folder / "table.parquet", _parquet(results.table()))
    write_whole(folder / "metrics.parquet", _parquet(results.frame()))
    write_whole(folder / "comparisons.parquet", _parquet(comparison_frame(outcome)))


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


def _image(folder: Path, drawing: Drawing) -> None:
    """Write a figure as SVG and PNG."""
    write_whole(folder / f"{drawing.name}.svg", _bytes(drawing.file), flush=False)
    write_whole(folder / f"{drawing.name}.png", drawing.png, flush=False)


def _remove_others(folder: Path, page: Page) -> None:
    """Remove the figures of an earlier page."""
    wanted = {f"{drawing.name}{ending}" for drawing in page.figures for ending in (".svg", ".png")}
    for path in folder.glob("*.*"):
        if path.suffix in (".svg", ".png") and path.name not in wanted:
            path.unlink(missing_ok=True)


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
