"""`make gpu`, tried on a CPU with tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import accelerator, gpu
from torch import optim

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--networks", "10 layers", "--rounds", "2"]


def page_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return both files of the page; nothing else is left in its folder."""
    assert sorted(path.name for path in folder.iterdir()) == ["accelerator.json", "accelerator.md"]
    return (folder / "accelerator.md").read_text(), json.loads((folder / "accelerator.json").read_text())


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch):
    """Return a function that replaces what parts run by short programs."""

    def replace(**programs: str) -> None:
        commands = gpu.commands

        def changed(*arguments: Any) -> dict[str, list[str]]:
            return {**commands(*arguments), **{part: ["-c", program] for part, program in programs.items()}}

        monkeypatch.setattr(gpu, "commands", changed)

    return replace


@pytest.mark.full
def test_the_page_holds_the_tables_and_what_was_left_out(tmp_path, capfd):
    tests = "tests/core/test_samples.py"
    assert gpu.main([*TINY, "--only", "tests", "steps", "graph", "--tests", tests, "--page", str(tmp_path)]) == 0
    text, data = page_of(tmp_path)
    assert data["machine"]["device"] == "a CPU"
    assert data["machine"]["torch"] == torch.__version__
    assert {part: of["result"] for part, of in data["parts"].items()} == {
        **dict.fromkeys(("tests", "steps", "graph"), "passed"),
        "lab": "left out: not in --only",
    }
    cases = [name for name in accelerator.CASES if "capturable" not in name]
    assert list(data["parts"]["steps"]["rows"]) == [f"10 layers, {name}" for name in cases]
    for row in data["parts"]["steps"]["rows"].values():
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert 0 < row["bare_operations"] < row["attached_operations"]
    assert "a CPU" in text
    assert f"torch {torch.__version__}" in text
    for name in cases:
        assert f"\n| 10 layers, {name} | " in text
    assert "* Left out: capturable optimizers, launches, reads and peak memory: PyTorch has none on a CPU\n" in text
    assert "* Left out: capture: a CPU has no CUDA graphs\n" in text
    assert "\n```text\nleft out: not in --only\n```" in text
    assert " passed in " in data["parts"]["tests"]["printed"][0]
    assert data["parts"]["tests"]["printed"][0] in text
    printed = capfd.readouterr().out
    for part in ("tests", "steps", "graph"):
        assert f"\n{part}: at most " in printed
        assert f"\n{part}: passed (" in printed
    assert "10 layers, SGD, fused: {'bare_operations': " in printed


def test_the_failure_of_a_part_hides_no_other(tmp_path, instead):
    instead(tests="print('one test failed'); exit(3)", lab="print('Table I'); print('Report: /gone')")
    arguments = ["--only", "tests", "graph", "lab", "--page", str(tmp_path)]
    assert gpu.main([*TINY, *arguments]) == 1
    text, data = page_of(tmp_path)
    assert {part: of["result"] for part, of in data["parts"].items()} == {
        "tests": "failed: exit status 3",
        "steps": "left out: not in --only",
        "graph": "passed",
        "lab": "passed",
    }
    assert "| tests | failed: exit status 3 |" in text
    assert "```text\none test failed\n```" in text
    assert "```text\nTable I\n```" in text


def test_a_part_and_its_children_are_stopped_at_its_limit(tmp_path, instead, capfd):
    child = "import time; time.sleep(60)"
    instead(lab=f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])")
    start = time.monotonic()
    assert gpu.main([*TINY, "--only", "lab", "--minutes", "0.2", "--page", str(tmp_path)]) == 1
    assert time.monotonic() - start < 20
    text, data = page_of(tmp_path)
    assert data["parts"]["lab"]["result"] == "failed: stopped at its limit of 3 s"
    assert data["parts"]["lab"]["printed"] == ["begun"]
    assert "| lab | failed: stopped at its limit of 3 s |" in text
    assert "\nlab: failed: stopped at its limit of 3 s (" in capfd.readouterr().out


@pytest.mark.parametrize(("module", "part"), [("pytest", "tests"), ("tyro", "lab")])
def test_parts_whose_modules_are_missing_are_left_out(module, part, tmp_path, monkeypatch, capfd):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    assert gpu.main([*TINY, "--only", part, "--page", str(tmp_path)]) == 0
    line = f"left out: this Python has no module {module!r}"
    assert f"{part}: {line} (0.0 s)\n" in capfd.readouterr().out
    assert f"| {part} | {line} |" in page_of(tmp_path)[0]


