"""Several processes in one folder, and processes that die: no run twice, none half, nobody waits for ever."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import victims
from lab_helpers import stored
from serving import Server

from layerwise.lab.experiments.runner import Outcome, Settings, carry_out, load_finished
from layerwise.lab.report.page import build
from layerwise.lab.runs.folder import Runs

pytestmark = [
    pytest.mark.full,
    pytest.mark.dist,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

DEADLINE = 600.0
"""Seconds after which processes are taken to wait for each other."""


@pytest.fixture(scope="module")
def server():
    started = Server()
    yield started
    started.close()


def waited(server, numbers, out):
    """Wait for processes; kill them where they take for ever."""
    watch = threading.Timer(DEADLINE, lambda: [os.killpg(number, signal.SIGKILL) for number in numbers])
    watch.start()
    try:
        codes = [server.wait(number) for number in numbers]
    finally:
        watch.cancel()
    assert codes == [0] * len(numbers), Path(str(out) + ".log.said").read_text()


def updates(out):
    return Counter(line.split()[1] for line in Path(str(out) + ".log").read_text().splitlines())


def nothing_twice(out, seeds):
    runs = Runs(out)
    records = load_finished(victims.plan_of(out, seeds=seeds), runs).records
    assert len(records) == 4 * seeds
    assert runs.set_aside == []
    assert not list(out.rglob("*.broken")) + list(out.rglob("*.tmp")) + list(out.glob("store/*/checkpoint*"))
    assert updates(out) == {record.folder.name: victims.UPDATES for record in records.values()}
    assert {record.summary["sessions"] for record in records.values()} == {1}
    return records


def test_eight_processes_on_one_experiment_do_each_run_once(server, tmp_path):
    out = tmp_path / "runs"
    waited(server, [server.start("share", out, seeds=1) for _ in range(8)], out)
    nothing_twice(out, 1)


@pytest.mark.faults
def test_eight_processes_on_one_experiment_again_and_again(server, tmp_path):
    for number in range(20):
        out = tmp_path / f"{number}"
        waited(server, [server.start("share", out, seeds=4) for _ in range(8)], out)
        nothing_twice(out, 4)


@pytest.mark.faults
def test_two_sweeps_on_one_folder_do_each_run_once(server, tmp_path):
    for number in range(3):
        out = tmp_path / f"{number}"
        waited(server, [server.start("sweep", out, jobs=2) for _ in range(2)], out)
        outcome = carry_out(victims.plan_of(Path(str(out) + ".log"), seeds=2), Settings(out=out, jobs=1))
        assert outcome.complete
        nothing_twice(out, 2)


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.faults)])
def test_a_report_may_be_made_while_runs_are_written(server, tmp_path, rounds):
    for number in range(rounds):
        out = tmp_path / f"{number}"
        numbers = [server.start("share", out, seeds=3) for _ in range(3)]
        plan = victims.plan_of(Path(str(out) + ".log"), seeds=3)
        seen, counts = {}, []
        while True:
            runs = Runs(out)
            records = {record.folder.name: record.summary["weights"] for record in stored(runs)}
            assert runs.set_aside == []
            assert records.items() >= seen.items()
            if len(records) > len(seen):
                outcome = Outcome(plan, Settings(out=tmp_path / "page"), load_finished(plan, runs))
                assert len(outcome.results.records) >= len(records)
                outcome.results.table()
                counts.append(len(records))
                if len(counts) == 2:
                    assert build([outcome], "").html.rstrip().endswith("</html>")
            seen = records
            if len(records) == 12:
                break
            time.sleep(0.01)
        waited(server, numbers, out)
        assert len(counts) > 1
        nothing_twice(out, 3)


def ending(log, ends, which):
    """Lay out runs of which one ends in another way than it should."""
    plan = victims.plan_of(log)
    odd = victims.Small(log, ends=ends)
    return replace(plan, runs=tuple(replace(run, task=odd) if run.arm.name == which else run for run in plan.runs))


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory")
@pytest.mark.parametrize(
    ("ends", "words"),
    [
        pytest.param("exit", "its process ended with exit code 3", marks=pytest.mark.faults),
        pytest.param("kill", "its process was killed by signal 9", marks=pytest.mark.faults),
        pytest.param("segmentation fault", "its process was killed by signal 11", marks=pytest.mark.faults),
        pytest.param("abort", "its process was killed by signal 6", marks=pytest.mark.faults),
        pytest.param("leave", "its process ended with exit code 1", marks=pytest.mark.faults),
        pytest.param("memory", "MemoryError", marks=pytest.mark.faults),
        pytest.param("tensor memory", "RuntimeError: ", marks=pytest.mark.faults),
        pytest.param("error", "ZeroDivisionError: ", marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize(
    "which", ["rate", *(pytest.param(arm, marks=pytest.mark.faults) for arm in ("plain", "method"))]
)
def test_a_crash_ends_one_run_and_is_told(tmp_path, ends, words, which):
    log = tmp_path / "log"
    outcome = carry_out(ending(log, ends, which), Settings(out=tmp_path / "runs", jobs=1))
    (failure,) = outcome.failures
    assert failure.doing == f"small {which} seed 0"
    assert failure.reason.startswith(words)
    lost = {"rate": {"rate"}, "plain": {"plain"}, "method": {"method", "rate", "shuffled"}}[which]
    assert {arm for _, arm, _ in outcome.results.records} == {"plain", "method", "rate", "shuffled"} - lost
    assert len(outcome.skipped) == len(lost) - 1
    assert outcome.exit_code == 1
    # What was finished is not done again when the cause is mended, and the run that had crashed is done.
    again = carry_out(victims.plan_of(log), Settings(out=tmp_path / "runs", jobs=1))
    assert again.complete
    assert again.found == 4 - len(lost)


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory")
def test_too_little_memory_in_this_process_ends_one_run(tmp_path):
    from layerwise.lab.experiments import chain as chains

    failures = []
    plan = ending(tmp_path / "log", "memory", "plain")
    for chain in plan.chains():
        link = chains.Alone(message=lambda told: failures.append(told) if isinstance(told, chains.Failure) else None)
        chains.do_chain(chains.Chain(runs=chain, out=tmp_path / "runs"), link)
    (failure,) = failures
    assert failure.doing == "small plain seed 0"
    assert failure.reason.startswith("MemoryError")
    assert len(load_finished(plan, Runs(tmp_path / "runs")).records) == 3


@pytest.mark.faults
def test_a_crash_on_ray_ends_one_run_and_is_told(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    for ends, which in (("exit", "rate"), ("memory", "plain"), ("segmentation fault", "shuffled")):
        out = tmp_path / ends
        outcome = carry_out(ending(tmp_path / "log", ends, which), Settings(out=out, jobs=1, engine="ray"))
        (failure,) = outcome.failures
        assert failure.doing == f"small {which} seed 0"
        assert {arm for _, arm, _ in outcome.results.records} == {"plain", "method", "rate", "shuffled"} - {which}
