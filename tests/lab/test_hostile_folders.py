"""Folders that somebody else has filled: what cannot be read is left out by name, and the rest is reported."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import polars
import pytest
import torch
from lab_helpers import stored
from made_up import (
    SWEEP_LAYERS,
    finish,
    finish_plan,
    listed,
    only,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
)

from layerwise import rules
from layerwise.lab.cli import main
from layerwise.lab.report import saved
from layerwise.lab.runs import store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")


@pytest.fixture(autouse=True)
def _no_hang():
    """End a test that waits for a pipe."""

    def ended(number, frame):
        raise TimeoutError("a reader waits")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(3600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Finish a plain run and one of a method that chooses layers."""
    place = tmp_path_factory.mktemp("source")
    plan = table_plan(seeds=1)
    for run in plan.runs:
        if run.subject == "sgd" and run.arm.name in ("plain", "layer-adaptive"):
            chosen = [{"epoch": 1, "layers": {"conv1": [0.5, 1.5, True], "ip1": [None, None, False]}}]
            finish(place, run, 1.5, selections=chosen if run.arm.name != "plain" else None)
    listed(only(plan, "sgd", "plain", "layer-adaptive"), place)
    return place


@pytest.fixture
def runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "runs")
    return Path("runs")


@pytest.fixture
def method(runs):
    """Give the folder of the method's run, which is to be made hostile."""
    return next(path for path in (runs / "store").iterdir() if "LayerAdaptive" in path.name)


def signed(content):
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest})


def read(path):
    content = json.loads(path.read_bytes())
    content.pop("sha256", None)
    return content


