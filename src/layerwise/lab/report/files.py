"""The files of a report: page, tables, figures, Markdown, and the list of its runs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars

from layerwise.lab.errors import shown
from layerwise.lab.experiments.runner import Outcome
from layerwise.lab.report.page import build
from layerwise.lab.report.rendering import bundle, template
from layerwise.lab.report.saved import PLAN, RUNS, as_json
from layerwise.lab.report.tables import result_table
from layerwise.lab.report.trials import cost, trial_rows
from layerwise.lab.report.verdicts import MEANINGS, headline, note, standings, verdicts
from layerwise.lab.report.words import capital, place_words
from layerwise.lab.runs.files import OwnFolder, check_page, remove_leftovers
from layerwise.lab.runs.store import signed, write_whole

MEANT = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]|#"} | {sign: f"&#{ord(sign)};" for sign in "<>&"})
"""Signs of Markdown and HTML -> how they are written to mean themselves."""


def write(
    given: Outcome | Sequence[Outcome],
    command: str,
    show: Callable[[float, float | None], None] = lambda done, total: None,
    *,
    figures: bool = False,
) -> Path:
    """Write the report of an outcome, or of several as sections of one page, and give the page.

    Into the outcome's folder: ``report.html``, ``table.md``, ``tables/*.parquet`` and, of one outcome, ``plan.json``
    and ``runs.json``; with ``figures`` every figure as ``figures/*.svg`` and ``figures/*.png``, of which ``show`` gets
    the count. A copy of the page goes to ``report.html`` in the folder of ``--out``. The page comes last, so that one
    that is there has its tables and figures. A place with a file that layerwise has not written is refused.
    """
    outcomes = given if isinstance(given, Sequence) else [given]
    first, several = outcomes[0], len(outcomes) > 1
    own = OwnFolder(first.folder, first.settings.out)
    copy = first.settings.out / "report.html"
    check_page(copy, first.settings.out)
    remove_leftovers(first.settings.out, [copy.name])
    page = build(outcomes, command)
    contents: dict[str, bytes] = {}
    for done, figure in enumerate(page.figures if figures else ()):
        show(done, len(page.figures))
        contents |= figure.files()
    for place, outcome in enumerate(outcomes, start=1):
        if outcome.results.records:
            frames = {
                "table": outcome.results.table(),
                "metrics": outcome.results.frame(),
                "comparisons": comparison_frame(outcome),
            }
            if standing := standings(outcome.results):
                frames["standings"] = polars.DataFrame(list(map(vars, standing)))
            for name, frame in frames.items():
                buffer = io.BytesIO()
                frame.write_parquet(buffer, compression="zstd")
                contents[f"tables/{f'{place}-' if several else ''}{name}.parquet"] = buffer.getvalue()
    contents["table.md"] = shown("\n\n".join(map(markdown, outcomes)), lines=True).encode()
    if not several:
        contents[PLAN] = signed(json.loads(as_json(first.plan)), indent=None)
        contents[RUNS] = json.dumps(listing(first), indent=1).encode()
    html = page.html.encode()
    # All is there before anything is written, so that one file of somebody else's keeps all as they were.
    own.write({**contents, first.report.name: html})
    write_whole(copy, html)
    return first.report


def prepare() -> None:
    """Import what a report needs, in a thread beside the runs, so that an interrupted experiment does not wait for it.

    A module that is missing is reported where it is needed.
    """
    with suppress(ImportError, OSError):
        import jinja2  # noqa: F401
        import scipy.special  # noqa: F401

        bundle()


def comparison_frame(outcome: Outcome) -> polars.DataFrame:
    """Give every planned comparison as a row: names, numbers, outcome and sentence."""
    same = ("mean", "sd", "low", "high", "p", "adjusted_p", "outcome", "reason")
    rows = [
        {
            "subject": subject,
            "arm": arm,
            "against": against,
            "against_kind": outcome.plan.arm(against).kind,
            "against_control": outcome.plan.arm(against).control,
            "step": step,
            "quantity": each.quantity,
            "pairs": len(each.seeds),
            **{name: getattr(each, name) for name in same},
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
    types: dict[str, Any] = {**floats, **lists, "step": polars.Int64, "against_control": polars.String}
    return polars.DataFrame(rows, schema_overrides=types, infer_schema_length=None)


def listing(outcome: Outcome) -> dict[str, object]:
    """Name the experiment and where its finished runs are, relative to its folder."""
    return {
        "plan": outcome.plan.name,
        "runs": [
            {"subject": subject, "arm": arm, "seed": seed, "folder": os.path.relpath(record.folder, outcome.folder)}
            for (subject, arm, seed), record in sorted(outcome.results.records.items())
        ],
    }


def markdown(outcome: Outcome) -> str:
    """Write the table of results and every comparison in Markdown; names have no meaning in Markdown or HTML."""
    plan, results, table = outcome.plan, outcome.results, result_table(outcome.results)
    text = template("table.md.j2", finalize=escaped).render(
        plan=plan,
        finished=len(results.records),
        planned=outcome.planned,
        headline=headline(outcome),
        table=table,
        lead=capital(table.lead),
        verdicts=[each for verdict in verdicts(results) for each in verdict.split()],
        place=place_words(plan),
        note=note(max(1, results.family), len(plan.seeds)),
        standings=standings(results),
        meanings=MEANINGS,
        trials=trial_rows(plan),
        cost="" if plan.tuning is None else cost(plan.tuning),
    )
    return f"{text.rstrip()}\n"


def escaped(words: object) -> str:
    """Take their meaning from the signs of Markdown and HTML, and keep a text on one line."""
    return " ".join(str(words).split()).translate(MEANT)
