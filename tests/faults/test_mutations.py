"""Files that were cut off or changed: a named error, or what was before; never another number, never a crash."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import finish_plan, listed, only, outcome_of, table_plan, table_value
from mutations import mutated, named, tally
from PIL import Image
from test_cifar import assert_read, publish  # noqa: F401
from test_data import put, sets  # noqa: F401

from layerwise import rules
from layerwise.lab.data import cifar, digits, folder, mnist, photographs
from layerwise.lab.errors import UsageError
from layerwise.lab.report import saved
from layerwise.lab.runs.folder import RunFolder, Runs
from layerwise.lab.runs.record import Recorder, read_run, read_tables
from layerwise.lab.runs.store import signed

pytestmark = pytest.mark.full


def each_size(test):
    """Run a test with few changed files, and in the long part with many."""
    return pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.faults)])(test)


@pytest.fixture
def told(capsys, request):
    def say(counts):
        if request.config.getoption("--faults"):
            with capsys.disabled():
                sys.stdout.write(f"\n{request.node.name}: {counts}\n")

    return say


@pytest.fixture
def finished(tmp_path):
    plan = table_plan(seeds=1)
    (run,) = [run for run in plan.runs if run.subject == "sgd" and run.arm.name == "layer-adaptive"]
    from made_up import finish

    return finish(tmp_path / "runs", run, 1.5)


@each_size
def test_a_checkpoint_is_whole_or_the_one_before_is_taken(tmp_path, count, told):
    run = RunFolder(tmp_path, None)
    states = [{"weights": torch.arange(50.0) + number, "words": ["a", number]} for number in (1, 2)]
    for state in states:
        run.save_checkpoint(state)
    newest = (tmp_path / "checkpoint.pt").read_bytes()

    def read(content):
        run.set_aside.clear()
        (tmp_path / "checkpoint.pt").write_bytes(content)
        state = run.load_checkpoint()
        assert torch.equal(state["weights"], states[0]["weights"])
        assert state["words"] == ["a", 1]
        assert run.set_aside == [tmp_path / "checkpoint.pt"]
        return "the one before"

    told(tally(count, 0, newest, read))


@each_size
@pytest.mark.parametrize("name", ["run.json", "record.json", "metrics.parquet"])
def test_a_finished_run_is_what_it_was_or_is_not_taken(tmp_path, finished, name, count, told):
    whole = {path.name: path.read_bytes() for path in finished.folder.iterdir() if path.is_file()}
    frame, runs = finished.metrics(), Runs(tmp_path / "runs")

    def read(content):
        for file, before in whole.items():
            (finished.folder / file).write_bytes(before)
        (finished.folder / name).write_bytes(content)
        try:
            record = read_run(finished.folder)
            _, broken = read_tables([record.metrics_file])
            if broken:
                raise UsageError(broken[record.metrics_file])
            assert (record.summary, record.configuration) == (finished.summary, finished.configuration)
            assert record.metrics().equals(frame)
            reported = "the same"
        except UsageError as error:
            reported = named(error, finished.folder)
        runs.set_aside.clear()
        record = runs.find(finished.configuration)
        assert (record is None) == (reported == "named error")
        assert (runs.set_aside == []) == (reported == "the same")
        for broken in finished.folder.glob("*.broken"):
            broken.unlink()
        return reported

    told(tally(count, 1, whole[name], read))


@each_size
@pytest.mark.parametrize("name", ["plan.json", "runs.json"])
def test_the_plan_of_an_experiment_is_what_it_was_or_is_not_taken(tmp_path, name, count, told):
    plan = table_plan(seeds=1)
    finish_plan(plan, tmp_path / "runs", table_value)
    outcome = outcome_of(plan, tmp_path / "runs", tmp_path / "runs")
    place = outcome.folder
    place.mkdir()
    (place / "plan.json").write_bytes(signed(json.loads(saved.as_json(plan))))
    listed = [{"subject": s, "arm": a, "seed": n, "folder": os.path.relpath(record.folder, place)}
              for (s, a, n), record in outcome.results.records.items()]  # fmt: skip
    (place / "runs.json").write_text(json.dumps({"plan": plan.name, "runs": listed}))
    expected, _ = saved.rebuilt(place)
    whole = (place / name).read_bytes()

    def read(content):
        (place / name).write_bytes(content)
        rebuilt = saved.rebuilt(place)
        if rebuilt is None:
            return "not taken"
        results, left_out = rebuilt
        assert results.records.items() <= expected.records.items()
        if len(results.records) < len(expected.records):
            assert "gone or damaged" in results.plan.notes[-1]
            assert left_out
            return "fewer runs, and told"
        assert results.table().equals(expected.table())
        assert (results.plan.title, results.plan.paper) == (expected.plan.title, expected.plan.paper)
        return "the same"

    told(tally(count, 2, whole, read))


SIGNED = """
import hashlib, random, sys
from collections import Counter
from pathlib import Path
from mutations import mutated
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.record import read_frame
from layerwise.lab.runs.folder import MAGIC, RunFolder
kind, place, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
chance, told = random.Random(3), Counter()
content = (place / "whole").read_bytes()
for _ in range(count):
    made = mutated(content, chance)
    try:
        if kind == "metrics":
            (place / "metrics.parquet").write_bytes(made)
            read_frame(place / "metrics.parquet")
        else:
            (place / "checkpoint.pt").write_bytes(MAGIC + hashlib.sha256(made).digest() + made)
            RunFolder(place, None).load_checkpoint()
        told["read"] += 1
    except UsageError as error:
        assert str(place) in str(error) and "\\n" not in str(error), error
        told["named error"] += 1
