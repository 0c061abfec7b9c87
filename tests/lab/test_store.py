import json
import os

import pytest

from layerwise.lab import store
from layerwise.lab.store import RunStore, write_whole

RECORD = {
    "configuration": {"seed": 0, "rate_factor": 1.2345678901234567},
    "test_error": [[4, 1.5]],
    "training_loss": [],
    "rates": {},
    "factor": {},
    "diverged_at": None,
    "seconds": 1.0,
}


@pytest.fixture
def runs(tmp_path):
    folder = RunStore(tmp_path / "demo", RECORD)
    folder.save("a", RECORD)
    return folder


def test_a_saved_run_is_found_again_with_versions_and_hardware(runs):
    record = runs.load("a", RECORD["configuration"])
    assert record["test_error"] == [[4, 1.5]]
    assert set(record["versions"]) == {"layerwise", "torch", "python"}
    assert set(record["hardware"]) == {"processor", "cores", "system"}


def test_a_run_of_another_configuration_is_not_taken(runs):
    assert runs.load("a", {"seed": 1}) is None
    assert runs.path("a").exists()


def test_a_run_of_another_version_is_not_taken(runs, monkeypatch):
    monkeypatch.setattr(store, "versions", lambda: {"layerwise": "9.9", "torch": "2"})
    assert runs.load("a", RECORD["configuration"]) is None


def test_a_run_that_is_not_there_is_none(runs):
    assert runs.load("b", {}) is None
    assert runs.set_aside == []


@pytest.mark.parametrize(
    "content",
    [b"", b'{"configuration": {"se', b"[]", b"\xff\xfe", b"{}", b'{"configuration": {}, "versions": {}}'],
    ids=["empty", "cut off", "a list", "not text", "no fields", "no versions"],
)
def test_a_broken_file_is_set_aside_and_named(runs, content):
    runs.path("a").write_bytes(content)
    assert runs.load("a", RECORD["configuration"]) is None
    assert runs.set_aside == [runs.path("a")]
    assert not runs.path("a").exists()
    assert runs.path("a").with_name("a.json.broken").read_bytes() == content


def test_a_file_without_results_is_set_aside(runs):
    whole = json.loads(runs.path("a").read_text())
    del whole["test_error"]
    runs.path("a").write_text(json.dumps(whole))
    assert runs.load("a", RECORD["configuration"]) is None
    assert runs.set_aside == [runs.path("a")]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def refuse(source, target):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_whole(path, b"new")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_leftovers_of_a_killed_process_are_removed(runs):
    leftover = runs.folder / ".a.json.123.tmp"
    leftover.write_bytes(b"half")
    runs.clear_leftovers()
    assert not leftover.exists()
    assert runs.path("a").exists()
    RunStore(runs.folder / "not there").clear_leftovers()


def test_numbers_that_json_cannot_hold_are_refused(runs):
    with pytest.raises(ValueError, match="JSON compliant"):
        runs.save("b", RECORD | {"seconds": float("nan")})
    assert not runs.path("b").exists()
