"""The pages of experiments made again from their plans and their finished runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
from made_up import (
    SWEEP_LAYERS,
    TABLE_STEPS,
    finish_plan,
    listed,
    outcome_of,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
    table_value,
)

from layerwise.lab import report
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.report import saved
from layerwise.lab.report.files import markdown
from layerwise.lab.report.page import build
from layerwise.lab.report.verdicts import headline


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
    for name in ("singh2015-table1", "basodi2023-table3"):
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
    again = saved.gather([table.folder], out)[0]
    assert again.results.family == table.results.family == 24
    assert again.plan.columns == table.plan.columns
    assert again.plan.paper == table.plan.paper
    assert again.plan.claims == table.plan.claims
    assert shown(build([again], "").html) == shown(build([table], "").html)
    assert report.write(again, "") == out / "report" / "report.html"
    third = saved.gather([out / "report"], tmp_path / "third")[0]
    assert markdown(third) == markdown(table)


def test_what_was_not_finished_is_still_planned(table, tmp_path):
    del table.results.records["sgd", "plain", 0]
    report.write(table, "")
    again = saved.gather([table.folder], tmp_path / "again")[0]
    assert (len(again.results.records), again.planned) == (44, 45)
    assert again.results.family == 24


def test_runs_of_another_configuration_are_left_out(table, tmp_path):
    path = table.folder / "runs.json"
    listed = json.loads(path.read_text())
    listed["runs"][0]["folder"] = listed["runs"][1]["folder"]
    path.write_text(json.dumps(listed))
    again = saved.gather([table.folder], tmp_path / "again")[0]
    assert len(again.results.records) == 44
    assert again.plan.notes[-1].startswith("1 runs that the experiment had finished are gone or damaged")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"subjects": 3}', None])
def test_a_folder_without_a_plan_is_refused_with_a_remedy(out, table, tmp_path, content):
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    path = copied / table.folder.name / "plan.json"
    path.unlink() if content is None else path.write_text(content)
    words = "holds no experiment" if content is None else "do not fit together"
    with pytest.raises(UsageError, match=f"{words}.*start the .*command.*again") as caught:
        saved.gather([path.parent], tmp_path / "again")
    assert "\n" not in str(caught.value)


def test_what_is_no_experiment_is_refused(out, tmp_path):
    (tmp_path / "empty").mkdir()
    one = next((out / "store").iterdir())
    for place, words in ((tmp_path / "none", "is not a folder"), (tmp_path / "empty", "holds no"), (one, "holds no")):
        with pytest.raises(UsageError, match=words):
            saved.gather([place], tmp_path)


@pytest.fixture
def two(out, tmp_path):
    """Give a folder of two experiments."""
    place = tmp_path / "two"
    shutil.copytree(out, place)
    for path in place.glob("*/plan.json"):
        shutil.rmtree(path.parent)
    more = {"layers": SWEEP_LAYERS, "selections": sweep_selections, "quantity": "accuracy"}
    finish_plan(sweep_plan("best"), place, sweep_value, **more)
    return [listed(plan, place) for plan in (sweep_plan("best"), table_plan())]


def test_several_experiments_are_judged_each_by_its_own_plan(two, tmp_path):
    outcomes = saved.gather([two[0].parent], tmp_path / "page")
    assert [outcome.plan.title for outcome in outcomes] == [sweep_plan("best").title, table_plan().title]
    assert [outcome.results.family for outcome in outcomes] == [len(list(sweep_plan("best").pairs())), 24]
    assert len(saved.gather([*two, two[0].parent], tmp_path)) == 2  # each once
    html = report.write(outcomes, "layerwise report two").read_text()
    assert "2 experiments" in html
    for key, outcome in zip(("experiment-1", "experiment-2"), outcomes, strict=True):
        assert f'<a href="#{key}">{outcome.plan.title}</a>' in html
        assert f'id="{key}"' in html
        assert headline(outcome) in html
    ids = re.findall(r' id="([^"]+)"', re.sub(r"<script.*?</script>", "", html, flags=re.S))
    assert len(ids) == len(set(ids))
    names = {path.name for path in (tmp_path / "page" / "report" / "tables").iterdir()}
    assert names == {f"{n}-{name}.parquet" for n in (1, 2) for name in ("table", "metrics", "comparisons")}
    text = (tmp_path / "page" / "report" / "table.md").read_text()
    assert text.index(headline(outcomes[0])) < text.index(headline(outcomes[1]))


def test_an_experiment_that_cannot_be_read_is_named_and_the_others_are_shown(two, tmp_path):
    (two[1] / "plan.json").write_text("half")
    (outcome,) = saved.gather([two[0].parent], tmp_path / "page")
    assert outcome.plan.title == sweep_plan("best").title
    assert f"{two[1]}: plan.json and runs.json do not fit together" in outcome.skipped[0]
