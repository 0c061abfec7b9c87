"""The page of what was measured: `docs/benchmarks/README.md`, made from `results.json` beside it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import layerwise

TITLES = {
    "steps": "One optimizer step",
    "iterations": "A whole training iteration",
    "peers": "Other implementations, and what the memory allows",
    "methods": "Further methods, and other implementations of them",
    "growth": "Growth",
    "counts": "Operations on an accelerator, counted on tensors that only claim to be there",
    "memory": "Memory",
    "import": "Import",
    "amplification": "Gradient amplification",
    "monitor": "Monitor",
    "backward": "Step in backward",
    "sharded": "Sharded",
    "lab": "The lab",
    "table1": "Table I in the lab",
}
HEAD = """# Benchmarks

Made by `make bench-page` on {machine}.

"Ratio" is the time with layerwise over the time without, measured in turn in one process: the median of the
rounds that a part names, with its quartiles. Absolute times are this machine's. [notes.md](notes.md) tells what was
tried, what it gave, and what stands between these numbers and the limit. Nothing has been
measured on a GPU: where there is one, `make gpu PYTHON=…` writes `accelerator.md` beside this page, with a Python whose
PyTorch finds it.
"""


def machine(threads: int, rounds: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "rounds": rounds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "layerwise": layerwise.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def described(found: Mapping[str, Any]) -> str:
    """Return the machine as a phrase."""
    return (
        f"{found['processor']}, {found['cores']} cores, {found['threads']} threads, torch {found['torch']}, "
        f"Python {found['python']}"
    )


def write(folder: Path, found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `results.json` and the page; parts that were not measured now stay as they were.

    Args:
        folder: Where to; made if it is not there.
        found: The machine.
        results: The rows of each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    parts = {**before["parts"], **results}
    machine = {name: value for name, value in found.items() if name != "rounds"}
    rounds = {**before.get("rounds", {}), **dict.fromkeys(results, found["rounds"])}
    file.write_text(json.dumps({"machine": machine, "rounds": rounds, "parts": parts}, indent=1) + "\n")
    text = [HEAD.format(machine=described(machine))]
    for part, title in TITLES.items():
        if part in parts:
            text.append(section(f"{title}, {rounds[part]} rounds" if _timed(parts[part]) else title, parts[part]))
    (folder / "README.md").write_text("\n".join(text))


def _timed(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether a part holds times that are medians over rounds."""
    return any("ratio_low" in row for row in rows.values())


def section(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a part as Markdown: a table for each set of columns that its rows have."""
    lines = [f"## {title}\n"]
    shape: tuple[str, ...] = ()
    for name, row in rows.items():
        cells = columns(row)
        if tuple(cells) != shape:
            shape = tuple(cells)
            lines += ["", f"| | {' | '.join(shape)} |", f"|---|{'---:|' * len(shape)}"]
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's cells by their headings."""
    cells: dict[str, str] = {}
    last = {name: row[name] for name in ("target",) if name in row}
    for name, value in {**{name: value for name, value in row.items() if name != "target"}, **last}.items():
        if name in ("ratio_low", "ratio_high"):
            continue
        if name == "ratio" and "ratio_low" in row:
            cells["ratio (quartiles)"] = f"{value:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
            continue
        heading = name.replace("_", " ")
        if name == "target":
            reached = next((row[of] for of in ("to_bound", "ratio", "seconds", "kept_a_parameter") if of in row), None)
            missed = value is not None and reached is not None and reached > value
            missed = missed or (value is not None and row.get("throughput", value) < value)
            cells[heading] = "" if value is None else f"{value:g}{', missed' if missed else ''}"
        elif isinstance(value, float):
            cells[heading] = f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
        else:
            cells[heading] = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return cells
