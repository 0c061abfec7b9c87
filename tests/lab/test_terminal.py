"""What is printed when an experiment is done, for people and for programs."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from made_up import (
    SWEEP_LAYERS,
    TABLE_STEPS,
    finish_plan,
    outcome_of,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
    table_value,
)
from rich.console import Console

from layerwise.lab import terminal
from layerwise.lab.pool import Failure

HOSTILE = "[bold]x[/bold]\x1b[31m\x07[/nothing]"


@pytest.fixture(scope="module")
def table_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    finish_plan(table_plan(), out, table_value, steps=TABLE_STEPS)
    return out


@pytest.fixture(scope="module")
def sweep_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    more = {"layers": SWEEP_LAYERS, "selections": sweep_selections, "quantity": "accuracy"}
    finish_plan(sweep_plan("best"), out, sweep_value, **more)
    return out


@pytest.fixture
def table(table_runs, tmp_path):
    return outcome_of(table_plan(), table_runs, tmp_path)


def printed(outcome, width=80, **how):
    stream = io.StringIO()
    terminal.show(outcome, Console(file=stream, width=width, highlight=False), **{"quiet": False, **how})
    return stream.getvalue()


def test_the_paper_stands_below_ours_in_80_columns(table):
    text = printed(table, next_command="layerwise run singh2015-table1 --scale full")
    lines = text.splitlines()
    ours = next(place for place, line in enumerate(lines) if line.startswith("  plain "))
    assert lines[ours].count("±") == 4
    assert "1.52 ± 0.09" in lines[ours + 1]
    assert lines[ours + 1].startswith("    paper")
    assert "SGD, layer-adaptive: It beats plain but not plain at the mean factor" in " ".join(text.split())
    assert "Student's paired t" in " ".join(text.split())
    assert f"Report: {table.report}" in text
    assert "Next:   layerwise run singh2015-table1 --scale full" in text
    short = [line for line in lines if not line.startswith(("Report:", "Next:"))]
    assert max(map(len, short)) <= 80


def test_the_paper_stands_beside_ours_where_there_is_room(table):
    line = next(line for line in printed(table, width=160).splitlines() if line.startswith("  plain "))
    assert "(paper 1.52 ± 0.09)" in line


@pytest.mark.parametrize("layout", ["thresholds", "best", "times"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_layout_keeps_within_the_width(sweep_runs, tmp_path, layout, width):
    outcome = outcome_of(replace(sweep_plan("best"), layout=layout), sweep_runs, tmp_path)
    text = printed(outcome, width=width)
    lines = [line for line in text.splitlines() if not line.startswith(("Report:", "Next:"))]
    assert max(map(len, lines)) <= width
    assert "G case 1" in text
    assert "…" not in text
    for number in ("90.0",) if layout != "times" else ("+0.0 %",):
        assert number in text


def test_many_columns_are_spread_over_several_tables(table):
    steps = tuple(range(200, 2200, 200))
    table.results.plan = table.plan = replace(table.plan, columns=steps)
    text = printed(table)
    for step in steps:
        assert f"{step:,}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("Report:")) <= 80


def test_quiet_prints_the_conclusion_and_the_report(table):
    text = printed(table, quiet=True, next_command="layerwise")
    assert "±" not in text
    assert "It beats plain" in text
    assert "Report:" in text
    assert "Next:" not in text


def test_failures_missing_and_diverged_runs_are_named(table):
    key = ("nag", "plain", 1)
    del table.results.records[key]
    record = table.results.records["sgd", "plain", 0]
    table.results.records["sgd", "plain", 0] = replace(record, summary={**record.summary, "diverged_at": 7})
    table.failures = [Failure("job", "nag plain seed 1", "disk full", "Traceback: here")]
    table.skipped = ["sgd plain seed 3: another process works on this run"]
    text = " ".join(printed(table).split())
    assert "FAILED nag plain seed 1 (job): disk full" in text
    assert "Traceback: here" in text
    assert "Skipped sgd plain seed 3" in text
    assert "(4 of 5 runs)" in text
    assert "(1 of 5 diverged)" in text
    assert "Incomplete: 44 of 45 runs are finished" in text
    assert "Traceback" not in printed(table, quiet=True)


def test_nothing_finished_prints_no_table(table):
    table.results.records.clear()
    table.interrupted = True
    text = printed(table)
    assert "Interrupted: 0 of 45 runs are finished; nothing is kept." in text
    assert "Report:" not in text


def test_hostile_names_neither_style_nor_move_the_cursor(table):
    plan = table.plan
    subjects = tuple(replace(subject, words=subject.words + HOSTILE) for subject in plan.subjects)
    arms = tuple(replace(arm, words=arm.words + HOSTILE) for arm in plan.arms)
    table.plan = table.results.plan = replace(plan, subjects=subjects, arms=arms, title=HOSTILE)
    table.failures = [Failure(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]
    table.skipped = [HOSTILE]
    text = printed(table, next_command=HOSTILE)
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_json_holds_the_table_the_verdict_and_the_files(table):
    read = json.loads(terminal.as_json(table))
    assert read["plan"] == "singh2015-table1-reduced"
    assert (read["planned"], read["finished"], read["complete"]) == (45, 45, True)
    assert len(read["table"]) == 36
    first = read["table"][0]
    assert (first["subject"], first["arm"], first["step"], first["paper_mean"]) == ("sgd", "plain", 600, 3.29)
    assert [each["subject"] for each in read["verdict"]] == ["sgd", "nag", "adagrad"]
    assert len(read["verdict"][0]["comparisons"]) == 8
    assert "Holm" not in read["verdict"][0]["comparisons"][0]["sentence"]
    assert read["report"] == str(table.report)
    assert "test error" in read["headline"]


def test_json_has_no_nan_and_no_verdict_without_runs(table):
    record = table.results.records["sgd", "plain", 0]
    table.results.records = {("sgd", "plain", 0): replace(record, summary={**record.summary, "diverged_at": 1})}
    assert "NaN" not in terminal.as_json(table)
    table.results.records = {}
    read = json.loads(terminal.as_json(table))
    assert read["report"] is None
    assert read["finished"] == 0


def test_the_console_asks_for_80_columns_where_there_is_no_terminal(capsys):
    assert terminal.console().width == 80
