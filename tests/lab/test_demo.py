import json
import os
import signal
import subprocess
import sys
import time

import polars
import pytest
from rich.console import Console

from layerwise.lab import console
from layerwise.lab.demo import PROTOCOLS, Protocol, Settings, run_demo
from layerwise.lab.plan import write_results
from layerwise.lab.progress import BarDisplay, LineDisplay
from layerwise.lab.report import page, render

TINY = Protocol(iterations=4, record_at=(2, 4), loss_every=2, rate_every=2)
ARMS = ("plain", "layer-adaptive", "control")

SCRIPT = """
import sys
from layerwise.lab import cli, demo
demo.PROTOCOLS["digits5k"] = demo.Protocol(20, (10, 20))
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""
"""The real command with shorter runs."""


def text_of(display_or_table, width=80):
    target = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        target.print(display_or_table)
        return target.export_text()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A demo of two solvers, three arms and two seeds in two processes."""
    settings = Settings(
        out=tmp_path_factory.mktemp("lab") / "runs",
        seeds=2,
        jobs=2,
        solvers=("sgd", "adagrad"),
        protocol=TINY,
    )
    target = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        outcome = run_demo(settings, LineDisplay(target))
        write_results(outcome)
        page.write(outcome, render(outcome, "layerwise demo"))
        yield outcome, target.export_text()


@pytest.mark.dist
def test_every_run_has_its_file(first):
    outcome, _ = first
    names = {f"{solver}-{arm}-seed{seed}.json" for solver in ("sgd", "adagrad") for arm in ARMS for seed in (0, 1)}
    assert {path.name for path in outcome.folder.iterdir()} == names | {"results.parquet"}
    assert (outcome.exit_code, outcome.found, outcome.planned) == (0, 0, 12)
    record = json.loads((outcome.folder / "sgd-layer-adaptive-seed1.json").read_text())
    assert record["configuration"]["seed"] == 1
    assert record["diverged_at"] is None
    assert outcome.report.exists()


@pytest.mark.dist
def test_the_control_has_the_mean_factor_of_its_own_solver_and_seed(first):
    records = first[0].results.records
    factors = set()
    for solver in ("sgd", "adagrad"):
        for seed in (0, 1):
            factor = records[solver, "control", seed]["configuration"]["rate_factor"]
            assert factor == records[solver, "layer-adaptive", seed]["factor"]["mean"]
            factors.add(factor)
    assert len(factors) == 4


@pytest.mark.dist
def test_the_results_table_holds_every_number(first):
    outcome, _ = first
    frame = polars.read_parquet(outcome.folder / "results.parquet")
    assert frame.filter(polars.col("quantity") == "test_error").height == 12 * 2
    assert frame.filter(polars.col("quantity") == "training_loss").height == 12 * 2
    assert frame.filter(polars.col("quantity") == "rate").height == 12 * 2 * 4
    assert frame["layer"].drop_nulls().unique().sort().to_list() == ["conv1", "conv2", "ip1", "ip2"]
    assert not frame["diverged"].any()


@pytest.mark.dist
def test_the_table_fits_80_columns_and_has_three_rows_a_solver(first):
    lines = text_of(console.table(first[0])).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.strip() in ("SGD", "AdaGrad")] == ["SGD", "AdaGrad"]
    assert sum("plain at the mean factor" in line for line in lines) == 2
    assert sum("±" in line for line in lines) == 1 + 6


@pytest.mark.dist
def test_the_log_of_a_pipe_is_plain_lines(first):
    _, log = first
    assert "12 runs of 4 iterations in 2 processes" in log
    assert "12/12 runs" in log


@pytest.mark.dist
def test_a_second_call_repeats_nothing_and_says_so(first):
    outcome, _ = first
    times = {path.name: path.stat().st_mtime_ns for path in outcome.folder.glob("*.json")}
    target = Console(width=80, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        again = run_demo(outcome.settings, BarDisplay(target))
    assert again.found == 12
    assert times == {path.name: path.stat().st_mtime_ns for path in outcome.folder.glob("*.json")}
    assert again.results.records.keys() == outcome.results.records.keys()
    words = " ".join(target.export_text().split())
    assert "12 of 12 runs were finished already" in words
    assert "delete" in words


@pytest.mark.dist
def test_a_broken_file_is_named_and_its_run_is_repeated(first):
    outcome, _ = first
    path = outcome.folder / "sgd-layer-adaptive-seed0.json"
    before = json.loads(path.read_text())
    path.write_text('{"configuration": ')
    target = Console(width=80, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with target.file:
        again = run_demo(outcome.settings, BarDisplay(target))
    # Its control is repeated with it, as the mean factor is not known before.
    assert again.found == 10
    assert again.renamed == [path.with_name(path.name + ".broken")]
    assert "sgd-layer-adaptive-seed0.json was damaged: set aside as" in " ".join(target.export_text().split())
    after = json.loads(path.read_text())
    assert {key: after[key] for key in ("test_error", "training_loss", "rates", "factor")} == {
        key: before[key] for key in ("test_error", "training_loss", "rates", "factor")
    }


def test_the_protocols_are_those_stated():
    assert PROTOCOLS["mnist"].record_at == (600, 1000, 1400, 1800)
    assert PROTOCOLS["mnist"].iterations == 1800
    assert (PROTOCOLS["digits5k"].iterations, PROTOCOLS["digits5k"].record_at) == (300, (50, 100, 200, 300))


@pytest.mark.dist
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_keeps_finished_runs_and_leaves_nothing_half_written(tmp_path):
    script, out = tmp_path / "short.py", tmp_path / "runs"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), "demo", "--out", str(out), "--seeds", "200", "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while process.poll() is None and len(list((out / "demo").glob("*.json"))) < 2:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        words, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert "Interrupted" in words
    assert "of 1800 runs are finished" in words
    files = list((out / "demo").iterdir())
    finished = [path for path in files if path.suffix == ".json"]
    assert 2 <= len(finished) < 1800
    for path in finished:
        assert json.loads(path.read_bytes())["test_error"]
    assert [path.name for path in files if path.suffix != ".json"] == ["results.parquet"]
    assert "Interrupted" in (out / "report.html").read_text()
    assert {path.name for path in out.iterdir()} == {"demo", "report.html"}
