import os
import sys

import pytest

from layerwise.lab.runs import store
from layerwise.lab.runs.store import write_whole


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_content_name_and_folder_are_flushed_in_this_order(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, os.replace

    def flushed(descriptor):
        done.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    def renamed(one, other):
        done.append(("rename", os.path.basename(one)))
        rename(one, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "folder" / "file", b"content")
    temporary = f".file.{os.getpid()}.tmp"
    assert done == [("flush", tmp_path.name), ("flush", temporary), ("rename", temporary), ("flush", "folder")]
    done.clear()
    write_whole(tmp_path / "folder" / "file", b"content", flush=False)
    assert done == [("rename", temporary)]


def test_versions_and_hardware_are_told():
    assert set(store.versions()) == {"layerwise", "torch"}
    hardware = store.hardware()
    assert set(hardware) == {"processor", "cores", "system"}
    assert hardware["cores"] == store.usable_cores() >= 1


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_be_written_and_not_listed_is_written(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o333)
    write_whole(folder / "file", b"content")
    folder.chmod(0o700)
    assert (folder / "file").read_bytes() == b"content"
