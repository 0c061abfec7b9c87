"""Python's own library as a text: its files, its parts, its digest."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from layerwise.lab import cli, data
from layerwise.lab.data import library
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import recipe
from layerwise.lab.training import trial

# By hand: the first byte of SHA-256 of the name, modulo 20.
NAMES = {
    "ast.py": (180, "test"),
    "a.py": (240, "test"),
    "re/_parser.py": (61, "validation"),
    "f25.py": (241, "validation"),
    "typing.py": (164, "train"),
    "os.py": (217, "train"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a library of six files, and of some that are none of it."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}: é\n", encoding="utf-8")
    for name in ("test/a.py", "json/tests/a.py", "site-packages/own.py", "idlelib/idle_test/a.py", "config-3/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out\n")
    for name in ("_sysconfigdata__linux.py", "sitecustomize.py", "os.pyi", "os.txt"):
        (tmp_path / name).write_text("left out\n")
    library.load.cache_clear()
    return tmp_path


def read(folder: Path) -> library.Library:
    library.load.cache_clear()
    return library.load(folder)


def words(text: torch.Tensor) -> str:
    return bytes(text.tolist()).decode("ascii")


def test_a_file_belongs_to_a_part_by_its_name():
    for name, (byte, part) in NAMES.items():
        assert hashlib.sha256(name.encode()).digest()[0] == byte
        assert library.part_of(name) == part


def test_the_texts_are_those_of_the_files_in_the_order_of_their_names(folder):
    found = read(folder)
    assert words(found.train) == "# os.py: \n# typing.py: \n"  # what is not ASCII is left out
    assert words(found.validation) == "# f25.py: \n# re/_parser.py: \n"
    assert words(found.test) == "# a.py: \n# ast.py: \n"
    assert found.files == (2, 2, 2)
    expected = [
        hashlib.sha256(words(text).encode()).hexdigest() for text in (found.train, found.validation, found.test)
    ]
    assert list(found.digests) == expected
    assert found.digest == hashlib.sha256(" ".join(expected).encode()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_another_file_is_another_data_set(folder, name):
    before = read(folder)
    (folder / name).write_text("# changed\n")
    after = read(folder)
    assert after.digest != before.digest
    pairs = zip(library.PARTS, before.digests, after.digests, strict=True)
    assert [part for part, one, other in pairs if one != other] == [NAMES[name][1]]


def test_what_is_left_out_changes_nothing(folder):
    before = read(folder)
    (folder / "test" / "more.py").write_text("x = 1\n")
    (folder / "sitecustomize.py").unlink()
    assert read(folder).digest == before.digest
    (folder / "more.py").write_text("x = 1\n")
    assert read(folder).digest != before.digest


def test_a_library_without_files_to_test_on_is_refused(folder):
    (folder / "a.py").unlink()
    read(folder)
    (folder / "ast.py").unlink()
    with pytest.raises(UsageError, match=r"too few .py files .* use a Python with its whole standard library"):
        read(folder)


def test_the_library_of_this_python_has_disjoint_parts_and_a_title_that_names_them():
    library.load.cache_clear()
    found = library.load()
    for text in (found.train, found.validation, found.test):
        assert int(text.max()) < 128
    assert len(found.train) > 5 * max(len(found.validation), len(found.test))
    assert min(len(found.validation), len(found.test)) > 200_000
    assert found.title.startswith(f"Python {sys.version.split()[0]}'s own library without tests: train ")
    assert all(digest in found.title for digest in found.digests)
    assert library.load().digest == found.digest
    assert data.present(data.LIBRARY, None)


def test_the_digest_is_in_the_configuration_and_the_checksums_on_the_page(monkeypatch, folder):
    plan = recipe.load("roles-in-a-transformer").plan("smoke", seeds=1)
    found = library.load()
    assert {run.configuration.trial["data_digest"] for run in plan.runs} == {found.digest}
    assert found.title in plan.notes
    other = read(folder)
    monkeypatch.setattr(library, "load", lambda: other)
    again = recipe.load("roles-in-a-transformer").plan("smoke", seeds=1)
    assert not {run.configuration.identity for run in plan.runs} & {run.configuration.identity for run in again.runs}
    trial._source.cache_clear()
    with pytest.raises(
        UsageError, match=r"the library of this Python has .*: use the Python that this run was planned"
    ):
        trial.build(plan.runs[0].configuration)
    trial._source.cache_clear()


def test_a_python_without_its_library_lists_the_recipe_and_says_what_a_run_lacks(monkeypatch, folder, capsys):
    (folder / "a.py").unlink()
    (folder / "ast.py").unlink()
    load = library.load
    monkeypatch.setattr(library, "load", lambda: load(folder))
    plan = recipe.load("roles-in-a-transformer").plan("smoke", seeds=1)
    assert "data_digest" not in plan.runs[0].configuration.trial
    trial._source.cache_clear()
    with pytest.raises(UsageError, match="use a Python with its whole standard library"):
        trial.build(plan.runs[0].configuration)
    assert cli.main(["data", data.LIBRARY]) == 2
    assert "use a Python with its whole standard library" in " ".join(capsys.readouterr().err.split())
