"""Runs on image folders: those on one folder are other runs than those on another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from layerwise.lab import catalogue, cli, data
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments import runner as experiment
from layerwise.lab.experiments.runner import Settings
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training import trial


def write(root: Path, classes: int, train: int, test: int, shade: int = 0) -> Path:
    """Write an image folder of grey JPEG files."""
    for part, count in (("train", train), ("val", test)):
        for number in range(count):
            place = root / part / f"class{number % classes}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + shade, 20), (number, shade, 99)).save(place / f"{number}.JPEG")
    return root


@pytest.fixture
def one(tmp_path):
    return write(tmp_path / "one", classes=2, train=6, test=4)


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "other", classes=3, train=9, test=3, shade=50)


def plan_of(scale="reduced", seeds=1, vary=None, **constants):
    read = recipe.load("singh2015-figure2")
    scales = read.content["scales"]
    small = {**scales[scale].get("constants", {}), "width": 0.0625, **constants}
    content = {**read.content, "scales": {**scales, scale: {**scales[scale], "constants": small}}}
    return recipe.Recipe("tiny", content).plan(scale, seeds=seeds, vary=vary)


def identities(plan):
    return [run.configuration.identity for run in plan.runs]


def test_runs_on_another_folder_are_other_runs_and_those_on_a_copy_are_the_same(one, other, tmp_path):
    plan = plan_of(seeds=2)
    on_one, on_other = places.bound(plan, one), places.bound(plan, other)
    assert len({*identities(plan), *identities(on_one), *identities(on_other)}) == 3 * len(set(identities(plan)))
    digest = data.open_folder(one).digest
    assert {run.configuration.constants.data_digest for run in on_one.runs} == {digest}
    unbound = [
        replace(run.configuration, trial={**run.configuration.trial, "data_digest": None}).constants
        for run in on_one.runs
    ]
    assert unbound == [run.configuration.constants for run in plan.runs]
    shutil.copytree(one, tmp_path / "copy" / "imagenet")
    assert places.bound(plan, tmp_path / "copy") == on_one
    assert places.bound(on_one, one) == on_one


def test_the_plan_says_what_the_folder_holds_and_that_the_papers_data_are_others(one):
    plan = plan_of()
    bound = places.bound(plan, one)
    assert bound.data_title == "an image folder: 2 classes, 6 photographs to train, 4 to test"
    assert bound.notes == (
        *plan.notes,
        "These runs are on 2 classes, 6 photographs to train and 4 to test. The paper's numbers are of ImageNet: "
        "1,000 classes, 1,281,167 photographs to train and 50,000 to test.",
    )
    assert places.bound(replace(plan, claims=(), paper=()), one).notes == plan.notes


def test_imagenet_itself_needs_no_note(monkeypatch, one):
    monkeypatch.setattr(data, "IMAGENET_COUNTS", (2, 6, 4))
    plan = plan_of("full")
    assert places.bound(plan, one).notes == plan.notes


def test_plans_on_published_data_are_left_alone(one):
    plan = plan_of("smoke")
    assert places.bound(plan, one) is plan
    assert places.bound(plan, None) is plan


def test_a_plan_on_both_keeps_its_words(one):
    folder, digits = plan_of(), plan_of("smoke")
    mixed = replace(folder, runs=(*folder.runs, *digits.runs))
    bound = places.bound(mixed, one)
    assert bound.data_title == f"{folder.data_title}; {data.open_folder(one).title}"
    assert bound.runs[len(folder.runs) :] == digits.runs


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="holds no image folder"):
        places.bound(plan_of(), tmp_path)


def test_the_folder_that_is_opened_must_be_the_one_that_was_planned(one, other):
    plan = places.bound(plan_of(), one)
    configuration = plan.runs[0].configuration
    assert trial.build(configuration, one).epoch_length == 1
    digest = configuration.constants.data_digest
    with pytest.raises(UsageError, match=f"data_digest='{digest}', and the image folder .*start the command again"):
        trial.build(configuration, other)
    with pytest.raises(UsageError, match="data_digest=None, and the image folder"):
        trial.build(plan_of().runs[0].configuration, one)
    assert trial.build(configuration, one).epoch_length == 1
    assert trial.build(places.bound(plan_of(), other).runs[0].configuration, other).epoch_length == 1


def test_a_changed_folder_is_refused_by_the_worker(one, tmp_path):
    plan = places.bound(plan_of(), one)
    plan = replace(plan, runs=plan.runs[:1])
    (one / "val" / "class0" / "0.JPEG").unlink()
    outcome = experiment.carry_out(plan, Settings(out=tmp_path / "runs", data_dir=one, jobs=1))
    assert not outcome.results.records
    assert len(outcome.failures) == 1
    assert "its files are not those that this run was planned for" in outcome.failures[0].reason


def test_the_command_binds_the_plan(one, tmp_path, monkeypatch):
    planned = []

    def carry_out(plan, settings, display):
        planned.append(plan)
        raise UsageError("enough")

    monkeypatch.setattr(experiment, "carry_out", carry_out)
    words = ["run", "singh2015-figure2", "--scale", "reduced", "--data-dir", str(one), "--out", str(tmp_path / "runs")]
    assert cli.main(words) == 2
    digest = data.open_folder(one).digest
    assert {run.configuration.trial["data_digest"] for run in planned[0].runs} == {digest}


def test_the_list_counts_the_runs_on_the_folder_that_is_there(one, tmp_path, monkeypatch):
    asked = []

    def load_finished(plan, runs):
        asked.append({run.configuration.trial.get("data_digest") for run in plan.runs})
        return SimpleNamespace(records=plan.runs[:3])

    monkeypatch.setattr(catalogue, "load_finished", load_finished)
    monkeypatch.setattr(recipe, "names", lambda: ["singh2015-figure2"])
    Runs(tmp_path / "runs").path.mkdir(parents=True)

    def finished(folder):
        (entry,) = catalogue.entries(recipe.names(), tmp_path / "runs", folder)
        return {scale: about["finished"] for scale, about in entry["scales"].items()}

    assert finished(one) == {"smoke": 3, "reduced": 3, "full": 3}
    digest = data.open_folder(one).digest
    assert sorted(asked, key=str) == sorted([{None}, {digest}, {digest}], key=str)
    assert finished(tmp_path) == finished(None) == {"smoke": 3, "reduced": 0, "full": 0}
    (one / "val" / "class1").rename(one / "val" / "class7")  # not laid out as it must be
    assert finished(one) == {"smoke": 3, "reduced": 0, "full": 0}
