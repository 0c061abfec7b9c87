"""The table that nobody here can fill: what attaching adds to a step on a GPU.

    python -m benchmarks.accelerator [--rounds 100] [--page docs/benchmarks]

Takes the optimizers' steps on ResNet-50's parameters on `cuda`, bare and attached in turn, each ended by a
synchronisation; prints the table and, with `--page`, writes it as `accelerator.json` and `accelerator.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import optim

import layerwise
from layerwise.rules import LARS, LayerAdaptive

from . import page
from .networks import resnet50_parameters, with_gradients
from .timing import Row, heading, ratio, show

SGD: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
CASES: list[tuple[str, Callable[[Any], optim.Optimizer], Any, dict[str, Any]]] = [
    ("SGD momentum", lambda p: optim.SGD(p, **SGD), LayerAdaptive(), {}),
    ("SGD momentum, fused", lambda p: optim.SGD(p, **SGD, fused=True), LayerAdaptive(), {}),
    ("SGD momentum, LARS", lambda p: optim.SGD(p, **SGD), LARS(), {}),
    ("AdamW", lambda p: optim.AdamW(p, lr=1e-6), LayerAdaptive(), {}),
    ("AdamW, update", lambda p: optim.AdamW(p, lr=1e-6), LayerAdaptive(), {"apply": "update"}),
    ("AdamW, fused", lambda p: optim.AdamW(p, lr=1e-6, fused=True), LayerAdaptive(), {}),
    ("AdamW, capturable", lambda p: optim.AdamW(p, lr=1e-6, capturable=True), LayerAdaptive(), {}),
]


def measure(rounds: int, device: str = "cuda") -> dict[str, Row]:
    """Print the table and return its rows."""
    rows: dict[str, Row] = {}
    heading(f"one step on {torch.cuda.get_device_name() if device == 'cuda' else device}")
    for name, make, rule, options in CASES:
        steps = []
        for attach in (False, True):
            model = with_gradients(resnet50_parameters()).to(device)
            for p in model.parameters():
                p.grad = 1e-2 * torch.randn_like(p)
            optimizer = make(model.parameters())
            if attach:
                layerwise.LayerwiseLR(optimizer, rule, model, **options)

            def step(optimizer: optim.Optimizer = optimizer) -> None:
                optimizer.step()
                if device == "cuda":
                    torch.cuda.synchronize()

            steps.append(step)
        rows[name] = show(name, ratio(steps[0], steps[1], rounds))
    return rows


def main() -> int:
    """Measure, if there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--page", type=Path, help="write accelerator.json and accelerator.md there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here; on this machine use python -m benchmarks", file=sys.stderr)
        return 1
    rows = measure(arguments.rounds)
    if arguments.page:
        found = {**page.machine(torch.get_num_threads(), arguments.rounds), "device": torch.cuda.get_device_name()}
        arguments.page.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": found, "rows": rows}, indent=1)
        (arguments.page / "accelerator.json").write_text(text + "\n")
        title = f"{found['device']}, torch {found['torch']}"
        (arguments.page / "accelerator.md").write_text(page.section(title, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
