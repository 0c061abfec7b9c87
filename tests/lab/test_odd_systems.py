"""File systems without locks, outputs that are closed, and widths that COLUMNS asks for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from made_up import finish, finish_plan, listed, table_plan

from layerwise.lab import cli
from layerwise.lab.experiments import recipe

COMMAND = "import sys; from layerwise.__main__ import main; sys.argv[0] = 'layerwise'; sys.exit(main())"


@pytest.mark.skipif(sys.platform == "win32", reason="locks are others there")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_in_one_sentence(tmp_path, monkeypatch, capsys, number):
    import fcntl

    def missing(*_):
        raise OSError(number, os.strerror(number))

    finish(tmp_path / "runs", table_plan(seeds=1).runs[0], 1.5)
    monkeypatch.setattr(fcntl, "flock", missing)
    words = [
        "run",
        "singh2015-table1",
        "--scale",
        "smoke",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "out") in said
    assert os.strerror(number) in said
    assert "--out" in said
    assert list((tmp_path / "out").iterdir()) == []
    # What only reads needs no lock.
    for path in (tmp_path / "runs").glob("store/*/metrics.parquet"):
        path.write_bytes(b"half")
    assert cli.main(["list", "singh2015-table1", "--out", str(tmp_path / "runs"), "--quiet"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with numbered outputs")
@pytest.mark.parametrize(
    "closed", ["2>&-", "| true", *(pytest.param(shell, marks=pytest.mark.full) for shell in (">&-", ">&- 2>&-", "<&-"))]
)
def test_closed_outputs_end_a_command_without_a_traceback(closed):
    program = f'{sys.executable} -c "{COMMAND}" data {closed}'
    ended = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_an_output_that_is_full_is_one_line():
    ended = subprocess.run(f'{sys.executable} -c "{COMMAND}" --version >/dev/full', shell=True, capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"layerwise: No space left on device")
    assert ended.stderr.count(b"\n") == 1


@pytest.mark.parametrize("width", [60, 100, 200])
def test_lines_are_as_wide_as_columns_says_in_a_pipe(tmp_path, monkeypatch, capsys, width):
    finish_plan(table_plan(seeds=1), tmp_path / "runs", lambda run: 1.5)
    listed(table_plan(seeds=1), tmp_path / "runs")
    finish_plan(recipe.load("singh2015-table1").plan("smoke", seeds=1), tmp_path / "smoke", lambda run: 1.5)
    monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    smoke = ["--scale", "smoke", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "smoke")]
    for words in (
        ["run", "singh2015-table1", *smoke],
        ["list", "--out", str(tmp_path)],
        ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page")],
    ):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert words[0] != "run" or "15 of 15 runs were finished" in " ".join(out.split())
        lines = [line for line in out.splitlines() if not line.startswith(("Report:", "Next:"))]
        longest = max(len(line) for line in lines if " -- " not in line and "layerwise " not in line)
        assert longest <= width
        assert width < 100 or longest > 80 or words[0] == "list"


@pytest.mark.parametrize("value", ["0", "-3", "many", "", "10" * 20])
def test_columns_that_are_no_width_are_80(tmp_path, monkeypatch, capsys, value):
    from layerwise.lab.errors import WIDEST, columns

    monkeypatch.setenv("COLUMNS", value)
    assert columns() in (20, 80, WIDEST)
