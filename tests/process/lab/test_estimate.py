"""What a recipe will take, from ten updates of each subject."""

import json

import pytest

from layerwise.lab.cli import main


@pytest.mark.dist
@pytest.mark.full
def test_ten_updates_of_each_subject_give_hours_and_memory(tmp_path, capsys):
    asked = ["estimate", "singh2015-table1", "--scale", "smoke", "--out", str(tmp_path / "runs"), "--jobs", "2"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["subject"] for row in found["subjects"]] == ["sgd", "nag", "adagrad"]
    for row in found["subjects"]:
        assert row["updates"] == 40
        assert 0 < row["seconds_an_update"] < row["hours_a_run"] * 3600
        assert row["memory"] > 50_000_000
    whole = sum(row["runs"] * row["hours_a_run"] for row in found["subjects"])
    assert found["hours"] == pytest.approx(whole / 2)
    assert not (tmp_path / "runs").exists()


def test_data_that_are_not_there_are_named_at_once(tmp_path, capsys):
    asked = ["estimate", "singh2015-table1", "--scale", "full", "--data-dir", str(tmp_path)]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "layerwise data mnist fetches it" in said
    assert said.count("\n") == 1


@pytest.mark.dist
@pytest.mark.full
def test_a_tuned_recipe_is_measured_arm_by_arm_with_its_trials(tmp_path, capsys):
    asked = ["estimate", "depth-without-normalisation", "--scale", "smoke", "--out", str(tmp_path / "runs"), "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["subject"], row["words"].partition(": ")[2]): row["runs"] for row in found["subjects"]}
    assert rows["sigmoid3", "plain SGD"] == 2 * 1 + 2  # settings on one seed, and two runs
    assert rows["sigmoid3", "normalised gradient"] == 2 * (2 * 1 + 2)  # and its mean factor
    assert rows["sigmoid8", "normalised gradient"] == 4 * (2 * 1 + 2)
    assert len(rows) == 8 + 3
    assert all(row["seconds_an_update"] > 0 for row in found["subjects"])
    assert not (tmp_path / "runs").exists()
