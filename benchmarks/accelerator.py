"""What attaching adds to a step on a GPU, and a step captured in a CUDA graph: two parts of `make gpu`.

On a CPU, which serves to try this file, the clock times the steps and nothing is captured.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile

import layerwise
from layerwise.rules import LARS, LayerAdaptive

from .networks import resnet50_parameters, small_layers, with_gradients
from .timing import Row, heading, ratio, show

Report = dict[str, Any]  # `rows` by name; `left_out` and `failed`: sentences
SGD: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
CASES: dict[str, tuple[Callable[[Any], optim.Optimizer], Any, dict[str, Any]]] = {
    "SGD, foreach": (lambda p: optim.SGD(p, **SGD, foreach=True), LayerAdaptive(), {}),
    "SGD, foreach, LARS": (lambda p: optim.SGD(p, **SGD, foreach=True), LARS(), {}),
    "SGD, fused": (lambda p: optim.SGD(p, **SGD, fused=True), LayerAdaptive(), {}),
    "AdamW, foreach": (lambda p: optim.AdamW(p, lr=1e-6, foreach=True), LayerAdaptive(), {}),
    "AdamW, foreach, update": (lambda p: optim.AdamW(p, 1e-6, foreach=True), LayerAdaptive(), {"apply": "update"}),
    "AdamW, fused": (lambda p: optim.AdamW(p, lr=1e-6, fused=True), LayerAdaptive(), {}),
    "AdamW, capturable": (lambda p: optim.AdamW(p, 1e-6, foreach=True, capturable=True), LayerAdaptive(), {}),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{f"{count:,} layers": partial(small_layers, count) for count in (10, 160, 1000)},
    "ResNet-50": resnet50_parameters,
}
TOLERANCE, WARM_UP, REPLAYS = 1e-6, 3, 4


def build(network: str, case: str, device: torch.device, *, attach: bool) -> optim.Optimizer:
    """Return an optimizer whose parameters have gradients."""
    make, rule, options = CASES[case]
    model = with_gradients(NETWORKS[network]()).to(device)
    optimizer = make(model.parameters())
    if attach:
        layerwise.LayerwiseLR(optimizer, rule, model, **options)
    return optimizer


def elapsed(step: Callable[[], Any]) -> float:
    """Return a step's milliseconds between two CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def times(network: str, case: str, device: torch.device, rounds: int) -> Row:
    """Time steps, bare and attached in turn."""
    sides = [build(network, case, device, attach=attach).step for attach in (False, True)]
    arms = [partial(elapsed, step) for step in sides] if device.type == "cuda" else sides
    row = ratio(arms[0], arms[1], rounds)
    show(f"{network}, {case}", row)
    return row


def counts(network: str, case: str, device: torch.device) -> Row:
    """Count a step's launches, reads and memory at its peak, bare and attached; on a CPU its operations."""
    row: Row = {}
    on_cuda = device.type == "cuda"
    for attach, side in enumerate(("bare", "attached")):
        gc.collect()
        before = torch.cuda.memory_allocated() if on_cuda else 0
        optimizer = build(network, case, device, attach=bool(attach))
        for _ in range(WARM_UP):
            optimizer.step()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as profiler:
            optimizer.step()
        calls = [event.name for event in profiler.events() or ()]
        if not on_cuda:
            row[f"{side}_operations"] = sum("aten::" in call for call in calls)
            continue
        # None: a profiler that may not trace the device sees no launch.
        row[f"{side}_launches"] = sum("LaunchKernel" in call for call in calls) or None
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        row[f"{side}_reads"] = sum("called a synchronizing" in str(warning.message) for warning in caught)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["peak_above_bare_MiB"] = peak - row.get("peak_above_bare_MiB", 0)
        del optimizer
    print(f"{network}, {case}: {row}", flush=True)
    return row


def steps(device: torch.device, networks: Sequence[str], rounds: int, seconds: float) -> Iterator[Report]:
    """Time all cases, then count, since a profiler may slow what follows; yield the report after each."""
    end = time.monotonic() + seconds
    report: Report = {"rows": {}, "left_out": [], "failed": []}
    cases = [(network, case) for network in networks for case in CASES]
    if device.type == "cpu":
        cases = [(network, case) for network, case in cases if "capturable" not in case]
        report["left_out"].append("capturable optimizers, launches, reads and peak memory: PyTorch has none on a CPU")
    heading(f"one step, {device}")
    for kind, measure in (("times", partial(times, rounds=rounds)), ("counts", counts)):
        for network, case in cases:
            name = f"{network}, {case}"
            if time.monotonic() > end:
                report["left_out"].append(f"{name}, {kind}: no time was left")
                continue
            try:
                row = measure(network, case, device)
                report["rows"].setdefault(name, {}).update(row)
                if row.get("bare_launches", 0) is None:
                    report["left_out"].append(f"{name}, launches: the profiler may not trace this device")
            except Exception as error:
                report["failed"].append(f"{name}, {kind}: {type(error).__name__}: {error}")
            yield report
    yield report


def cuda_graph(optimizer: optim.Optimizer) -> Callable[[], Any]:
    """Capture a step in a CUDA graph, and return what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def graph(device: torch.device, capture: Callable[[optim.Optimizer], Callable[[], Any]] = cuda_graph) -> Report:
    """Compare replays of a captured step with eager steps on the same gradients, which shrink from step to step."""
    report: Report = {"rows": {}, "left_out": [], "failed": []}
    if device.type == "cpu" and capture is cuda_graph:
        return {**report, "left_out": ["capture: a CPU has no CUDA graphs"]}
    models = [nn.Sequential(*(nn.Linear(64, 64) for _ in range(10))).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.AdamW(model.parameters(), 1e-3, capturable=device.type != "cpu") for model in models]
    adapters = [layerwise.LayerwiseLR(of, LayerAdaptive(), model) for of, model in zip(optimizers, models, strict=True)]
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    takes, before = [of.step for of in optimizers], list[float]()
    for number in range(1 - WARM_UP, 1 + REPLAYS):
        for pair in pairs:
            gradient = torch.randn_like(pair[0]) / 10 ** (number + WARM_UP)
            for p in pair:  # in place, since a graph reads where it read when captured
                p.grad = gradient.clone() if p.grad is None else p.grad.copy_(gradient)
        if number == 1:
            takes[1] = capture(optimizers[1])
        for take in takes:
            take()
        if number < 1:
            continue
        weights = max(float((p - q).detach().abs().max()) for p, q in pairs)
        eager, replayed = (list(adapter.get_last_factors().values()) for adapter in adapters)
        factors = max(abs(g / f - 1) for f, g in zip(eager, replayed, strict=True))
        row = {"weights_differ_by": f"{weights:.1e}", "factors_differ_by": f"{factors:.1e}", "factor": replayed[0]}
        report["rows"][f"replay {number}"] = row
        print(f"replay {number}", row, flush=True)
        if not max(weights, factors) <= TOLERANCE:
            report["failed"].append(f"replay {number}: differs from the eager step by more than {TOLERANCE}")
        if replayed == before:
            report["failed"].append(f"replay {number}: the factors stay, though the gradients differ")
        before = replayed
    return report
