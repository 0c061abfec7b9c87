import builtins
import json
import sys

import pytest
from rich.console import Console

import layerwise
from layerwise.lab import cli, console, demo
from layerwise.lab.pool import Failure


@pytest.fixture(autouse=True)
def _no_data_of_the_person(monkeypatch):
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)


@pytest.fixture
def made_up(monkeypatch, make_outcome):
    """Let the command find made-up runs instead of training."""
    outcomes = []

    def run_demo(settings, display):
        errors = {"plain": [5.0] * 5, "layer-adaptive": [4.0, 4.1, 4.0, 3.9, 4.2], "control": [4.0] * 5}
        outcome = make_outcome(errors, interrupted="interrupted" in str(settings.out))
        if "failed" in str(settings.out):
            outcome.failures = [Failure("sgd seed 0", "sgd-plain-seed0", "RuntimeError: no", "Traceback...\n")]
        outcomes.append(outcome)
        return outcome

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return outcomes


def test_the_command_alone_prints_its_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"layerwise {layerwise.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "seeds=0: must be from 1 to 1000"),
        (["--seeds", "-3"], "seeds=-3: must be from 1"),
        (["--jobs", "-1"], "jobs=-1: must be from 1 to 1024; leave --jobs out"),
        (["--jobs", "0"], "jobs=0"),
        (
            ["--data-dir", "/nowhere/at/all"],
            "data-dir='/nowhere/at/all' is not a folder: give an existing one",
        ),
        (["--out", __file__], "is a file: give a folder"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_damaged_data_file_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"x")
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "train-images-idx3-ubyte.gz: damaged" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_dependency_names_the_extra(capsys, monkeypatch):
    real = builtins.__import__

    def without_tyro(name, *rest, **more):
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    for name in ("tyro", "layerwise.lab.options"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["demo"]) == 1
    assert 'pip install "layerwise[lab]"' in capsys.readouterr().err


def test_json_prints_one_object_and_nothing_else(capsys, made_up, tmp_path):
    assert cli.main(["demo", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert (result["planned"], result["finished"], result["interrupted"]) == (15, 15, False)
    assert len(result["errors"]) == 6
    assert result["errors"][0] == {
        "solver": "sgd",
        "arm": "plain",
        "iteration": 2,
        "mean": 10.0,
        "sd": 0.0,
        "runs": 5,
        "diverged": 0,
    }
    against_plain, against_control = result["verdict"][0]["comparisons"]
    assert against_plain["outcome"] == "lower error"
    assert against_control["outcome"] == "no difference shown"
    assert "not shown to be more" in result["verdict"][0]["conclusion"]
    assert made_up[0].report.exists()


def test_the_person_reads_table_verdict_report_and_next_command(capsys, made_up):
    assert cli.main(["demo"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for part in ("test error in %", "plain at the mean factor", "beats the plain solver but not the control"):
        assert part in words
    assert "Bonferroni" in words
    assert "report.html" in words
    assert "Next: layerwise demo --data-dir FOLDER" in words


def test_quiet_prints_the_conclusion_and_the_report_only(capsys, made_up):
    assert cli.main(["demo", "--quiet"]) == 0
    words = capsys.readouterr().out
    assert "beats the plain solver" in words
    assert "report.html" in words
    assert "test error in %" not in words
    assert "Next" not in words


def test_an_interrupted_demo_ends_with_130_and_says_how_to_go_on(capsys, made_up):
    assert cli.main(["demo", "--out", "interrupted here"]) == 130
    words = " ".join(capsys.readouterr().out.split())
    assert "Interrupted: 15 of 15 runs are finished" in words
    assert "Next: layerwise demo --out 'interrupted here'" in words


def test_a_failed_run_is_named_and_ends_with_1(capsys, made_up):
    assert cli.main(["demo", "--out", "failed"]) == 1
    words = capsys.readouterr().out
    assert "FAILED sgd-plain-seed0 (sgd seed 0): RuntimeError: no" in words
    assert "Traceback..." in words
    assert cli.main(["demo", "--out", "failed", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failures"][0]["doing"] == "sgd-plain-seed0"
    assert "sgd-plain-seed0" in captured.err


def test_an_interrupt_before_any_run_ends_with_130(capsys, monkeypatch):
    def interrupted(settings, display):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_next_command_on_full_mnist_is_the_papers_ten_seeds():
    assert cli._without_seeds(["--seeds", "5", "--out", "a"]) == ["--out", "a"]
    assert cli._without_seeds(["--out", "a", "--seeds=5"]) == ["--out", "a"]


def test_a_table_of_four_columns_of_large_errors_fits_80_columns(make_outcome):
    outcome = make_outcome({"plain": [90.0, 0.0], "layer-adaptive": [90.0, 0.0], "control": [90.0, 0.0]})
    for record in outcome.results.records.values():
        record["test_error"][0][1] = 22.0
    outcome.results.record_at = (2, 4, 2, 4)
    target = Console(width=80)
    with target.capture() as captured:
        target.print(console.table(outcome))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert captured.get().count("45.0 ± 63.6") == 6
    assert captured.get().count("22.00 ± 0.00") == 6
    assert "…" not in captured.get()
