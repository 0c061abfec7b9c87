"""What only a GPU shows, in one command that installs nothing: tests, times of steps, a CUDA graph, a run of the lab.

    python -m benchmarks.gpu [--device cuda] [--only PART ...] [--minutes 8] [--page docs/benchmarks]

Each part is a process with its share of the minutes. The page is written once, after all parts, with those that failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from layerwise.lab.errors import LAB_MODULES

from . import page
from .accelerator import NETWORKS, graph, steps

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"tests": 0.35, "steps": 0.35, "graph": 0.08, "lab": 0.22}
NEEDS = {"tests": ("pytest", "numpy"), "lab": LAB_MODULES}
TESTS = ["tests/core", "tests/traps", "tests/process/test_accelerator_device.py"]
NOT_OF_A_DEVICE = (  # tests of packages, compilers, files and processes, or that need hypothesis
    *("core/test_compile", "core/test_sinks", "core/test_packages", "core/test_other_optimizers", "core/test_leaving"),
    *("core/test_monitor_hooks", "core/test_freed_memory", "core/test_layer_statistics", "core/test_sums"),
    *("traps/test_trap_04_compiled_hooks", "traps/test_trap_07_wrapped_optimizers", "traps/test_trap_08_sharded_norms"),
)
TITLES = {
    "tests": "Tests of the core: on this device, on fake CUDA tensors, and of what depends on no device",
    "steps": "One optimizer step: milliseconds (of CUDA events), medians and quartiles of interleaved pairs",
    "graph": "Steps of capturable AdamW with `LayerAdaptive`, replayed from a CUDA graph, against eager steps",
    "lab": "Table I at its smallest scale, which says nothing about the paper",
}


def commands(given: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of Python for each part."""
    sizes = ["--device", given.device, "--rounds", str(given.rounds), "--minutes", str(given.minutes), "--networks"]
    table = ["-m", "benchmarks.gpu", *sizes, *given.networks, "--page", str(folder), "--measure"]
    # A new driver or Python may bring warnings, which pyproject.toml makes errors.
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "default::FutureWarning", "-W", "default::DeprecationWarning"]
    ignored = [f"--ignore=tests/{name}.py" for name in NOT_OF_A_DEVICE]
    lab = ["--scale", "smoke", "--seeds", "1", "--jobs", "2", "--device", given.device, "--out", str(folder / "runs")]
    return {
        "tests": ["-m", "pytest", *quiet, *ignored, *given.tests],
        "steps": [*table, "steps"],
        "graph": [*table, "graph"],
        "lab": ["-m", "layerwise", "run", "singh2015-table1", *lab],
    }


def run(arguments: Sequence[str], device: str, limit: float) -> tuple[str, list[str]]:
    """Run Python, at most `limit` seconds, and print what it prints; return its result and its lines."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "LAYERWISE_TEST_DEVICE": device}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
    end, status, lines = time.monotonic() + limit, None, list[str]()
    # A file, since a pipe stays open as long as any child of the process lives.
    with tempfile.NamedTemporaryFile() as file, open(file.name, encoding="utf-8", errors="replace") as reader:
        process = subprocess.Popen([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            while status is None and time.monotonic() < end:
                time.sleep(0.1)
                status = process.poll()
                new = reader.read()
                print(new, end="", flush=True)
                lines.append(new)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = f"exit status {status}" if status is not None else f"stopped at its limit of {limit:.0f} s"
    return "passed" if status == 0 else f"failed: {failed}", "".join(lines).splitlines()


def measure(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the parts; return for each its result, its seconds, what it printed last, and its table."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        for part, arguments in commands(given, Path(name)).items():
            limit, start = 60 * given.minutes * SHARES[part], time.monotonic()
            missing = next((module for module in NEEDS.get(part, ()) if importlib.util.find_spec(module) is None), None)
            if part not in given.only:
                result, lines = "left out: not in --only", []
            elif missing is not None:
                result, lines = f"left out: this Python has no module {missing!r}", []
            else:
                print(f"\n{part}: at most {limit:.0f} s", flush=True)
                result, lines = run(arguments, given.device, limit)
            seconds = round(time.monotonic() - start, 1)
            print(f"{part}: {result} ({seconds} s)", flush=True)
            report = Path(name) / f"{part}.json"
            table = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
            # Not rows of dots, nor the place of a report that goes with the folder.
            lines = [line for line in lines if not line.startswith(("Report:", "Next:"))]
            shown = lines[-1:] if part == "tests" and result == "passed" else lines[-40:]
            found[part] = {"result": result, "seconds": seconds, "limit": limit, "printed": shown, **table}
    return found


def measure_here(given: argparse.Namespace) -> int:
    """Measure one table in this process, and write its report after each row."""
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seconds = 0.9 * 60 * given.minutes * SHARES["steps"]  # so that it ends by itself
    measured = steps(device, given.networks, given.rounds, seconds) if given.measure == "steps" else [graph(device)]
    report: dict[str, Any] = {}
    for report in measured:
        write(given.page / f"{given.measure}.json", json.dumps(report))
    for kind in ("left_out", "failed"):
        print(*(f"{kind.replace('_', ' ')}: {sentence}\n" for sentence in report[kind]), sep="", end="")
    print(f"{len(report['rows'])} rows, {len(report['failed'])} failures")
    return 1 if report["failed"] else 0


def write(file: Path, content: str) -> None:
    """Write a file so that it is whole or as it was."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(content, encoding="utf-8")
    os.replace(new, file)


def text(heading: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    lines = ["# On an accelerator", "", heading, "", "| part | result | seconds | at most |", "|---|---|---:|---:|"]
    lines += [f"| {part} | {of['result']} | {of['seconds']:g} | {of['limit']:.0f} |" for part, of in found.items()]
    for part, of in found.items():
        lines += ["", page.section(TITLES[part], of.get("rows", {})).rstrip(), ""]
        if of["result"] != "passed" or "rows" not in of:
            lines += ["```text", *(of["printed"] or [of["result"]]), "```", ""]
        lines += [f"* Left out: {sentence}" for sentence in of.get("left_out", ())]
        lines += [f"* Failed: {sentence}" for sentence in of.get("failed", ())]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write the page; the exit status is 1 if a part failed, 2 if there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the command")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=[*SHARES], metavar="PART")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--rounds", type=int, default=50, help="pairs of steps that are timed")
    parser.add_argument("--page", type=Path, help="write accelerator.json and accelerator.md in this folder")
    parser.add_argument("--measure", choices=("steps", "graph"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch {torch.__version__} finds no GPU; --device cpu tries the command")
    if given.measure:
        return measure_here(given)
    machine = page.machine(torch.get_num_threads(), given.rounds)
    machine["device"] = torch.cuda.get_device_name(given.device) if given.device != "cpu" else "a CPU"
    found = measure(given)
    if given.page:
        given.page.mkdir(parents=True, exist_ok=True)
        heading = f"Made by `make gpu` on {machine['device']}; {page.described(machine)}."
        write(given.page / "accelerator.json", json.dumps({"machine": machine, "parts": found}, indent=1) + "\n")
        write(given.page / "accelerator.md", text(heading, found))
    return 1 if any(of["result"].startswith("failed") for of in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