print(dict(told))
"""


@each_size
@pytest.mark.parametrize("kind", ["metrics", "checkpoint"])
def test_what_somebody_has_signed_again_ends_no_process(tmp_path, kind, count, told):
    if kind == "metrics":
        recorder = Recorder()
        for step in range(200):
            recorder.add("training_loss", step, 1, 1.0 / (step + 1))
            recorder.add("factor", step, 1, 2.0, f"layer {step % 3}")
        recorder.frame().write_parquet(tmp_path / "whole")
    else:
        network = torch.nn.Linear(5, 5)
        torch.save({"model": network.state_dict(), "position": [1, 2, 3], "words": "none"}, tmp_path / "whole")
    (tmp_path / "script.py").write_text(SIGNED)
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), kind, str(tmp_path), str(count)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told(done.stdout.strip().splitlines()[-1:])


@each_size
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "idx"])
def test_digits_are_those_that_were_published_or_are_refused(tmp_path, sets, file, compressed, count, told):  # noqa: F811
    put(tmp_path, sets["mnist"], compressed)
    path = tmp_path / (file if compressed else file.removesuffix(".gz"))
    expected = mnist.load.__wrapped__(tmp_path, "mnist")

    def read(content):
        path.write_bytes(content)
        try:
            given = mnist.load.__wrapped__(tmp_path, "mnist")
        except UsageError as error:
            return named(error, path)
        assert torch.equal(given.train_images, expected.train_images)
        assert torch.equal(given.test_labels, expected.test_labels)
        return "the same"

    told(tally(count, 4, path.read_bytes(), read))


@each_size
@pytest.mark.parametrize(
    ("version", "packed", "file"),
    [("python", False, "data_batch_1"), ("binary", False, "test_batch.bin"), ("python", True, None)],
    ids=["pickle", "binary", "tar.gz"],
)
def test_photographs_are_those_that_were_published_or_are_refused(
    tmp_path,
    publish,  # noqa: F811
    version,
    packed,
    file,
    count,
    told,
):
    expected = publish(tmp_path, "cifar10", version, packed)
    (path,) = [path for path in tmp_path.rglob("*") if path.name == (file or "cifar-10-python.tar.gz")]

    def read(content):
        path.write_bytes(content)
        try:
            given = cifar.load.__wrapped__("cifar10", tmp_path)
        except UsageError as error:
            return named(error, tmp_path)
        assert_read(given, expected)
        return "the same"

    told(tally(count, 5, path.read_bytes(), read))


@each_size
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_photograph_is_read_or_named(tmp_path, form, count, told):
    points = np.add.outer(np.arange(40), np.arange(30))[..., None] * np.array([2, 3, 1])
    buffer = io.BytesIO()
    Image.fromarray(points.astype(np.uint8)).save(buffer, form)
    path = tmp_path / "a.JPEG"
    path.write_bytes(buffer.getvalue())
    expected = photographs.decoded(path, 16)

    def read(content):
        path.write_bytes(content)
        try:
            given = photographs.decoded(path, 16)
        except UsageError as error:
            return named(error, path)
        assert given.shape == (3, 16, 16)
        return "the same" if np.array_equal(given, expected) else "other pixels"

    counts = tally(count, 6, buffer.getvalue(), read)
    told(counts)
    assert form == "JPEG" or counts["other pixels"] == 0


@each_size
def test_a_mean_image_is_what_it_was_or_is_computed_again(tmp_path, count, told, monkeypatch):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20), (10, 20, 30)).save(tmp_path / part / "a" / "1.png")
    opened = functools.partial(folder.ImageFolder, tmp_path, side=16, crop=8, cache=tmp_path / "cache")
    expected = opened().mean
    (kept,) = (tmp_path / "cache").glob("mean-*.npy")
    seen, decoded = [], photographs.decoded
    monkeypatch.setattr(photographs, "decoded", lambda *given: seen.append(1) or decoded(*given))

    def read(content):
        kept.write_bytes(content)
        seen.clear()
        assert np.array_equal(opened().mean, expected)
        assert seen
        return "computed again"

    told(tally(count, 7, kept.read_bytes(), read))


@pytest.mark.parametrize("count", [4, pytest.param(150, marks=pytest.mark.faults)])
def test_the_digits_of_the_package_are_what_they_were_or_are_refused(tmp_path, count, told, monkeypatch):
    source = digits.FILE
    expected = digits.load.__wrapped__()
    path = tmp_path / "digits5k.gz"
    monkeypatch.setattr(digits, "FILE", path)
    # Also what a valid compression holds.
    plain = gzip.decompress(source.read_bytes())
    chance = random.Random(8)

    def read(content):
        if chance.random() < 0.5:
            content = gzip.compress(mutated(plain, chance), 1)
        path.write_bytes(content)
        try:
            given = digits.load.__wrapped__()
        except UsageError as error:
            return named(error, path)
        assert torch.equal(given.train_images, expected.train_images)
        assert torch.equal(given.test_labels, expected.test_labels)
        return "the same"

    told(tally(count, 8, source.read_bytes(), read))


@each_size
def test_recorded_factors_are_read_or_named(tmp_path, count, told):
    path = tmp_path / "factors.jsonl"
    rules.save_factors(path, [{"a": 1.0 + step / 7, "b": 2.0} for step in range(20)])
    expected = rules.load_factors(path)

    def read(content):
        path.write_bytes(content)
        try:
            given = rules.load_factors(path)
        except ValueError as error:
            return named(error, path)
        return "the same" if given == expected else "other factors"

    told(tally(count, 9, path.read_bytes(), read))


HOSTILE_VALUES = (None, [], {}, "text", "<script>", -1, 10**400, 1e308, True, [[]], {"name": 3}, "../../x", ["a"] * 3)


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.faults)])
def test_values_that_do_not_belong_there_are_told_even_with_a_right_checksum(tmp_path, finished, count, told):
    listed(only(table_plan(seeds=1), "sgd", "layer-adaptive"), tmp_path / "runs")
    whole = {name: json.loads((finished.folder / name).read_bytes()) for name in ("run.json", "record.json")}
    chance = random.Random(10)
    counts = {"a page": 0, "named error": 0}
    for number in range(count):
        name = chance.choice(["run.json", "record.json"])
        content = json.loads(json.dumps(whole[name]))
        content.pop("sha256")
        place = content
        while True:
            key = chance.choice(list(place))
            if isinstance(place[key], dict) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            place[key] = chance.choice(HOSTILE_VALUES)
            break
        (finished.folder / "run.json").write_text(json.dumps(whole["run.json"]))
        (finished.folder / "record.json").write_text(json.dumps(whole["record.json"]))
        (finished.folder / name).write_bytes(signed(content))
        try:
            (outcome,) = saved.gather([tmp_path / "runs"], tmp_path / "page")
            from layerwise.lab.report.page import build

            if number % 10 == 0:
                assert build([outcome], "").html.count("<script>") == 1
            outcome.results.table()
            outcome.results.comparisons()
            counts["a page"] += 1
        except UsageError as error:
            counts[named(error)] += 1
    told(counts)
    assert counts["named error"]
