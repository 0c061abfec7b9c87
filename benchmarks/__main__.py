"""What attaching costs: ratios to the bare optimizer, measured in turn in one process.

    python -m benchmarks [PART ...] [--rounds 30] [--threads 2] [--json FILE] [--page FOLDER]

Each row times both sides alternately, so that a change of the machine's speed meets both alike, and gives the median of
each, the median of the ratios of neighbours and the quartiles of those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import (
    amplification,
    backward,
    counts,
    growth,
    importing,
    iterations,
    lab,
    memory,
    methods,
    monitor,
    page,
    peers,
    sharded,
    steps,
    table1,
)

PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "steps": steps.measure,
    "iterations": iterations.measure,
    "peers": peers.measure,
    "methods": methods.measure,
    "growth": growth.measure,
    "counts": counts.measure,
    "memory": memory.measure,
    "import": importing.measure,
    "amplification": amplification.show,
    "monitor": monitor.show,
    "backward": backward.show,
    "sharded": sharded.measure,
    "lab": lab.show,
    "table1": table1.measure,
}


def main() -> int:
    """Run the benchmarks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--page", type=Path, help="write results.json and README.md there")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    machine = page.machine(arguments.threads, arguments.rounds)
    print(page.described(machine))
    results: dict[str, dict[str, Any]] = {}
    for part in arguments.parts or PARTS:
        torch.set_num_threads(arguments.threads)
        results[part] = PARTS[part](arguments.rounds)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine, "parts": results}, indent=1) + "\n")
        if arguments.page:
            page.write(arguments.page, machine, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
