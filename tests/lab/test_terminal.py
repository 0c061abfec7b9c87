"""What is printed when an experiment is done, for people and for programs."""

from __future__ import annotations

import io
import json
import re
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

from layerwise.lab.experiments.pool import Failure
from layerwise.lab.experiments.results import Results
from layerwise.lab.report import terminal
from layerwise.lab.tasks import compare
from layerwise.lab.tasks import task as tasks

OWN = """
import torch
from torch import nn

def task(seed):
    inputs = torch.randn(4, 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    loss = lambda model, batch: model(batch).square().mean()
    metric = lambda model: {"error": float(loss(model, inputs))}
    return {"model": model, "batches": [inputs], "loss": loss, "metric": metric}
"""

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
    text = printed(table, explain=True, next_command="layerwise run singh2015-table1 --scale full")
    lines = text.splitlines()
    ours = next(place for place, line in enumerate(lines) if line.startswith("  plain "))
    assert lines[ours].count("±") == 4
    assert "1.52 ± 0.09" in lines[ours + 1]
    assert lines[ours + 1].startswith("    paper")
    assert "SGD: layer-adaptive has a lower test error than plain (−0.20 points" in " ".join(text.split())
    assert "Student's paired t" in " ".join(text.split())
    assert f"Report: {table.report}" in text
    assert "Next:   layerwise run singh2015-table1 --scale full" in text
    short = [line for line in lines if not line.startswith(("Report:", "Next:"))]
    assert max(map(len, short)) <= 80


def test_a_run_of_a_usual_size_takes_25_lines(table):
    text = printed(table, next_command="layerwise run singh2015-table1 --scale full")
    lines = text.splitlines()
    assert len(lines) <= 25
    words = " ".join(text.split())
    assert "Test error in % after iteration 1,800, mean ± standard deviation over 5 seeds." in words
    assert "SGD NAG AdaGrad" in words
    ours = next(place for place, line in enumerate(lines) if line.startswith("  plain "))
    assert lines[ours + 1].split() == ["paper", *["1.52", "±", "0.09", "1.56", "±", "0.09", "1.41", "±", "0.09"]]
    assert "layer-adaptive: lower test error than points [95 % interval]" in words
    assert re.search(r"SGD plain YES −0\.20 \[−0\.2\d+, −0\.1\d+\]", words)
    assert re.search(r"plain at the mean factor unclear [−+]0\.0\d+ \[−0\.0\d+, \+0\.0\d+\] NAG plain", words)
    assert "Measured too: training loss; shown with --explain." in words
    assert words.count("show layer-adaptive with SGD, NAG and AdaGrad to have a lower test error than plain") == 1
    assert lines[-2].startswith(f"Report: {table.report}")
    assert lines[-1] == "Next:   layerwise run singh2015-table1 --scale full"
    for method in ("Student", "Holm", "bootstrap", "has a lower test error"):
        assert method not in text
        assert method in printed(table, explain=True)


def test_explain_adds_every_number_and_every_comparison(table):
    text = printed(table, explain=True)
    words = " ".join(text.split())
    for step in table.plan.columns:
        assert f"{step:,}" in text
    assert "Training loss, last" in words
    assert words.count(": layer-adaptive has a lower test error than plain (−0.20 points") == 3
    assert "YES: shown to be better. no: shown to be worse." in words


def test_verdicts_of_many_subjects_share_a_row(table):
    plan, arms = table.plan, table.plan.arms
    twice = tuple(replace(arm, against=(*arm.against, "mean-factor")) if arm.name == "plain" else arm for arm in arms)
    table.plan = table.results.plan = replace(plan, arms=twice)
    words = " ".join(printed(table).split())
    assert re.search(r"layer-adaptive plain YES −0.20 YES −0.20 YES −0.20 plain at the mean unclear", words)
    assert "95 % interval" not in words
    many = tuple(replace(subject, name=f"{subject.name} {place}") for place in (1, 2) for subject in plan.subjects)
    table.plan = replace(table.plan, subjects=many, runs=())
    records = table.results.records.items()
    twice_each = {(f"{key[0]} {place}", *key[1:]): record for key, record in records for place in (1, 2)}
    table.results = Results(table.plan, twice_each)
    words = " ".join(printed(table).split())
    assert "on 6 subjects" in words
    assert "layer-adaptive plain YES 6 plain at the mean factor unclear 6" in words


