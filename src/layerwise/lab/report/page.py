"""What the pages of all reports share: one HTML file that needs no network, how it was run, and its writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from layerwise.lab.plan import Outcome
from layerwise.lab.report.drawing import svg
from layerwise.lab.store import write_whole
from layerwise.lab.verdict import confidence_note


def origins(outcome: Outcome, about: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Say how, on what and with what the runs were made; runs of several machines are all named.

    Args:
        outcome: of a demo.
        about: what this demo has to say of its network and schedule.

    Returns:
        Names and words.
    """
    records = list(outcome.results.records.values())
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items())) for record in records
    )
    machines = Counter("{processor}, {cores} cores, {system}".format(**record["hardware"]) for record in records)
    seconds = sum(record["seconds"] for record in records)
    now = f"{outcome.seconds:.0f} s in {outcome.jobs} process{'es' if outcome.jobs > 1 else ''}"
    if outcome.found == len(records):
        now = "no run was needed this time"
    return [
        ("Data", outcome.title),
        *about,
        ("Seeds", ", ".join(str(seed) for seed in outcome.results.seeds)),
        ("Runs", f"{len(records)} of {outcome.planned} finished; {outcome.found} of them were found finished"),
        ("Versions", "; ".join(versions)),
        ("Hardware", "; ".join(machines)),
        ("Time", f"{now}; all runs together {seconds:.0f} s, each on one thread"),
    ]


def fill(template: str, outcome: Outcome, command: str, **context: Any) -> str:
    """Make a page.

    Args:
        template: file beside this one, which extends ``layout.html.j2``.
        outcome: of a demo, with at least one finished run.
        command: the command line that made it.
        context: ``summary``, ``about``, ``caveats`` and what else the template asks for.

    Returns:
        HTML, with every string escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    results = outcome.results
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(
        complete=len(results.records) == outcome.planned,
        finished=len(results.records),
        planned=outcome.planned,
        interrupted=outcome.interrupted,
        failures=outcome.failures,
        note=confidence_note(results.family, len(results.seeds)),
        command=command,
        origins=origins(outcome, context.pop("about")),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **context,
    )


def write(outcome: Outcome, html: str) -> Path:
    """Write a page to its file.

    Args:
        outcome: of a demo.
        html: of its report.

    Returns:
        The file.
    """
    write_whole(outcome.report, html.encode())
    return outcome.report


def prepare() -> None:
    """Import what a report needs and start its renderer, so that an interrupted demo does not wait for them.

    Meant for a thread beside the runs. A module that is missing is reported where it is needed.
    """
    with suppress(ImportError):
        import jinja2  # noqa: F401
        import scipy.special  # noqa: F401

        svg({"data": {"values": [{}]}, "mark": "point"}, "", "nothing")
