"""Whether photographs are what they were when they were first read."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from layerwise.lab.data.contents import Contents
from layerwise.lab.errors import UsageError


def test_what_was_read_is_known_to_every_process_from_then_on(tmp_path):
    path, image = tmp_path / "cache" / "contents.crc", tmp_path / "1.jpg"
    one, other = Contents(path, 3), Contents(path, 3)
    one.check(1, image, b"as it was")
    other.check(1, image, b"as it was")
    with pytest.raises(UsageError, match=r"1\.jpg: its content has changed since it was first read"):
        other.check(1, image, b"as it is!")
    program = f"""
from pathlib import Path
from layerwise.lab.data.contents import Contents
known = Contents(Path({str(path)!r}), 3)
known.check(0, Path("0.jpg"), b"of another process")
known.check(1, Path("1.jpg"), b"as it is!")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "1.jpg: its content has changed" in result.stderr
    with pytest.raises(UsageError, match="content has changed"):
        one.check(0, image, b"of this one")
    assert path.stat().st_size == 12


def test_where_the_new_one_is_meant_the_file_that_is_named_is_removed(tmp_path):
    path, image = tmp_path / "contents.crc", tmp_path / "1.jpg"
    Contents(path, 1).check(0, image, b"as it was")
    with pytest.raises(UsageError) as caught:
        Contents(path, 1).check(0, image, b"as it is")
    assert f"remove {path}" in str(caught.value)
    path.unlink()
    Contents(path, 1).check(0, image, b"as it is")


def test_an_empty_file_is_known_too(tmp_path):
    known = Contents(tmp_path / "contents.crc", 1)
    known.check(0, tmp_path / "1.jpg", b"")  # its checksum is 0, which would say that it is not known
    with pytest.raises(UsageError, match="content has changed"):
        known.check(0, tmp_path / "1.jpg", b"more")


def test_a_file_of_another_length_is_begun_anew(tmp_path):
    path = tmp_path / "contents.crc"
    path.write_bytes(b"cut")
    known = Contents(path, 2)
    known.check(1, tmp_path / "1.jpg", b"content")
    assert np.count_nonzero(np.frombuffer(path.read_bytes(), dtype=np.uint32)) == 1


def test_where_it_cannot_be_written_the_process_knows_what_it_has_read(tmp_path):
    (tmp_path / "cache").write_bytes(b"a file, not a folder")
    with pytest.warns(UserWarning, match="cannot be written .* give a cache folder"):
        known = Contents(tmp_path / "cache" / "contents.crc", 1)
    known.check(0, tmp_path / "1.jpg", b"as it was")
    with pytest.raises(UsageError, match="content has changed"):
        known.check(0, tmp_path / "1.jpg", b"as it is")
