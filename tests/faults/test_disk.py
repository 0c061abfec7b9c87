"""Disks that are full and folders that cannot be written: one line that names the place, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import victims
from made_up import finish, finish_plan, outcome_of, table_plan, table_value

from layerwise.lab.cli import main
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments.runner import Settings, carry_out, load_finished
from layerwise.lab.runs import files
from layerwise.lab.runs.folder import Runs

pytestmark = pytest.mark.full

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs mount")


@contextlib.contextmanager
def mounted(place, *options):
    """Mount a small disk; skip where that is not allowed."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place, left):
    """Fill a disk but for so many bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filling").write_bytes(bytes(max(free - left, 0)))


def do(out, log, **more):
    """Do the plan in this process; give what failed."""
    failures = []
    plan = victims.plan_of(log)
    link = chains.Alone(
        message=lambda message: failures.append(message) if isinstance(message, chains.Failure) else None
    )
    before = torch.get_num_threads()
    for chain in plan.chains():
        chains.do_chain(chains.Chain(runs=chain, out=out, **more), link)
    torch.set_num_threads(before)
    return failures, load_finished(plan, Runs(out)).records


def same(records, expected):
    assert {key: record.summary["weights"] for key, record in records.items()} == {
        key: record.summary["weights"] for key, record in expected.items()
    }
    assert all(record.metrics().equals(expected[key].metrics()) for key, record in records.items())


@linux
@pytest.mark.parametrize("left", [0, 4096, *(pytest.param(n * 4096, marks=pytest.mark.faults) for n in range(2, 40))])
def test_a_full_disk_is_named_and_with_room_again_the_runs_end_with_the_same_bits(tmp_path, left, whole_runs):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        (disk / "runs").mkdir()
        fill(disk, left)
        failures, records = do(disk / "runs", tmp_path / "log", checkpoint_seconds=0.0)
        assert failures or len(records) == 4
        for failure in failures:
            assert "No space left on device" in failure.reason
            assert str(disk / "runs") in failure.reason
        assert all(record.summary["weights"] for record in records.values())
        (disk / "filling").unlink()
        failures, records = do(disk / "runs", tmp_path / "log", checkpoint_seconds=0.0)
        assert failures == []
        assert len(records) == 4
        same(records, whole_runs)
        assert not list(disk.rglob("*.broken")) + list(disk.rglob("*.tmp"))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    failures, records = do(place / "runs", place / "log")
    assert failures == []
    return records


@pytest.fixture
def plan():
    """Lay out a plain run and one of a method, so that a page is made fast."""
    whole = table_plan(seeds=1)
    subjects = tuple(subject for subject in whole.subjects if subject.name == "sgd")
    arms = tuple(arm for arm in whole.arms if arm.name in ("plain", "layer-adaptive"))
    runs = tuple(run for run in whole.runs if run.subject == "sgd" and run.arm.name in ("plain", "layer-adaptive"))
    return replace(whole, subjects=subjects, arms=arms, runs=runs, columns=(0, 20))


@linux
def test_a_report_on_a_full_disk_is_one_line_and_the_page_before_stays(tmp_path, capsys, plan):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        finish_plan(plan, tmp_path / "runs", table_value)
        arguments = ["report", str(tmp_path / "runs"), "--out", str(disk / "pages"), "--quiet"]
        assert main(arguments) == 0
        before = (disk / "pages" / "report" / "report.html").read_bytes()
        for left in (0, 50_000):
            fill(disk, left)
            capsys.readouterr()
            assert main(arguments) == 1
            words = capsys.readouterr().err
            assert words.startswith(f"layerwise: {disk}/pages/")
            assert "No space left on device" in words
            assert words.count("\n") == 1
            assert (disk / "pages" / "report" / "report.html").read_bytes() == before
            assert not list(disk.rglob("*.tmp"))
            (disk / "filling").unlink()


@linux
def test_a_folder_that_is_read_only_can_be_read_and_is_named_when_it_is_written(tmp_path, capsys, plan):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        finish_plan(plan, disk / "runs", table_value)
        outcome = outcome_of(plan, disk / "runs", tmp_path / "pages")
        records = dict(outcome.results.records)
        broken = next(iter(records.values())).folder / "metrics.parquet"
        broken.write_bytes(b"half")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        runs = Runs(disk / "runs")
        assert len(load_finished(plan, runs).records) < len(records)  # the damaged one is not taken, nor moved
        assert broken.read_bytes() == b"half"
        assert main(["list", "--out", str(disk / "runs"), "--quiet"]) == 0
        assert main(["report", str(disk / "runs"), "--out", str(tmp_path / "pages"), "--quiet"]) == 0
        capsys.readouterr()
        assert main(["report", str(disk / "runs"), "--out", str(disk / "pages"), "--quiet"]) == 1
        words = capsys.readouterr().err
        assert "Read-only file system" in words
        assert words.count("\n") == 1
        with pytest.raises(UsageError, match=r"cannot be written \(Read-only file system\): give another folder"):
            carry_out(victims.plan_of(tmp_path / "log"), Settings(out=disk / "runs"))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


LIMITED = """
import resource, signal, sys
from pathlib import Path
import test_disk
size = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
failures, records = test_disk.do(Path(sys.argv[1]) / "runs", Path(sys.argv[1]) / "log", checkpoint_seconds=0.0)
for failure in failures:
    print(failure.reason)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_write_that_stops_within_a_file_leaves_the_file_before(tmp_path, whole_runs):
    place = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), "9000"],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reasons = done.stdout.splitlines()
    assert len(reasons) >= 2
    assert all("File too large" in reason and str(tmp_path) in reason for reason in reasons)
    failures, records = do(tmp_path / "runs", tmp_path / "log")
    assert failures == []
    assert not list(tmp_path.rglob("*.broken"))
    same(records, whole_runs)


def test_every_error_of_the_system_is_one_line_that_names_the_file(tmp_path, capsys, monkeypatch, plan):
    finish(tmp_path / "runs", plan.runs[0], 1.5)

    def broken(path, data, **how):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(files, "write_whole", broken)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "pages")]) == 1
    words = capsys.readouterr().err
    assert words.startswith(f"layerwise: {tmp_path}/pages/report/")
    assert words.endswith("Input/output error; runs that are finished are kept\n")