def test_a_group_has_the_lowest_and_the_highest_mean(sweep_runs, tmp_path):
    outcome = outcome_of(sweep_plan("best"), sweep_runs, tmp_path)
    words = " ".join(printed(outcome).split())
    assert "of a group the lowest and the highest mean" in words
    assert "G case 1 88.00 to 92.00 (paper 93.90) 88.00 to 92.00" in words
    assert "G case 1 plain YES at 1, no at 1 of 3" in words
    assert "G′ case 1 plain unclear" in words


def test_what_keeps_a_difference_from_being_called_stands_beside_it(table):
    results = table.results
    few = {key: record for key, record in results.records.items() if key[0] != "nag" or key[2] < 2}
    record = few["sgd", "layer-adaptive", 0]
    few["sgd", "layer-adaptive", 0] = replace(record, summary={**record.summary, "diverged_at": 7})
    table.results = Results(table.plan, few)
    words = " ".join(printed(table).split())
    assert re.search(r"NAG plain unclear −0.1\d* \(2 pairs\)", words)
    assert re.search(r"SGD plain unclear −0.2\d* \(4 pairs, diverged: 1 against 0\)", words)


def test_a_subject_alone_has_a_column_for_each_metric(table):
    (sgd, *_), records = table.plan.subjects, table.results.records
    for key, record in records.items():
        finals = {**record.summary["finals"], "top_5": 0.5 + 0.1 * key[2], "accuracy": 98.0}
        records[key] = replace(record, summary={**record.summary, "finals": finals})
    table.plan = table.results.plan = replace(table.plan, subjects=(sgd,), columns=(), layout="curves")
    lines = printed(table).splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("  plain "))
    assert " ".join(lines[place - 1].split()) == "test error training loss top 5"
    assert lines[place].split()[-3:] == ["0.70", "±", "0.16"]
    assert "Measured too" not in printed(table)
    assert "top 5" in printed(table, explain=True)


def test_untuned_arms_are_told_beside_the_verdict(table, tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    task = tasks.load(f"{tmp_path / 'own.py'}:task")
    untuned = compare.plan(task).notes
    tuned = compare.plan(task, tuned={}).notes
    table.plan = table.results.plan = replace(table.plan, notes=untuned)
    lines = printed(table).splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("Untuned: every arm has the task's own"))
    assert "points" not in lines[place]
    assert "plain at the mean factor" in lines[place - 1]
    assert "--tune NAME=VALUE" in " ".join(lines[place : place + 3])
    table.plan = table.results.plan = replace(table.plan, notes=tuned)
    assert "Untuned" not in printed(table)


def test_the_paper_stands_beside_ours_where_there_is_room(table):
    line = next(line for line in printed(table, width=160, explain=True).splitlines() if line.startswith("  plain "))
    assert "(paper 1.52 ± 0.09)" in line


