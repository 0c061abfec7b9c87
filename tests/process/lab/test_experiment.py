"""Experiments in worker processes: side by side, interrupted, killed, two at once."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import lab_helpers
import pytest
import torch
from lab_helpers import tiny_plan, tiny_tuned

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import runner as experiment
from layerwise.lab.experiments import tuned_recipe
from layerwise.lab.experiments.runner import Display, Settings, carry_out, load_finished
from layerwise.lab.runs.folder import Runs

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from lab_helpers import tiny_plan
from layerwise.lab.experiments.runner import carry_out
from layerwise.lab.experiments.runner import Display, Settings
class Told(Display):
    def stopping(self):
        print("stopping")
plan = tiny_plan(seeds=1, iterations={iterations}, test_every={iterations})
if __name__ == "__main__":
    import dataclasses
    from layerwise.lab.experiments import runner
    left = runner.chains_left
    runner.chains_left = lambda *given: [dataclasses.replace(each, checkpoint_seconds=0.02) for each in left(*given)]
    outcome = carry_out(plan, Settings(out=Path(sys.argv[1]), jobs=2), Told())
    print(len(outcome.results.records), outcome.interrupted, outcome.failures, outcome.skipped)
    sys.exit(outcome.exit_code)
"""


def script_of(tmp_path, iterations):
    path = tmp_path / "experiment.py"
    path.write_text(textwrap.dedent(SCRIPT).format(tests=os.path.dirname(lab_helpers.__file__), iterations=iterations))
    return path


def start(script, out):
    return subprocess.Popen(
        [sys.executable, str(script), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def weights(plan, out):
    records = load_finished(plan, Runs(out)).records
    return {key: record.summary["weights"] for key, record in records.items()}


class Told(Display):
    def __init__(self):
        self.lines = []

    def finished(self, worker, run, result, diverged):
        self.lines.append(run)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab") / "runs"
    plan, told = tiny_plan(seeds=2), Told()
    return carry_out(plan, Settings(out=out, jobs=2), told), told


@pytest.mark.full
@pytest.mark.dist
def test_all_runs_are_done_once_and_a_second_call_repeats_nothing(first):
    outcome, told = first
    assert (outcome.exit_code, outcome.found, outcome.planned, outcome.complete) == (0, 0, 30, True)
    assert sorted(told.lines) == sorted(run.label for run in outcome.plan.runs)
    before = {path: path.stat().st_mtime_ns for path in outcome.settings.out.rglob("*.parquet")}
    assert len(before) == 30
    again, told = carry_out(outcome.plan, outcome.settings), Told()
    assert (again.found, again.failures) == (30, [])
    assert {path: path.stat().st_mtime_ns for path in outcome.settings.out.rglob("*.parquet")} == before


@pytest.mark.full
@pytest.mark.dist
def test_what_a_kill_has_left_beside_a_finished_run_goes_with_the_next_call(first):
    outcome, _ = first
    record = next(iter(outcome.results.records.values()))
    before = (record.folder / "record.json").stat().st_mtime_ns
    status = (record.folder / "status.json").read_bytes()
    left = [record.folder / name for name in ("checkpoint.pt", "checkpoint-before.pt", ".status.json.1.tmp")]
    for path in left:
        path.write_bytes(b"half")
    carry_out(outcome.plan, outcome.settings)
    assert not any(path.exists() for path in left)
    assert (record.folder / "record.json").stat().st_mtime_ns == before
    told, said = (json.loads(text) for text in (status, (record.folder / "status.json").read_bytes()))
    assert (told["state"], told["iteration"]) == (said["state"], said["iteration"])


@pytest.mark.full
@pytest.mark.dist
def test_runs_side_by_side_are_those_of_one_process_to_the_bit(first, carried_out, tmp_path):
    outcome, _ = first
    plan = tiny_plan(seeds=1)
    alone = carried_out(plan)
    ours = weights(plan, outcome.settings.out)
    assert ours == {key: record.summary["weights"] for key, record in alone.results.records.items()}
    assert len(set(ours.values())) == 15


@pytest.mark.full
@pytest.mark.dist
def test_a_damaged_run_is_named_and_repeated_to_the_same_numbers(first):
    outcome, _ = first
    record = outcome.results.records["sgd", "layer-adaptive", 0]
    path = record.folder / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:100])
    again = carry_out(outcome.plan, outcome.settings)
    # Its controls are finished: they are found again as soon as the run that they repeat is.
    assert again.found == 26
    assert again.complete
    assert path in again.set_aside
    assert again.results.records["sgd", "layer-adaptive", 0].summary["weights"] == record.summary["weights"]