def with_table(folder, frame=None, content=None):
    """Exchange the table of a run, with the right checksum in its record."""
    if content is None:
        frame.write_parquet(folder / "metrics.parquet")
        content = (folder / "metrics.parquet").read_bytes()
    (folder / "metrics.parquet").write_bytes(content)
    summary = read(folder / "record.json")
    summary["metrics_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "record.json").write_text(signed(summary))


def report(capsys, *words, code=(0,)):
    """Write a report; give what was said."""
    capsys.readouterr()
    assert main(["report", *map(str, words), "--out", "page", "--quiet"]) in code
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert all(letter.isprintable() or letter == "\n" for letter in said.out + said.err)
    return said.out + said.err


def all_left_out(capsys, method, cases):
    """Make a copy of a run hostile in each way, and check that one report names every one and goes on."""
    cases = dict(cases)
    whole = read(method / "run.json")
    for number, make in enumerate(cases.values()):
        place = method.with_name(f"case{number:02}")
        shutil.copytree(method, place, symlinks=True)
        # Another run each: of two that are the same one is taken.
        (place / "run.json").write_text(
            signed({**whole, "configuration": {**whole["configuration"], "seed": number + 7}})
        )
        make(place)
    plan = only(table_plan(seeds=7 + len(cases)), "sgd", "plain", "layer-adaptive")
    page = Path("runs") / plan.name
    (page / "plan.json").write_bytes(store.signed(json.loads(saved.as_json(plan))))
    known = json.loads((page / "runs.json").read_bytes())
    for number in range(len(cases)):
        place = {"subject": "sgd", "arm": "layer-adaptive", "seed": number + 7, "folder": f"../store/case{number:02}"}
        known["runs"].append(place)
    (page / "runs.json").write_text(json.dumps(known))
    said = "".join(report(capsys, "runs").split())
    html = Path("page/report/report.html").read_text()
    for number, name in enumerate(cases):
        assert f"case{number:02}" in said, name
        assert f"case{number:02}" in html, name
    assert f"2 of {len(plan.runs)} finished" in html


def set_to(file, name, value):
    """Give what sets a value of a JSON file, with its checksum."""

    def make(folder):
        content = read(folder / file)
        inside = content["configuration"] if file == "run.json" else content
        inside[name] = value
        (folder / file).write_text(signed(content))

    return make


# --- What is no plain file --------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def link(path):
    path.symlink_to(Path("outside").absolute())


def listening(path):
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        made = socket.socket(socket.AF_UNIX)
        made.bind(path.name)
        made.close()
    finally:
        os.chdir(here)


def huge(path):
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


KINDS = [pipe, zeros, link, listening, Path.mkdir, huge]


def in_place(name, make):
    def made(folder):
        shutil.copy(folder / name, "outside")
        (folder / name).unlink()
        make(folder / name)

    return made


def test_runs_with_what_is_no_plain_file_are_left_out_by_name(method, capsys):
    names = ("run.json", "record.json", "metrics.parquet")
    all_left_out(capsys, method, {(name, make): in_place(name, make) for name in names for make in KINDS})


@pytest.mark.parametrize("name", ["run.json", "record.json", "metrics.parquet"])
def test_a_list_goes_on_without_a_run_of_what_is_no_plain_file(method, capsys, name):
    whole = {path: path.read_bytes() for path in method.iterdir()}
    for make in KINDS:
        (method / name).rename("outside")
        make(method / name)
        assert main(["list", "singh2015-table1", "--out", "runs", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["scales"]["reduced"]["finished"] == 1
        for path, content in whole.items():  # what lay there was set aside
            path.write_bytes(content)
    assert main(["list", "singh2015-table1", "--out", "runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["scales"]["reduced"]["finished"] == 2


@pytest.mark.parametrize("name", ["runs.json", "plan.json"])
def test_a_list_or_plan_that_is_no_plain_file_ends_no_report(experiment, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(experiment, "out")
    place = next(Path("out").glob(f"*/{name}"))
    place.rename("outside")
    for make in KINDS if name == "runs.json" else (pipe, zeros):
        make(place)
        said = report(capsys, place.parent, code=(2,))
        assert said.count("\n") == 1
        assert name in said
        place.rmdir() if make is Path.mkdir else place.unlink()


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "checkpoint-before.pt", "checkpoint-rows.bin", "status.json", "lock", "factors.jsonl"]
)
def test_other_files_of_a_run_that_are_no_plain_files_hang_nothing(method, name):
    from layerwise.lab.runs.folder import Runs

    (record,) = [each for each in stored(Runs(Path("runs"))) if each.folder == method]
    folder = Runs(Path("runs")).folder(record.configuration)
    for make in KINDS:
        if os.path.lexists(method / name):
            (method / name).unlink()
        Path("outside").write_bytes(b"mine")
        make(method / name)
        if name == "lock" and make is not huge:
            with pytest.raises((OSError, ValueError), match="lock"), folder.lock():
                pass
        elif name != "lock":
            with folder.lock():
                assert folder.load_checkpoint() is None
                folder.tidy(record.summary)
        if name == "factors.jsonl":
            with pytest.raises((OSError, ValueError), match="factors"):
                rules.Replay(method / name)
        assert Path("outside").read_bytes() == b"mine"
        if os.path.lexists(method / name):
            (method / name).rmdir() if (method / name).is_dir() else (method / name).unlink()


def test_a_run_folder_that_is_a_link_is_left_out_by_name(method, capsys):
    def moved(folder):
        folder.rename("outside")
        folder.symlink_to(Path("outside").absolute())

    all_left_out(capsys, method, {"link": moved})


# --- Values -----------------------------------------------------------------------------------------------------------


VALUES = {
    "selections": ([{}], [{"epoch": 1}], [{"epoch": 1, "layers": 5}], [{"epoch": 1, "layers": {"a": [1]}}], {}, [[]]),
    "layers": ([1], {}, "conv1", [["conv1"]], None),
    "finals": ({"test_error": "1"}, {"test_error": True}, {"test_error": 10**300}, [], {"test_error": [1.0]}),
    "factor": ({}, [], {"mean": "x", "spread": 1, "layers": {}}, {"mean": 1, "spread": 1, "layers": ["a"]}),
    "seconds": ("1", None, True, 10**300, [1]),
    "parameters": (1.5, -1, 10**300, "1", False),
    "diverged_at": (-1, 1.5, "3", True),
    "metrics_sha256": (1, None, "", ["a"]),
}


def test_records_of_other_kinds_are_left_out_by_name(method, capsys):
    cases = [(name, value) for name, each in VALUES.items() for value in each]
    made = {f"{name}={value}": set_to("record.json", name, value) for name, value in cases}
    all_left_out(capsys, method, made)


CONFIGURATIONS = {
    "seed": (10**300, -1, 1.5, "0", None, True),
    "rule": ({}, {"factors": 5}, {"name": "Constant", "factors": 5}, {"name": 5}, [], "LayerAdaptive"),
    "source": (5, []),
    "trial": (None, [], "x", {"epochs": "ten"}),
    "apply": (None, 3),
    "more": (1,),
}


def test_configurations_of_other_kinds_are_left_out_by_name(method, capsys):
    cases = [(name, value) for name, each in CONFIGURATIONS.items() for value in each]
    made = {f"{name}={value}": set_to("run.json", name, value) for name, value in cases}
    all_left_out(capsys, method, made)


NO_JSON = [
    b"",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"[]",
    b"null",
    b"{}{}",
    b'{"sha256": 1}',
    b"\xff\xff",
    b'"' + b"x" * 100_000,
    b"1" * 5_000,
]


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def test_files_that_are_no_json_are_left_out_by_name(method, capsys):
    names = ("run.json", "record.json")
    made = {f"{name} {content[:20]}": written(name, content) for name in names for content in NO_JSON}
    all_left_out(capsys, method, made)


def with_more(value):
    def make(folder):
        text = json.dumps({**read(folder / "record.json"), "more": "HERE"}).replace('"HERE"', value)
        digest = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
        (folder / "record.json").write_text(f'{text[:-1]}, "sha256": "{digest}"}}')

    return make


def test_numbers_and_words_that_json_lacks_are_left_out_by_name(method, capsys):
    values = ("NaN", "Infinity", "-Infinity", "1e999", "1e300", "[" * 40 + "]" * 40, '"\\ud800"', "1" * 400)
    all_left_out(capsys, method, {value: with_more(value) for value in values})


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(frame):
    """Give tables that no run has."""
    null = polars.lit(None)
    yield "other type", frame.with_columns(polars.col("step").cast(polars.Float64))
    yield "text", frame.with_columns(polars.col("value").cast(polars.String))
    yield "no column", frame.drop("epoch")
    yield "another column", frame.with_columns(polars.lit(1).alias("more"))
    yield "two columns of one meaning", frame.rename({"epoch": "step "})
    for name in ("step", "epoch", "quantity", "value"):
        yield f"null {name}", frame.with_columns(null.cast(frame.schema[name]).alias(name))
    for words, value in (("negative", -1), ("far", 2**62)):
        yield f"{words} step", frame.with_columns(polars.lit(value, polars.Int64).alias("step"))
    yield "negative epoch", frame.with_columns(polars.lit(-1, polars.Int32).alias("epoch"))
    for value in (float("nan"), float("inf"), 1e300):
        yield f"{value} of the network", frame.with_columns(polars.lit(value).alias("value"))


def test_tables_of_other_columns_or_numbers_are_left_out_by_name(method, capsys):
    frame = polars.read_parquet(method / "metrics.parquet")
    made = {words: lambda folder, table=table: with_table(folder, table) for words, table in tables(frame)}
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not a table"):
        made[str(content[:9]) + str(len(content))] = lambda folder, content=content: with_table(folder, content=content)
    all_left_out(capsys, method, made)


def test_any_number_of_a_layer_gives_a_page(method, capsys):
    frame = polars.read_parquet(method / "metrics.parquet")
    for value in (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-320, 0.0):
        changed = polars.when(polars.col("layer").is_not_null()).then(value).otherwise(polars.col("value"))
        with_table(method, frame.with_columns(changed.alias("value")))
        assert "Skipped" not in report(capsys, "runs")


def test_an_empty_table_and_steps_of_nought_give_a_page(method, capsys):
    frame = polars.read_parquet(method / "metrics.parquet")
    for made in (frame.clear(), frame.with_columns(polars.lit(0, polars.Int64).alias("step"))):
        with_table(method, made)
        report(capsys, "runs")


def test_a_small_table_of_many_rows_is_left_out_by_name(method, capsys):
    frame = polars.read_parquet(method / "metrics.parquet").head(1)
    many = {name: polars.repeat(frame[name][0], 12_000_000, dtype=kind) for name, kind in frame.schema.items()}
    polars.select(**many).write_parquet("many.parquet")
    content = Path("many.parquet").read_bytes()
    assert len(content) < 200_000
    all_left_out(capsys, method, {"many": lambda folder: with_table(folder, content=content)})


# --- Names ------------------------------------------------------------------------------------------------------------


HOSTILE = "a\x1b[31m\x1b]0;title\x07\n\u202egnp.\u2066\r\x9b2J"


def test_names_reach_neither_terminal_nor_page_as_they_are(method, capsys):
    place = method.with_name(HOSTILE)
    method.rename(place)
    (place / "record.json").write_text("half")
    (page,) = Path("runs").glob("*/runs.json")
    known = json.loads(page.read_bytes())
    for each in known["runs"]:
        if each["folder"].endswith(method.name):
            each["folder"] = f"../store/{HOSTILE}"
    page.write_text(json.dumps(known))
    report(capsys, "runs")  # which looks at every letter
    said = " ".join(report(capsys, place, code=(2,)).split())
    assert r"a\x1b[31m" in said
    assert r"\u202e" in said
    Path("page").rename(HOSTILE)
    capsys.readouterr()
    assert main(["report", "runs", "--out", HOSTILE, "--figures"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    written = [path for path in Path(HOSTILE).rglob("*") if path.suffix in (".html", ".md", ".svg")]
    assert len(written) > 3
    for path in written:
        assert not set(path.read_text()) & set("\x1b\x07\u202e\u2066\r\x9b")


def test_labels_reach_neither_terminal_nor_page_as_they_are(method, capsys):
    about = read(method / "run.json")
    about["labels"] = dict.fromkeys(("subject", "subject_words", "arm", "arm_words", "experiment"), HOSTILE)
    (method / "run.json").write_text(signed(about))
    capsys.readouterr()
    assert main(["report", "runs", "--out", "page", "--figures"]) == 0
    said = capsys.readouterr().out
    written = [path for path in Path("page").rglob("*") if path.suffix in (".html", ".md", ".svg")]
    for text in (said, *(path.read_text() for path in written)):
        assert not set(text) & set("\x1b\x07\u202e\u2066\r\x9b")


# --- Lists of runs and plans ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Write the page of an experiment with groups, thresholds, choices and numbers of a paper."""
    from made_up import outcome_of

    from layerwise.lab import report as reports

    place = tmp_path_factory.mktemp("experiment")
    plan = sweep_plan("best", seeds=1)
    finish_plan(plan, place, sweep_value, layers=SWEEP_LAYERS, selections=sweep_selections, quantity="accuracy")
    reports.write(outcome_of(plan, place, place), "")
    return place


@pytest.mark.parametrize("way", ["absolute", "relative", "through a link"])
def test_a_list_of_runs_names_none_that_lie_elsewhere(experiment, tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(experiment, "out")
    page = next(path.parent for path in Path("out").glob("*/runs.json"))
    listed = json.loads((page / "runs.json").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    theirs = tmp_path / "elsewhere" / "secret"
    moved = page / listed["runs"][0]["folder"]
    shutil.move(moved, theirs)
    if way == "through a link":
        (page.parent / "there").symlink_to(theirs.parent)
    ways = {"absolute": str(theirs), "relative": "../../elsewhere/secret", "through a link": "../there/secret"}
    listed["runs"][0]["folder"] = ways[way]
    (page / "runs.json").write_text(json.dumps(listed))
    said = "".join(report(capsys, page).split())
    assert ways[way].removeprefix("../") in said
    assert ("notrelative" if way == "absolute" else "givethefolderofthatruntoreportinstead") in said
    assert f"{len(listed['runs']) - 1} of" in Path("page/report/table.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"runs": [' + "[" * 50_000,
        "{}",
        '{"runs": 5}',
        '{"runs": [5]}',
        '{"runs": [{"folder": "\\u0000"}]}',
        '{"runs": [{"folder": "../../../../etc"}]}',
        '{"runs": [{"folder": "."}]}',
        '{"runs": [{"folder": "x", "seed": 1e400}]}',
        "\ufeff{}",
        "",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_list_of_runs_of_any_content_ends_no_report(runs, capsys, content):
    (page,) = runs.glob("*/runs.json")
    page.write_text(content)
    assert report(capsys, runs, code=(2,)).count("\n") == 1
    assert not Path("page").exists()


def places(content, path=()):
    """Give the place of each value, the first of each list standing for all."""
    for key, value in content.items() if isinstance(content, dict) else list(enumerate(content))[:1]:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(content, path, value):
    content = json.loads(json.dumps(content))
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return content


EVIL = (None, True, -1, 10**300, 1e99, "", "x", "../../x", HOSTILE, [], {}, [[]], [None], {"": None}, {"name": 3}, 0)


@pytest.mark.faults
def test_every_value_of_a_run_may_be_anything(method, capsys):
    number = 0
    for name in ("run.json", "record.json"):
        whole = read(method / name)
        for path in places(whole):
            value = EVIL[number % len(EVIL)]
            for value in (EVIL[number % len(EVIL)], EVIL[(number * 7 + 3) % len(EVIL)]):
                (method / name).write_text(signed(changed(whole, path, value)))
                try:
                    report(capsys, "runs")
                except BaseException as error:
                    raise AssertionError(f"{name} {path} = {value!r}") from error
                number += 1
        (method / name).write_text(signed(whole))


@pytest.mark.faults
def test_every_value_of_a_plan_may_be_anything(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(experiment, "out")
    page = next(path.parent for path in Path("out").glob("*/runs.json"))
    whole = read(page / "plan.json")
    for number, path in enumerate(places(whole)):
        for value in (EVIL[number % len(EVIL)], EVIL[(number * 5 + 2) % len(EVIL)]):
            (page / "plan.json").write_text(signed(changed(whole, path, value)))
            try:
                report(capsys, page, code=(0, 2))
            except BaseException as error:
                raise AssertionError(f"plan.json {path} = {value!r}") from error


# --- Recorded factors, data, tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pipe, zeros, listening, Path.mkdir, huge])
def test_recorded_factors_that_are_no_plain_file_are_refused(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(Path("factors.jsonl"))
    with pytest.raises((OSError, ValueError), match=r"factors\.jsonl"):
        rules.Replay("factors.jsonl")
    (tmp_path / "whole.jsonl").unlink(missing_ok=True)
    rules.save_factors("whole.jsonl", [{"a": 2.0}])
    Path("link.jsonl").symlink_to("whole.jsonl")  # one's own link is followed
    assert rules.Replay("link.jsonl").file == "link.jsonl"


@pytest.mark.full
@pytest.mark.parametrize("make", [pipe, zeros, listening, huge])
@pytest.mark.parametrize(
    "name",
    [
        "mnist/train-images-idx3-ubyte",
        "cifar10/cifar-10-python.tar.gz",
        "cifar10/data_batch_1",
        "imagenet/train/a/1.png",
    ],
)
def test_data_that_are_no_plain_files_hang_nothing(tmp_path, monkeypatch, capsys, make, name):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        Path("imagenet", part, "a").mkdir(parents=True)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    make(Path(name))
    assert main(["list", "--data-dir", "."]) == 0
    assert main(["data", "--data-dir", "."]) == 0
    assert main(["run", "singh2015-table1", "--scale", "full", "--data-dir", "."]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err


def test_a_photograph_that_has_become_a_pipe_is_named(tmp_path):
    from layerwise.lab.data import photographs
    from layerwise.lab.errors import UsageError

    for make in (pipe, zeros, huge):
        path = tmp_path / f"{make.__name__}.png"
        make(path)
        with pytest.raises(UsageError, match=path.name):
            photographs.decoded(path, 8)


@pytest.mark.parametrize("make", [pipe, zeros, listening, Path.mkdir, huge])
def test_a_task_that_is_no_plain_file_is_refused(tmp_path, monkeypatch, capsys, make):
    monkeypatch.chdir(tmp_path)
    make(Path("task.py"))
    assert main(["doctor", "task.py:task"]) == 2
    assert "task.py" in capsys.readouterr().err


def test_a_checkpoint_is_read_only_with_its_checksum(tmp_path):
    from layerwise.lab.runs.folder import RunFolder

    run = RunFolder(tmp_path, None)
    run.save_checkpoint({"number": torch.tensor(1)})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:-1])
    assert run.load_checkpoint() is None
    threading.Event().wait(0)
