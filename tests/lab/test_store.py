import os

import pytest

from layerwise.lab import store
from layerwise.lab.store import write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"first")
    assert path.read_bytes() == b"first"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_versions_and_hardware_are_told():
    assert set(store.versions()) == {"layerwise", "torch"}
    hardware = store.hardware()
    assert set(hardware) == {"processor", "cores", "system"}
    assert hardware["cores"] == store.usable_cores() >= 1
