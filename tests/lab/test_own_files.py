"""Files of others stay: the lab removes and overwrites what it has written itself, and follows no link below --out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from made_up import finish, listed, only, table_plan

from layerwise import rules
from layerwise.lab.cli import main
from layerwise.sinks import Parquet, Record

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes"),
]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Finish a plain run and one of a method in the folder ``runs`` of the working folder."""
    monkeypatch.chdir(tmp_path)
    for run in chosen():
        finish(Path("runs"), run, 1.5)
    listed(only(table_plan(seeds=1), "sgd", "plain", "layer-adaptive"), Path("runs"))
    return Path("runs")


def plain_alone():
    """Give an experiment of the plain run alone."""
    finish(Path("alone"), chosen()[0], 1.5)
    return listed(only(table_plan(seeds=1), "sgd", "plain"), Path("alone"))


def chosen():
    plan = table_plan(seeds=1)
    return [run for run in plan.runs if run.subject == "sgd" and run.arm.name in ("plain", "layer-adaptive")]


def report(*words):
    return main(["report", *map(str, words), "--quiet", "--figures"])


def contents(folder):
    """Give every file below a folder with its content, and where links lead."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def signed(content):
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest})


@pytest.mark.parametrize(
    "theirs",
    ["report/figures/a.png", "report/table.md", "report/notes/x.txt", "report.html", "report/.hidden", "report"],
)
def test_a_folder_or_page_of_others_is_refused_and_stays(runs, capsys, theirs):
    path = Path(theirs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = contents(".")
    assert report(runs, "--out", ".") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--out" in said
    assert contents(".") == before
    assert report(runs, "--out", "elsewhere") == 0  # the remedy
    assert contents("runs").items() <= before.items()


def test_files_of_others_in_a_folder_of_the_labs_stay(runs):
    assert report(runs, "--out", "page") == 0
    theirs = [Path("page/report") / name for name in ("figures/holiday.png", "figures/my drawing.svg", "notes.md")]
    for path in theirs:
        path.write_text("mine")
    assert report(runs, "--out", "page") == 0
    assert [path.read_text() for path in theirs] == ["mine"] * 3


def test_figures_of_the_page_before_go_and_no_others(runs):
    assert report(runs, "--out", "page") == 0
    figures = Path("page/report/figures")
    before = {path.name for path in figures.iterdir()}
    (figures / "mine.png").write_text("mine")
    exchanged = figures / "factor-sgd-layer-adaptive.png"
    exchanged.write_text("mine")  # in the place of a figure that goes
    assert report(plain_alone(), "--out", "page") == 0
    after = {path.name for path in figures.iterdir()}
    assert "factor-sgd-layer-adaptive.svg" in before - after
    assert after - before == {"mine.png"}
    assert exchanged.read_text() == "mine"
    assert {path.name for path in figures.iterdir()} - {"mine.png", exchanged.name} == {
        name.partition("/")[2]
        for name in json.loads(Path("page/report/files.json").read_bytes())["files"]
        if name.startswith("figures/")
    }


def test_a_figure_of_others_with_the_name_of_a_new_one_is_refused(runs, capsys):
    assert report(plain_alone(), "--out", "page") == 0
    theirs = Path("page/report/figures/factor-sgd-layer-adaptive.png")
    theirs.write_text("mine")
    before = contents("page")
    assert report(runs, "--out", "page") == 2
    assert f"{theirs}: is a file that layerwise has not written" in capsys.readouterr().err
    assert contents("page") == before


@pytest.mark.parametrize(
    "name", ["figures", "tables", ".", "../report.html", "table.md", "figures/x.png", "files.json"]
)
def test_a_link_below_out_is_refused_and_what_it_leads_to_stays(runs, tmp_path, capsys, name):
    assert report(runs, "--out", "page") == 0
    path = Path(os.path.normpath(Path("page/report") / name))
    if name == "figures/x.png":
        path = next(Path("page/report/figures").glob("*.png"))
    outside = tmp_path / "outside"
    path.rename(outside)
    if outside.is_dir():
        (outside / "holiday.png").write_text("mine")
        for each in outside.glob("*.png"):
            each.write_text("mine")
    path.symlink_to(outside)
    before = contents(outside) if outside.is_dir() else outside.read_bytes()
    capsys.readouterr()
    assert report(runs, "--out", "page") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (contents(outside) if outside.is_dir() else outside.read_bytes()) == before
    assert path.is_symlink()


def test_out_itself_may_be_a_link(runs, tmp_path):
    (tmp_path / "disk").mkdir()
    Path("page").symlink_to(tmp_path / "disk")
    assert report(runs, "--out", "page") == 0
    assert report(runs, "--out", "page") == 0
    assert (tmp_path / "disk" / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "files",
    [
        {"../../mine.png": ""},
        {"/tmp/mine.png": ""},
        {"figures/../../mine.png": ""},
        {"figures": ["mine.png"]},
        {"figures/a/b.png": ""},
        {"table.md\x00": ""},
        ["table.md"],
        7,
    ],
)
def test_a_list_of_files_that_leads_out_is_not_believed(runs, capsys, files):
    assert report(runs, "--out", "page") == 0
    Path("mine.png").write_text("mine")
    Path("page/report/files.json").write_text(signed({"files": files}))
    before = contents(".")
    capsys.readouterr()
    assert report(runs, "--out", "page") == 2
    assert "no valid files.json" in capsys.readouterr().err
    assert contents(".") == before


def test_a_listed_file_is_removed_only_with_the_content_that_was_written(runs):
    assert report(runs, "--out", "page") == 0
    listed = json.loads(Path("page/report/files.json").read_bytes())["files"]
    Path("page/report/holiday.png").write_text("mine")
    Path("page/report/files.json").write_text(signed({"files": {**listed, "holiday.png": "0" * 64}}))
    assert report(runs, "--out", "page") == 0
    assert Path("page/report/holiday.png").read_text() == "mine"


def test_a_folder_without_its_list_is_refused_and_nothing_in_it_changed(runs, capsys):
    assert report(runs, "--out", "page") == 0
    Path("page/report/files.json").unlink()
    before = contents("page")
    capsys.readouterr()
    assert report(runs, "--out", "page") == 2
    said = capsys.readouterr().err
    assert "no valid files.json" in said
    assert said.count("\n") == 1
    assert contents("page") == before


def test_half_written_files_of_others_stay_and_those_of_the_lab_go(runs):
    assert report(runs, "--out", "page") == 0
    theirs = [Path("page") / name for name in (".mine.77.tmp", "report/.mine.7.tmp", "report/figures/.mine.txt.7.tmp")]
    ours = [
        Path("page") / name
        for name in (".report.html.7.tmp", "report/.table.md.7.tmp", "report/tables/.table.parquet.7.tmp")
    ]
    for path in (*theirs, *ours):
        path.write_text("half")
        os.utime(path, (1e9, 1e9))
    assert report(runs, "--out", "page") == 0
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in ours)


def test_a_killed_report_leaves_a_folder_that_is_known_again(runs, monkeypatch):
    from layerwise.lab.runs import files

    write, left = files.write_whole, [5]

    def killed(path, data, **how):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, data, **how)

    monkeypatch.setattr(files, "write_whole", killed)
    assert report(runs, "--out", "page") == 130
    monkeypatch.setattr(files, "write_whole", write)
    assert report(runs, "--out", "page") == 0


def test_the_name_of_a_quantity_is_no_path(runs, tmp_path):
    for path in Path("runs/store").glob("*/record.json"):
        summary = json.loads(path.read_bytes())
        summary.pop("sha256")
        summary["finals"]["../../../../mine"] = 1.0
        import polars

        table = path.with_name("metrics.parquet")
        frame = polars.read_parquet(table)
        frame = frame.with_columns(polars.col("quantity").replace("test_error", "../../../../mine"))
        frame.write_parquet(table)
        summary["metrics_sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
        path.write_text(signed(summary))
    assert report(runs, "--out", "a/b/c/d/page") == 0
    assert [path.name for path in tmp_path.rglob("*mine*") if "figures" not in path.parts] == []
    assert any("mine" in path.name for path in Path("a/b/c/d/page/report/figures").iterdir())


# --- Runs -------------------------------------------------------------------------------------------------------------


TINY = ["run", "singh2015-table1", "--scale", "smoke", "--seeds", "1", "--jobs", "1"]


@pytest.mark.parametrize("theirs", ["singh2015-table1-smoke/mine.txt", "report.html", "store"])
def test_what_lies_in_the_way_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys, theirs):
    monkeypatch.chdir(tmp_path)
    path = Path("out") / theirs
    path.parent.mkdir(parents=True)
    if theirs == "store":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("mine")
    before = contents(".")
    assert main([*TINY, "--out", "out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(".") == before


def test_a_run_folder_that_is_a_link_is_not_touched(tmp_path, monkeypatch):
    from layerwise.lab.errors import UsageError
    from layerwise.lab.runs.folder import Runs

    run, other = chosen()
    folder = Runs(tmp_path / "runs").folder(run.configuration)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("checkpoint.pt", "checkpoint-mine.pt", "download.part", ".x.tmp", "run.json"):
        (outside / name).write_text("mine")
    folder.path.parent.mkdir(parents=True)
    folder.path.symlink_to(outside)
    before = contents(outside)
    with pytest.raises(UsageError, match="is a link"), folder.lock():
        pass
    assert folder.record() is None
    finish(tmp_path / "runs", other, 1.5)
    listed(only(table_plan(seeds=1), "sgd", "plain", "layer-adaptive"), tmp_path / "runs")
    assert report(tmp_path / "runs", "--out", tmp_path / "page") == 0
    assert contents(outside) == before


def test_files_of_others_in_a_runs_folder_stay(tmp_path):
    from layerwise.lab.runs.folder import Runs

    run = chosen()[0]
    folder = Runs(tmp_path).folder(run.configuration)
    folder.path.mkdir(parents=True)
    theirs = [folder.path / name for name in ("checkpoint-mine.pt", "download.part", ".x.tmp", ".notes.7.tmp")]
    ours = [folder.path / name for name in ("factors.jsonl.7.part", ".run.json.7.tmp")]
    for path in (*theirs, *ours):
        path.write_text("mine")
    with folder.lock():
        folder.save_checkpoint({"number": torch.tensor(1)})
        finish(tmp_path, run, 1.5)
    assert all(path.read_text() == "mine" for path in theirs)
    assert not any(path.exists() for path in (*ours, folder.path / "checkpoint.pt"))


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    from layerwise.lab.runs.folder import Runs

    record = finish(tmp_path, chosen()[0], 1.5)
    (record.folder / "record.json.broken").write_text("mine")
    (record.folder / "record.json").write_text("half")
    assert Runs(tmp_path).find(record.configuration) is None
    assert (record.folder / "record.json.broken").read_text() == "mine"
    assert (record.folder / "record.json.broken-2").read_text() == "half"


# --- Sinks and recorded factors ---------------------------------------------------------------------------------------


def record(step):
    return Record(step, ("fc",), *([1.0] for _ in range(6)))


def test_a_parquet_sink_follows_no_link_and_overwrites_no_file(tmp_path):
    place = tmp_path / "layers"
    first, second = Parquet(place, 1), Parquet(place, 1)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("part", "part-000001"):
        (place / f".{name}.parquet.{os.getpid()}.tmp").symlink_to(outside)
    first(record(1))
    assert outside.read_text() == "mine"

    import pathlib

    listed = pathlib.Path.glob
    stale = list(listed(place, "part-9*.parquet"))
    pathlib.Path.glob = lambda self, pattern: iter(stale)  # as another process sees the folder a moment earlier
    try:
        second(record(2))
    finally:
        pathlib.Path.glob = listed
    import polars

    assert sorted(polars.read_parquet(f"{place}/part-*.parquet")["step"]) == [1, 2]


def test_recorded_factors_replace_a_link_and_leave_no_part(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    file = tmp_path / "factors.jsonl"
    file.symlink_to(outside)
    rules.save_factors(file, [{"a": 1.0}])
    assert outside.read_text() == "mine"
    assert not file.is_symlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        rules.save_factors(tmp_path / "folder", [{"a": 1.0}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors.jsonl", "folder", "outside"]
