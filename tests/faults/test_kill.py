"""Processes of the lab killed at random moments: the runs end with the same bits, and nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import polars
import pytest
import victims
from serving import Server

from layerwise.lab.experiments.runner import Settings, carry_out, load_finished
from layerwise.lab.runs.folder import Runs

pytestmark = [
    pytest.mark.full,
    pytest.mark.dist,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]


@pytest.fixture(scope="module")
def server():
    started = Server()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Do the runs and the report without a kill."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    server.do("train", out, pause=0.0, seconds=60.0, seeds=2)
    return load_finished(victims.plan_of(out, seeds=2), Runs(out)).records


KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
"""How a process ends that is killed, and one that is ended within a write."""


def done(out, seeds=1):
    """Give the finished runs; nothing that is there may be half."""
    runs = Runs(out)
    records = load_finished(victims.plan_of(out, seeds=seeds), runs).records
    assert runs.set_aside == []
    assert not list(out.rglob("*.broken"))
    return records


def updates(out):
    log = Path(str(out) + ".log")
    return Counter(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else Counter()


def stamps(out):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("store/*/record.json")}


def same_as_whole(records, whole):
    """Compare weights and every number to the bit."""
    assert records
    for key, record in records.items():
        expected = whole[key]
        assert record.summary["weights"] == expected.summary["weights"]
        assert record.summary["finals"] == expected.summary["finals"]
        assert record.metrics().equals(expected.metrics())


def told(capsys, place, kills, lost):
    with capsys.disabled():
        sys.stdout.write(f"\n{place}: {kills} kills, {kills} survived, {lost}\n")


def kill_training(server, whole, folder, chance, count, *, pause, seconds, by_event):
    """Kill runs that are trained one after another; give the updates that were done again for each kill."""
    asked = {"pause": pause, "seconds": seconds}
    took = server.do("train", folder / "timed", **asked)
    lost, attempts = [], 0
    while len(lost) < count:
        out = folder / f"{attempts}"
        attempts += 1
        assert attempts < 5 * count + 5
        if by_event:
            killed = server.wait(server.start("train", out, event=chance.randrange(700), **asked)) in KILLED
        else:
            killed = server.kill_after(chance.uniform(0.0, took), "train", out, **asked)
        if not killed:
            continue
        kept, before = done(out), stamps(out)
        server.do("train", out, **asked)
        records = done(out)
        assert len(records) == 4
        same_as_whole(records, whole)
        assert {path: stamp for path, stamp in stamps(out).items() if path in before} == before
        again = updates(out)
        assert set(again) == {record.folder.name for record in records.values()}
        assert all(again[record.folder.name] == victims.UPDATES for record in kept.values())
        lost.append(again.total() - 4 * victims.UPDATES)
        assert not list(out.glob("store/*/.*.tmp")) + list(out.glob("store/*/checkpoint*"))
        server.do("train", out, **asked)
        assert updates(out) == again  # nothing is left to do
    return lost


def page_of(out):
    """Give the page without its date."""
    text = (out / "small" / "report.html").read_text()
    assert text.rstrip().endswith("</html>")
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "now", text)


def kill_report(server, folder, chance, count):
    """Kill the writing of a report; give how many kills left an earlier or the new page whole."""
    out = folder / "runs"
    server.do("train", out, pause=0.0, seconds=60.0)
    before = stamps(out)
    took = server.do("report", out)
    expected, tables = page_of(out), out / "small" / "tables"
    frames = {path.name: polars.read_parquet(path) for path in tables.iterdir()}
    kills = 0
    while kills < count:
        if kills % 2:
            killed = server.wait(server.start("report", out, event=chance.randrange(200))) in KILLED
        else:
            killed = server.kill_after(chance.uniform(0.0, took), "report", out)
        if not killed:
            continue
        kills += 1
        assert page_of(out) == expected
        for name in ("plan.json", "runs.json"):
            json.loads((out / "small" / name).read_text())
        assert all(polars.read_parquet(tables / name).equals(frame) for name, frame in frames.items())
        if kills % 5 == 0:
            server.do("report", out)
            assert page_of(out) == expected
    server.do("report", out)
    assert page_of(out) == expected
    assert stamps(out) == before
    for left in out.rglob(".*.tmp"):  # what a killed process had begun goes as soon as nobody can be writing it
        os.utime(left, (0, 0))
    server.do("report", out)
    assert not list(out.rglob(".*.tmp"))
    return kills


def worker_of(out):
    """Wait for the process that trains, and give its number."""
    log, deadline = Path(str(out) + ".log"), time.monotonic() + 120
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.005)
        assert time.monotonic() < deadline
    return int(log.read_text().splitlines()[-1].split()[0])


def kill_sweep(server, whole, folder, chance, count, *, master, engine="local"):
    """Kill the master of a sweep with all that it started, or one of its workers."""
    lost, folder_number = [], 0
    while len(lost) < count:
        out = folder / f"{folder_number}"
        folder_number += 1
        number = server.start("sweep", out, jobs=2, engine=engine)
        worker = worker_of(out)
        time.sleep(chance.uniform(0.0, 1.0))
        if master:
            os.kill(number, signal.SIGKILL)  # its workers end by themselves
            assert server.wait(number) == -signal.SIGKILL
            deadline = time.monotonic() + 300
            while _alive(worker):
                time.sleep(0.01)
                assert time.monotonic() < deadline, _state(worker)
            kept = done(out, seeds=2)
        else:
            kept = {}
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:
                server.wait(number)
                continue
            assert server.wait(number) == 0, Path(str(out) + ".log.said").read_text()
            finished, reasons, _ = json.loads((out / "said.json").read_text())
            if finished < 8:  # else it was killed after its last run
                (reason,) = reasons
                assert "killed by signal 9" in reason or "its process died" in reason
            assert finished >= 5  # at most a method with its two controls is left
        before = stamps(out)
        outcome = carry_out(victims.plan_of(Path(str(out) + ".log"), seeds=2), Settings(out=out, jobs=1))
        assert outcome.complete, outcome.failures
        records = done(out, seeds=2)
        assert len(records) == 8
        same_as_whole(records, whole)
        assert {path: stamp for path, stamp in stamps(out).items() if path in before} == before
        again = updates(out)
        assert all(again[record.folder.name] == victims.UPDATES for record in kept.values())
        lost.append(again.total() - 8 * victims.UPDATES)
    return lost


def _state(number):
    """Say what a process does that should have ended."""
    place = Path(f"/proc/{number}")
    return [(place / name).read_text() for name in ("status", "wchan", "syscall", "cmdline")]


def _alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


CHECKPOINTS = {"pause": 0.0, "seconds": 0.0}
TRAINING = {"pause": 0.002, "seconds": 0.02}


def test_a_few_kills_in_training_and_in_writing_checkpoints(server, whole, tmp_path):
    chance = random.Random(0)
    kill_training(server, whole, tmp_path / "a", chance, 1, by_event=False, **TRAINING)
    kill_training(server, whole, tmp_path / "b", chance, 2, by_event=True, **CHECKPOINTS)


def test_a_kill_in_writing_a_report(server, tmp_path):
    kill_report(server, tmp_path, random.Random(0), 1)


@pytest.mark.faults
@pytest.mark.parametrize("by_event", [False, True], ids=["at random moments", "before a random operation on a file"])
def test_many_kills_in_writing_checkpoints(server, whole, tmp_path, by_event, capsys):
    lost = kill_training(server, whole, tmp_path, random.Random(1), 35, by_event=by_event, **CHECKPOINTS)
    told(capsys, "checkpoint writing", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")


@pytest.mark.faults
def test_many_kills_in_training(server, whole, tmp_path, capsys):
    lost = kill_training(server, whole, tmp_path, random.Random(2), 45, by_event=False, **TRAINING)
    told(capsys, "training", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")


@pytest.mark.faults
def test_many_kills_in_writing_a_report(server, tmp_path, capsys):
    told(capsys, "report writing", kill_report(server, tmp_path, random.Random(3), 30), "nothing lost")


@pytest.mark.faults
def test_many_kills_of_the_master_of_a_sweep(server, whole, tmp_path, capsys):
    lost = kill_sweep(server, whole, tmp_path, random.Random(4), 20, master=True)
    told(capsys, "sweep master", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")


@pytest.mark.faults
def test_many_kills_of_a_worker_of_a_sweep(server, whole, tmp_path, capsys):
    lost = kill_sweep(server, whole, tmp_path, random.Random(5), 20, master=False)
    told(capsys, "sweep worker", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")


@pytest.mark.faults
def test_many_kills_of_a_worker_of_ray(server, whole, tmp_path, capsys):
    pytest.importorskip("ray")
    lost = kill_sweep(server, whole, tmp_path, random.Random(6), 15, master=False, engine="ray")
    told(capsys, "Ray worker", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")


@pytest.mark.faults
def test_many_kills_of_the_master_of_ray(server, whole, tmp_path, capsys):
    pytest.importorskip("ray")
    lost = kill_sweep(server, whole, tmp_path, random.Random(7), 10, master=True, engine="ray")
    told(capsys, "Ray master", len(lost), f"{sum(lost)} updates done again, {max(lost)} at most")
