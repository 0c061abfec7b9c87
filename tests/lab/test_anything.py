"""The report of any runs: what they are judged by, and the page of an experiment made again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from lab_helpers import tiny_plan
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

from layerwise.lab import report
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.plan import QUANTITIES, Quantity
from layerwise.lab.report import anything, judged, saved
from layerwise.lab.report.files import markdown
from layerwise.lab.report.page import build
from layerwise.lab.runs.folder import Record


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finish_plan(table_plan(), folder, table_value, steps=TABLE_STEPS)
    return folder


@pytest.fixture
def table(out, tmp_path):
    outcome = outcome_of(table_plan(), out, out)
    report.write(outcome, "layerwise run singh2015-table1")
    return outcome


def run_of(record: Record, finals: dict[str, float], quantity: Quantity | dict | None = None) -> Record:
    labels: dict[str, Any] = {"subject": "s", "arm": "a"}
    if quantity is not None:
        labels["quantity"] = asdict(quantity) if isinstance(quantity, Quantity) else quantity
    return replace(record, summary={**record.summary, "finals": finals}, about={**record.about, "labels": labels})


@pytest.fixture
def record(out, tmp_path):
    return next(iter(outcome_of(table_plan(), out, tmp_path).results.records.values()))


def test_runs_are_judged_by_what_they_say(record):
    fun = Quantity(name="wasted", words="wasted", unit="", difference_unit="", higher_is_better=True)
    found = judged.judged([run_of(record, {"accuracy": 1.0, "wasted": 2.0}, fun)] * 3)
    assert found.quantity == fun
    assert found.notes == []
    assert len(found.records) == 3


def test_a_test_loss_is_not_judged_by_the_training_loss(record):
    runs = [run_of(record, {"training_loss": 0.1, "test_loss": 0.2})]
    assert judged.guess(runs).name == "test_loss"
    found = judged.judged(runs)
    assert found.notes == [
        "A guess: no run says what it was judged by, so test loss is taken, and less of it to be better. Where that is "
        "wrong every verdict is."
    ]
    assert judged.guess([run_of(record, {"training_loss": 0.1, "test_loss": 0.2, "hits": 1.0})]).name == "hits"
    assert judged.guess([run_of(record, {"training_loss": 0.1})]).name == "training_loss"
    assert judged.guess([run_of(record, {"my_score": 0.1})]).higher_is_better


def test_every_guess_is_told(record):
    runs = [run_of(record, {"test_error": 1.0})]
    assert judged.judged(runs).quantity == QUANTITIES["test_error"]
    assert "A guess" in judged.judged(runs).notes[0]
    mixed = [run_of(record, {"test_error": 1.0}, QUANTITIES["test_error"]), *runs]
    assert judged.judged(mixed).notes == [
        "A guess: 1 runs do not say what they were judged by, and are judged as the others: test error (less is "
        "better)."
    ]


def test_runs_that_judge_the_other_way_round_are_left_out(record):
    up = Quantity(name="x", words="x", unit="", difference_unit="", higher_is_better=True)
    runs = [run_of(record, {"x": 1.0}, up)] * 2 + [run_of(record, {"x": 1.0}, replace(up, higher_is_better=False))]
    found = judged.judged(runs)
    assert found.quantity == up
    assert len(found.records) == 2
    assert "Left out: 1 runs that judge x the other way round." in found.notes


@pytest.mark.parametrize(
    "given", [{"name": 3}, {"nme": "x"}, {"name": ""}, {"higher_is_better": "yes"}, {"words": None}, 3]
)
def test_labels_that_hold_something_else_say_nothing(record, given):
    assert judged.stored(run_of(record, {}, given)) is None


def test_labels_say_what_a_run_belongs_to():
    assert table_plan().labels("nag") == {
        "experiment": "singh2015-table1-reduced",
        "subject_words": "NAG",
        "quantity": {
            "name": "test_error",
            "words": "test error",
            "unit": "%",
            "difference_unit": "points",
            "higher_is_better": False,
            "take": "last",
            "level": 0.0,
        },
    }


def test_the_worker_writes_the_labels(carried_out):
    plan = recipe.load("demo-lenet").plan("full", seeds=1)
    runs = tuple(run for run in plan.runs if run.subject == "sgd" and run.arm.name == "plain")
    trial = {**runs[0].configuration.trial, "iterations": 2, "test_every": 1}
    runs = (replace(runs[0], configuration=replace(runs[0].configuration, trial=trial)),)
    outcome = carried_out(replace(plan, runs=runs))
    (record,) = outcome.results.records.values()
    assert {name: record.about["labels"][name] for name in ("subject", "arm", "arm_words")} == {
        "subject": "sgd",
        "arm": "plain",
        "arm_words": "plain",
    }


@pytest.mark.parametrize("vary", [None, {"rate": [0.005, 0.01]}])
def test_a_plan_is_read_as_it_was_written(vary):
    for name in ("singh2015-table1", "singh2015-figure2", "basodi2023-table3", "basodi2023-figure11"):
        plan = recipe.load(name).plan("reduced", vary=vary)
        again = saved.plan_of(json.loads(saved.as_json(plan)))
        assert list(again.pairs()) == list(plan.pairs())
        assert [run.configuration for run in again.runs] == [run.configuration for run in plan.runs]
        assert replace(again, constants={}) == replace(plan, constants={})
        assert {key: list(pair) for key, pair in again.constants.items()} == {
            key: json.loads(json.dumps(pair)) for key, pair in plan.constants.items()
        }


def shown(html: str) -> str:
    """Leave out when the page was made and by which command."""
    html = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html)
    return re.sub(r"<pre><code>.*?</code></pre>", "", html)


def test_the_folder_of_an_experiment_gives_its_own_page_again(table, out, tmp_path):
    again = anything.gather([table.folder], out)
    assert again.results.family == table.results.family == 24
    assert again.plan.columns == table.plan.columns
    assert again.plan.paper == table.plan.paper
    assert again.plan.claims == table.plan.claims
    assert shown(build(again, "").html) == shown(build(table, "").html)
    assert report.write(again, "") == out / "report" / "report.html"
    third = anything.gather([out / "report"], tmp_path / "third")
    assert markdown(third) == markdown(table)


def test_what_was_not_finished_is_still_planned(table, tmp_path):
    del table.results.records["sgd", "plain", 0]
    report.write(table, "")
    again = anything.gather([table.folder], tmp_path / "again")
    assert (len(again.results.records), again.planned) == (44, 45)
    assert again.results.family == 24


def test_runs_of_another_configuration_are_left_out(table, tmp_path):
    path = table.folder / "runs.json"
    listed = json.loads(path.read_text())
    listed["runs"][0]["folder"] = listed["runs"][1]["folder"]
    path.write_text(json.dumps(listed))
    again = anything.gather([table.folder], tmp_path / "again")
    assert len(again.results.records) == 44
    assert again.plan.notes[-1].startswith("1 runs that the experiment had finished are gone or damaged")


def test_without_a_plan_the_runs_are_gathered_and_the_page_says_so(table, tmp_path):
    path = table.folder / "plan.json"
    for content in ("", "[]", "{}", '{"subjects": 3}', None):
        path.unlink() if content is None else path.write_text(content)
        again = anything.gather([table.folder], tmp_path / "again")
        assert again.plan.found
        words = "The folder of the experiment has no plan.json that can be read: its plan is not known."
        assert words in again.plan.notes


def test_a_mix_counts_every_comparison_and_says_that_they_were_chosen_after_the_runs(out, tmp_path):
    finish_plan(
        sweep_plan("best"),
        tmp_path / "sweep",
        sweep_value,
        layers=SWEEP_LAYERS,
        selections=sweep_selections,
        quantity="accuracy",
    )
    outcome = anything.gather([out, tmp_path / "sweep"], tmp_path)
    assert outcome.results.family == len(outcome.results.comparisons()) == 3 * 2 + 2 * 7
    words = "Made from runs found, not from a plan: the comparisons were chosen after the runs"
    html = build(outcome, "").html
    assert html.index(words) < html.index("<h2>Verdict</h2>")
    assert "(5 seeds found)" in html
    assert words in markdown(outcome)


@pytest.mark.full
def test_a_mix_names_the_experiments_that_its_runs_are_of(carried_out, tmp_path):
    for name in ("one", "other"):
        carried_out(replace(tiny_plan(seeds=1), name=name), tmp_path / name)
    outcome = anything.gather([tmp_path / "one", tmp_path / "other"], tmp_path / "pages")
    assert [note for note in outcome.plan.notes if "experiments" in note] == []  # their runs are the same
    carried_out(replace(tiny_plan(seeds=2), name="third"), tmp_path / "third")
    outcome = anything.gather([tmp_path / "one", tmp_path / "third"], tmp_path / "pages")
    (note,) = [note for note in outcome.plan.notes if "experiments" in note]
    assert note.startswith("The runs are of 2 experiments: one, third. Their comparisons are judged as one family")