def test_a_page_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "accelerator.md"
    gpu.write(file, "old")
    monkeypatch.setattr(gpu.os, "replace", lambda *_: exec("raise OSError('disk full')"))
    with pytest.raises(OSError, match="disk full"):
        gpu.write(file, "new")
    assert file.read_text() == "old"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--page", str(tmp_path)])
    assert stopped.value.code == 2
    assert "finds no GPU; --device cpu tries the command" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_all_parts_together_take_at_most_the_given_minutes():
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    assert gpu.SHARES.keys() == gpu.TITLES.keys()


def test_the_named_tests_exist():
    for path in [*gpu.TESTS, *(f"tests/{name}.py" for name in gpu.NOT_OF_A_DEVICE)]:
        assert (gpu.ROOT / path).exists(), path


def test_cases_that_fail_or_come_too_late_are_named(monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(accelerator, "CASES", {name: accelerator.CASES[name] for name in ("SGD, fused",)})
    monkeypatch.setattr(accelerator, "counts", fails)
    *_, report = accelerator.steps(CPU, ["10 layers"], 1, 60.0)
    assert list(report["rows"]) == ["10 layers, SGD, fused"]
    assert report["failed"] == ["10 layers, SGD, fused, counts: RuntimeError: out of memory"]
    *_, report = accelerator.steps(CPU, ["10 layers"], 1, -1.0)
    assert report["rows"] == {}
    assert report["left_out"][1:] == [
        f"10 layers, SGD, fused, {kind}: no time was left" for kind in ("times", "counts")
    ]


def test_a_failed_case_fails_its_part(tmp_path, monkeypatch, capfd):
    report = {"rows": {}, "left_out": [], "failed": ["replay 1: differs"]}
    monkeypatch.setattr(gpu, "graph", lambda device: report)
    assert gpu.main([*TINY, "--page", str(tmp_path), "--measure", "graph"]) == 1
    assert json.loads((tmp_path / "graph.json").read_text()) == report
    assert capfd.readouterr().out == "failed: replay 1: differs\n0 rows, 1 failures\n"


def test_replays_that_are_eager_steps_pass():
    report = accelerator.graph(CPU, lambda optimizer: optimizer.step)
    assert report["failed"] == []
    assert list(report["rows"]) == [f"replay {i}" for i in range(1, 5)]


def test_a_replay_with_frozen_factors_is_found():
    def frozen(optimizer: optim.Optimizer) -> Any:
        return lambda: None

    failed = accelerator.graph(CPU, frozen)["failed"]
    assert "replay 1: differs from the eager step by more than 1e-06" in failed
    assert "replay 4: the factors stay, though the gradients differ" in failed


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_is_asked_of_cuda(monkeypatch):
    """No GPU is needed to find a misspelt call."""
    build, calls = accelerator.build, []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def elapsed_time(self, end: Event) -> float:
            return 2.0

        record = synchronize = lambda self: None

    answers = {"memory_allocated": 2**20, "max_memory_allocated": 3 * 2**20, "reset_peak_memory_stats": None}
    for name, answer in {**answers, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(accelerator, "build", lambda *names, attach: build(*names[:2], CPU, attach=attach))
    monkeypatch.setattr(accelerator, "CASES", {"SGD, fused": accelerator.CASES["SGD, fused"]})
    *_, report = accelerator.steps(torch.device("cuda"), ["10 layers"], 1, 60.0)
    assert report == {
        "rows": {
            "10 layers, SGD, fused": {
                "bare_ms": 2.0,
                "attached_ms": 2.0,
                "ratio": 1.0,
                "ratio_low": 1.0,
                "ratio_high": 1.0,
                "bare_launches": None,
                "bare_reads": 0,
                "attached_launches": None,
                "attached_reads": 0,
                "peak_above_bare_MiB": 0.0,
            }
        },
        "left_out": ["10 layers, SGD, fused, launches: the profiler may not trace this device"],
        "failed": [],
    }
    assert calls == ["warn", "default"] * 2
