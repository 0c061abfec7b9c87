import json
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from amplification.test_results import ACCURACIES
from layerwise.lab import cli
from layerwise.lab.amplification import console, demo
from layerwise.lab.amplification.training import ARMS


@pytest.fixture(autouse=True)
def _no_data_of_the_person(monkeypatch):
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)


@pytest.fixture
def made_up(monkeypatch, make_outcome) -> Iterator[list]:
    """Let the command find made-up runs instead of training."""
    outcomes = []

    def run_demo(settings, display):
        outcome = make_outcome(ACCURACIES, interrupted="interrupted" in str(settings.out))
        outcomes.append((settings, outcome))
        return outcome

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return outcomes


def test_the_table_fits_80_columns_and_has_a_row_an_arm(make_outcome):
    outcome = make_outcome({arm: [90.0, 0.0] for arm in ARMS})
    target = Console(width=80)
    with target.capture() as captured:
        target.print(console.table(outcome))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in captured.get()
    for words in ARMS.values():
        assert sum(line.startswith(f"{words} ") for line in lines) == 1
    assert any("45.0 ± 63.6" in line and "90.00" in line and "2.0, 2.0" in line for line in lines)


def test_an_arm_with_missing_or_diverged_runs_says_so(make_outcome):
    outcome = make_outcome({"plain": [40.0, 41.0], "G": [40.0]})
    outcome.results.records["plain", 0]["diverged_at"] = 1
    target = Console(width=80)
    with target.capture() as captured:
        target.print(console.table(outcome))
    assert "(2 runs, 1 diverged)" in captured.get()
    assert "(1 runs)" in captured.get()
    assert "(0 runs)" in captured.get()


def test_json_prints_one_object_and_nothing_else(capsys, made_up):
    assert cli.main(["demo", "amplification", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert (result["planned"], result["finished"], result["weight_decay"], result["layers"]) == (25, 25, 5e-4, 4)
    assert result["protocol"]["epochs"] == 8
    assert [row["arm"] for row in result["accuracies"]] == list(ARMS)
    assert result["accuracies"][2]["layers_chosen"] == {"4": [1] * 5, "6": [1] * 5}
    assert result["accuracies"][0]["last_epoch"]["mean"] == pytest.approx(40.6)
    assert result["accuracies"][0]["best_run"] == 42.0
    assert [row["arm"] for row in result["verdict"]] == ["random", "G", "G_prime", "all"]
    assert result["verdict"][1]["comparisons"][0]["outcome"] == "higher accuracy"
    assert result["report"].endswith("report-amplification.html")
    assert made_up[0][1].report.exists()


def test_one_seed_has_no_spread_in_json(make_outcome):
    result = json.loads(console.as_json(make_outcome({arm: [40.0] for arm in ARMS})))
    assert result["accuracies"][0]["last_epoch"]["sd"] is None


def test_the_person_reads_table_verdict_report_and_next_command(capsys, made_up):
    assert cli.main(["demo", "amplification", "--seeds", "5"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for part in (
        "test accuracy in %",
        "Epoch 8 is judged",
        "layers by G: The gain is more than that of amplifying every layer",
        "No difference shown between random layers and plain",
        "all 7 comparisons",
        "report-amplification.html",
        "Next: layerwise demo amplification --seeds 5 --weight-decay 0",
    ):
        assert part in words


def test_quiet_prints_the_conclusions_and_the_report_only(capsys, made_up):
    assert cli.main(["demo", "amplification", "--quiet"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "No layer was ever chosen" in words
    assert "report-amplification.html" in words
    assert "test accuracy" not in words
    assert "Next" not in words


def test_an_interrupted_demo_ends_with_130_and_says_how_to_go_on(capsys, made_up):
    assert cli.main(["demo", "amplification", "--out", "interrupted here"]) == 130
    words = " ".join(capsys.readouterr().out.split())
    assert "Interrupted: 25 of 25 runs are finished" in words
    assert "Next: layerwise demo amplification --out 'interrupted here'" in words


def test_the_options_arrive(made_up, tmp_path):
    place = str(tmp_path)
    options = ["--data-dir", place, "--out", place, "--seeds", "7", "--jobs", "3", "--weight-decay", "0", "--json"]
    assert cli.main(["demo", "amplification", *options]) == 0
    settings, _ = made_up[0]
    assert (str(settings.data_dir), str(settings.out), settings.seeds, settings.jobs) == (place, place, 7, 3)
    assert settings.weight_decay == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["amplification", "--seeds", "0"], "seeds=0: must be from 1 to 1000"),
        (["amplification", "--weight-decay", "-1"], "weight-decay=-1.0: must be from 0 to below 1"),
        (["amplification", "--weight-decay", "nan"], "weight-decay=nan"),
        (["amplification", "--data-dir", "/nowhere/at/all"], "'/nowhere/at/all' is not a folder"),
        (["--weight-decay", "0"], "weight-decay=0.0: the LeNet demo has Caffe's 0.0005"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line_and_exit_code_2(capsys, arguments, words):
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_another_demo_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "alexnet"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "amplification" in captured.out + captured.err
    assert sys.exc_info() == (None, None, None)