@pytest.mark.parametrize("layout", ["thresholds", "best", "times"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_layout_keeps_within_the_width(sweep_runs, tmp_path, layout, width):
    outcome = outcome_of(replace(sweep_plan("best"), layout=layout), sweep_runs, tmp_path)
    for explain in (False, True):
        text = printed(outcome, width=width, explain=explain)
        shorter = [line for line in text.splitlines() if not line.startswith(("Report:", "Next:"))]
        assert max(map(len, shorter)) <= width
    lines = [line for line in text.splitlines() if not line.startswith(("Report:", "Next:"))]
    assert max(map(len, lines)) <= width
    assert "G case 1" in text
    assert "…" not in text
    for number in ("90.0",) if layout != "times" else ("+0.0 %",):
        assert number in text


def test_many_columns_are_spread_over_several_tables(table):
    steps = tuple(range(200, 2200, 200))
    table.results.plan = table.plan = replace(table.plan, columns=steps)
    text = printed(table, explain=True)
    for step in steps:
        assert f"{step:,}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("Report:")) <= 80


def test_quiet_prints_the_conclusion_and_the_report(table):
    text = printed(table, quiet=True, next_command="layerwise")
    assert "±" not in text
    assert "SGD plain YES −0.20 [−0.24, −0.16]" in " ".join(text.split())
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
    assert "(SGD: 1 of 5 diverged; NAG: 4 of 5 runs)" in text
    text = " ".join(printed(table, explain=True).split())
    assert "(4 of 5 runs)" in text
    assert "(1 of 5 diverged)" in text
    assert "Incomplete: 44 of 45 runs are finished" in text
    assert "Traceback" not in printed(table, quiet=True)


def test_a_failure_is_named_once_and_a_source_that_the_title_names_is_not_repeated(table):
    table.failures = [Failure("nag plain seed 1", "nag plain seed 1", "disk full")]
    table.plan = table.results.plan = replace(table.plan, title="own.py:task: LARS", source="own.py:task")
    lines = printed(table).splitlines()
    assert "FAILED nag plain seed 1: disk full" in lines
    assert "own.py:task: LARS" in lines


def test_names_of_arms_are_whole(table):
    name = "layer-adaptive at lr=0.1, weight_decay=0, for its factors alone"
    arms = tuple(replace(arm, words=name) if arm.name == "plain" else arm for arm in table.plan.arms)
    table.plan = table.results.plan = replace(table.plan, arms=arms)
    text = printed(table)
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("  layer-adaptive at lr=0.1,"))
    assert " ".join(line[:32].strip() for line in lines[first : first + 3]).startswith(name)
    assert "…" not in text


def test_too_few_pairs_are_told_once(table):
    for subject, arm, seed in list(table.results.records):
        if seed > 1 and subject != "sgd":
            del table.results.records[subject, arm, seed]
    text = " ".join(printed(table, explain=True).split())
    assert "SGD: layer-adaptive has a lower test error than plain" in text
    assert "NAG: " not in text.replace("(NAG: ", "")
    assert text.count("(2 pairs)") == 4
    few = {key: record for key, record in table.results.records.items() if key[2] < 2}
    table.results = Results(table.plan, few)
    text = " ".join(printed(table).split())
    assert text.count("too few") == 1
    assert "too few runs are finished to compare the test error" in text
    record = table.results.records["nag", "layer-adaptive", 0]
    few["nag", "layer-adaptive", 0] = replace(record, summary={**record.summary, "diverged_at": 7})
    table.results = Results(table.plan, few)
    assert "layer-adaptive diverged in 1 of 2 seeds (against 0)" in " ".join(printed(table, explain=True).split())


def test_what_took_no_run_is_not_said_to_have_taken_no_time(table):
    assert "report.html  (no run was needed)" in printed(table)
    table.found, table.seconds = 3, 12.4
    assert "report.html  (12 s)" in printed(table)
    copy = table.settings.out / "report.html"
    assert f"report.html  (12 s; {copy} is a copy until the next report)" in printed(table, explain=True)


def test_nothing_finished_prints_no_table(table):
    table.results.records.clear()
    table.interrupted = True
    text = printed(table)
    assert "Interrupted: 0 of 45 runs are finished; the same command goes on." in text
    assert "Report:" not in text


def test_hostile_names_neither_style_nor_move_the_cursor(table):
    plan = table.plan
    subjects = tuple(replace(subject, words=subject.words + HOSTILE) for subject in plan.subjects)
    arms = tuple(replace(arm, words=arm.words + HOSTILE) for arm in plan.arms)
    table.plan = table.results.plan = replace(plan, subjects=subjects, arms=arms, title=HOSTILE)
    table.failures = [Failure(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]
    table.skipped = [HOSTILE]
    for how in ({}, {"explain": True}, {"quiet": True}):
        text = printed(table, next_command=HOSTILE, **how)
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
