import json
import os
import signal
import subprocess
import sys
import time

import polars
import pytest
from rich.console import Console

from amplification.conftest import TINY
from layerwise.lab.amplification.demo import Settings, run_demo
from layerwise.lab.amplification.training import ARMS
from layerwise.lab.plan import write_results
from layerwise.lab.progress import BarDisplay, LineDisplay
from layerwise.lab.report import page
from layerwise.lab.report.amplification import render

SCRIPT = """
import sys
from layerwise.lab import cli
from layerwise.lab.amplification import demo, training
tiny = training.Protocol(epochs=8, train_count=56, test_count=20, batch_size=16, width=2)
demo.Settings.__init__.__kwdefaults__["protocol"] = tiny
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""
"""The real command with tiny runs."""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A demo of five arms and two seeds in two processes."""
    out = tmp_path_factory.mktemp("amplification") / "runs"
    settings = Settings(out=out, seeds=2, jobs=2, protocol=TINY)
    target = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        outcome = run_demo(settings, LineDisplay(target))
        write_results(outcome)
        page.write(outcome, render(outcome, "layerwise demo amplification"))
        yield outcome, target.export_text()


@pytest.mark.dist
def test_every_run_has_its_file(first):
    outcome, _ = first
    names = {f"{arm}-seed{seed}.json" for arm in ARMS for seed in (0, 1)}
    assert {path.name for path in outcome.folder.iterdir()} == names | {"results.parquet"}
    assert (outcome.exit_code, outcome.found, outcome.planned, len(outcome.results.records)) == (0, 0, 10, 10)
    assert outcome.folder.name == "amplification"
    assert outcome.report.name == "report-amplification.html"
    assert outcome.report.exists()
    assert polars.read_parquet(outcome.folder / "results.parquet").height == outcome.results.frame().height


@pytest.mark.dist
def test_the_arms_of_a_seed_agree_up_to_the_first_amplified_epoch(first):
    records = first[0].results.records
    for seed in (0, 1):
        for arm in ARMS:
            for quantity in ("accuracy", "training_loss"):
                assert records[arm, seed][quantity][:4] == records["plain", seed][quantity][:4]
        assert records["all", seed]["training_loss"][5:] != records["plain", seed]["training_loss"][5:]
    assert records["plain", 0]["training_loss"] != records["plain", 1]["training_loss"]


@pytest.mark.dist
def test_the_log_of_a_pipe_is_plain_lines(first):
    words = " ".join(first[1].split())
    assert "ResNet-10, 2 channels wide, on MNIST digits in frames of 32 x 32 pixels" in words
    assert "10 runs of 8 epochs in 2 processes; Ctrl-C keeps the finished ones." in words
    assert "10/10 runs" in words
    assert "% accuracy" in words


@pytest.mark.dist
def test_a_second_call_repeats_only_what_is_missing_or_broken(first):
    outcome, _ = first
    missing, broken = outcome.folder / "G-seed1.json", outcome.folder / "all-seed0.json"
    before = {path: json.loads(path.read_text()) for path in (missing, broken)}
    times = {path.name: path.stat().st_mtime_ns for path in outcome.folder.glob("*.json")}
    missing.unlink()
    broken.write_text('{"configuration": ')
    target = Console(width=80, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        again = run_demo(outcome.settings, BarDisplay(target))
    assert again.found == 8
    assert again.renamed == [broken.with_name("all-seed0.json.broken")]
    after = {path.name: path.stat().st_mtime_ns for path in outcome.folder.glob("*.json")}
    assert {name for name in times if times[name] != after[name]} == {"G-seed1.json", "all-seed0.json"}
    for path, record in before.items():
        repeated = json.loads(path.read_text())
        for quantity in ("accuracy", "training_loss", "share", "selections"):
            assert repeated[quantity] == record[quantity]
    words = " ".join(target.export_text().split())
    assert "8 of 10 runs were finished already" in words
    assert "all-seed0.json was damaged" in words
    again.renamed[0].unlink()


@pytest.mark.dist
def test_another_weight_decay_has_its_own_folder_and_report(tmp_path):
    settings = Settings(out=tmp_path, seeds=1, jobs=1, protocol=TINY, weight_decay=0.0)
    outcome = run_demo(settings)
    assert outcome.folder == tmp_path / "amplification-decay0"
    assert outcome.report == tmp_path / "report-amplification-decay0.html"
    assert len(outcome.results.records) == 5
    assert outcome.results.records["plain", 0]["configuration"]["recipe"]["weight_decay"] == 0.0


@pytest.mark.dist
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_keeps_finished_runs_and_leaves_nothing_half_written(tmp_path):
    script, out = tmp_path / "short.py", tmp_path / "runs"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "demo", "amplification", "--out", str(out), "--seeds", "200", "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while process.poll() is None and len(list((out / "amplification").glob("*.json"))) < 2:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        words, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert "of 1000 runs are finished" in words
    files = list((out / "amplification").iterdir())
    finished = [path for path in files if path.suffix == ".json"]
    assert 2 <= len(finished) < 1000
    for path in finished:
        assert json.loads(path.read_bytes())["accuracy"][-1][0] == 8
    assert [path.name for path in files if path.suffix != ".json"] == ["results.parquet"]
    assert "Interrupted" in (out / "report-amplification.html").read_text()