@pytest.mark.full
@pytest.mark.dist
@posix
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_keeps_finished_runs_and_checkpoints_the_others(tmp_path, number):
    script, out = script_of(tmp_path, 400), tmp_path / "runs"
    process = start(script, out)
    try:
        while process.poll() is None and len(list(out.rglob("checkpoint.pt"))) < 2:
            time.sleep(0.02)
        # The keyboard's goes to the whole group, that of kill or of a shutdown's manager to the command.
        (os.killpg if number == "SIGINT" else os.kill)(process.pid, getattr(signal, number))
        words, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert "True [] []" in words
    assert words.count("stopping") == 1
    states = [json.loads(path.read_text()) for path in out.rglob("status.json")]
    assert {state["state"] for state in states} <= {"finished", "stopped"}
    stopped = [state for state in states if state["state"] == "stopped"]
    assert stopped
    assert all(state["iteration"] > 0 for state in stopped)


@pytest.mark.full
@pytest.mark.dist
@posix
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, carried_out):
    plan = tiny_plan(seeds=1, iterations=60, test_every=60)
    expected = carried_out(plan, tmp_path / "whole")
    script, out = script_of(tmp_path, 60), tmp_path / "killed"
    chance = random.Random(0)
    kills = 0
    for _ in range(4):
        before = set(out.rglob("checkpoint.pt"))
        process = start(script, out)
        while process.poll() is None and set(out.rglob("checkpoint.pt")) <= before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.3))  # in training, in writing, or between two runs
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    done = carry_out(plan, Settings(out=out, jobs=2))
    assert done.complete
    assert kills > 0
    assert max(record.summary["sessions"] for record in done.results.records.values()) > 1  # checkpoints were used
    assert weights(plan, out) == {key: record.summary["weights"] for key, record in expected.results.records.items()}
    for key, record in done.results.records.items():
        assert record.metrics().equals(expected.results.records[key].metrics())


TUNED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from lab_helpers import tiny_tuned
from layerwise.lab.experiments import tuned_recipe
from layerwise.lab.experiments.runner import Settings
if __name__ == "__main__":
    import dataclasses
    from layerwise.lab.experiments import runner
    left = runner.chains_left
    runner.chains_left = lambda *given: [dataclasses.replace(each, checkpoint_seconds=0.02) for each in left(*given)]
    tuned_recipe.run(tiny_tuned(iterations=60, extensions=1), Settings(out=Path(sys.argv[1]), jobs=2))
"""


@pytest.mark.full
@pytest.mark.dist
@posix
def test_a_tuning_killed_twice_chooses_and_ends_with_the_same_bits(tmp_path):
    script = tmp_path / "tuned.py"
    script.write_text(TUNED.format(tests=os.path.dirname(lab_helpers.__file__)))
    bench, out, kills = tiny_tuned(iterations=60, extensions=1), tmp_path / "killed", 0
    for count in (3, 12):  # of the 20 runs of the tuning or more
        process = start(script, out)
        while process.poll() is None and len(list(out.rglob("record.json"))) < count:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2
    times = {path: path.stat().st_mtime_ns for path in out.rglob("record.json")}
    done = tuned_recipe.run(bench, Settings(out=out, jobs=2))
    whole = tuned_recipe.run(bench, Settings(out=tmp_path / "whole", jobs=2))
    assert done.complete
    assert whole.complete
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert [(one.trials, one.chosen) for one in done.plan.tuning.arms] == [
        (one.trials, one.chosen) for one in whole.plan.tuning.arms
    ]
    assert {key: record.summary["weights"] for key, record in done.results.records.items()} == {
        key: record.summary["weights"] for key, record in whole.results.records.items()
    }


@pytest.mark.full
@pytest.mark.dist
@posix
def test_two_at_once_never_do_the_same_run(tmp_path):
    script, out = script_of(tmp_path, 20), tmp_path / "runs"
    both = [start(script, out) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    assert all("Traceback" not in errors for _, errors in said), said
    plan = tiny_plan(seeds=1, iterations=20, test_every=20)
    ended = carry_out(plan, Settings(out=out, jobs=2))
    assert ended.complete
    sessions = [record.summary["sessions"] for record in ended.results.records.values()]
    assert set(sessions) == {1}


@pytest.mark.usefixtures("in_process")
def test_a_failing_run_is_named_and_the_others_done(tmp_path):
    plan = tiny_plan()
    broken = [
        replace(run, configuration=replace(run.configuration, rule={"name": "LARS", "eta": 1}))
        if run.key == ("nag", "layer-adaptive", 0)
        else run
        for run in plan.runs
        if run.subject in ("nag",) and run.arm.name in ("plain", "layer-adaptive")
    ]
    outcome = carry_out(replace(plan, runs=tuple(broken)), Settings(out=tmp_path / "runs", jobs=1))
    assert outcome.exit_code == 1
    (failure,) = outcome.failures
    assert failure.doing == "nag layer-adaptive seed 0"
    assert "rule LARS" in failure.reason
    assert set(outcome.results.records) == {("nag", "plain", 0)}


@pytest.mark.full
@pytest.mark.dist
def test_the_number_of_processes_changes_no_bit(first, tmp_path):
    plan = tiny_plan(seeds=1)
    one = carry_out(plan, Settings(out=tmp_path / "runs", jobs=1))
    expected = weights(plan, first[0].settings.out)
    assert {key: record.summary["weights"] for key, record in one.results.records.items()} == expected
    assert {record.summary["threads"] for record in one.results.records.values()} == {1}


@pytest.mark.usefixtures("in_process")
def test_other_threads_are_other_runs(tmp_path):
    plan = tiny_plan(seeds=1)
    plan = replace(plan, runs=tuple(run for run in plan.runs if run.key == ("sgd", "plain", 0)))
    both = [carry_out(plan, Settings(out=tmp_path, threads=threads)) for threads in (1, 2)]
    assert [outcome.found for outcome in both] == [0, 0]
    assert [outcome.results.records["sgd", "plain", 0].summary["threads"] for outcome in both] == [1, 2]


@pytest.mark.usefixtures("in_process")
def test_a_failing_control_leaves_the_others_of_its_chain(tmp_path):
    plan = tiny_plan(seeds=1)
    runs = [
        replace(run, arm=replace(run.arm, control="shuffled layers")) if run.arm.name == "mean-factor" else run
        for run in plan.runs
        if run.subject == "sgd"
    ]
    slow = [replace(run, configuration=slower(run.configuration)) for run in runs]
    outcome = carry_out(replace(plan, runs=tuple(slow)), Settings(out=tmp_path, jobs=1))
    assert {failure.doing for failure in outcome.failures} == {
        "sgd mean-factor seed 0",
        "sgd shuffled seed 0",
    }
    assert {arm for _, arm, _ in outcome.results.records} == {"plain", "layer-adaptive", "frozen"}
    assert (outcome.exit_code, outcome.skipped) == (1, [])


def slower(configuration):
    """Record the factors of every other update only, which a control with shuffled layers cannot repeat."""
    return replace(configuration, trial={**configuration.trial, "factors_every": 2})


@pytest.mark.usefixtures("in_process")
def test_runs_of_one_configuration_are_one_run(tmp_path):
    plan = tiny_plan(seeds=1)
    (plain,) = [run for run in plan.runs if run.key == ("sgd", "plain", 0)]
    again = replace(plain, subject="nag")
    outcome = carry_out(replace(plan, runs=(plain, again)), Settings(out=tmp_path, jobs=2))
    assert outcome.complete
    assert (outcome.exit_code, outcome.skipped) == (0, [])
    assert len(list((tmp_path / "store").iterdir())) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"jobs": 0}, "jobs=0: must be from 1"),
        ({"engine": "slurm"}, "engine='slurm': use 'local' or 'ray'"),
        ({"device": "gpu"}, "device='gpu' is none of PyTorch's: use cpu, cuda"),
        ({"device": "gpu", "engine": "ray"}, "device='gpu' is none of PyTorch's"),
        ({"device": "meta"}, "finds none on this machine: use cpu"),
    ],
)
def test_settings_that_cannot_be_used_are_named(values, words):
    with pytest.raises(UsageError, match=words):
        Settings(**values)


def test_a_device_must_be_there_unless_a_cluster_trains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device='cuda': PyTorch .* finds none on this machine"):
        Settings(device="cuda")
    assert Settings(device="cuda:3", engine="ray").device == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Settings(device="cuda:1").device == "cuda:1"
    with pytest.raises(UsageError, match="device='cuda:2': this machine has 2, counted from 0: use cuda:1"):
        Settings(device="cuda:2")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Settings(out=tmp_path / "file")

    def refused(**_):
        raise NotADirectoryError(20, "Not a directory")

    monkeypatch.setattr(experiment.tempfile, "TemporaryDirectory", refused)
    with pytest.raises(UsageError, match="cannot be written"):
        carry_out(tiny_plan(), Settings(out=tmp_path / "runs"))
