"""Sinks: what each service or file holds afterwards, read back with its own reader."""

from __future__ import annotations

import builtins
import json
import logging
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

import layerwise
from layerwise import Monitor
from layerwise.sinks import JSONL, Memory, MLflow, Parquet, Record, TensorBoard, WandB
from layerwise.sinks.record import QUANTITIES

LAYERS = ("", "blocks.*", "blocks.?", "a b/c", "root")
NAMES = ("root", "blocks.*", "blocks.?", "a b/c", "root_2")
FOR_MLFLOW = ("root", "blocks._", "blocks.__2", "a b_c", "root_2")


def made_up(step: int, layers: tuple[str, ...] = LAYERS) -> Record:
    """Return a record of numbers of which no two are equal and some are not finite."""
    start = 100.0 * step
    columns = [[start + 10 * q + i / 8 for i in range(len(layers))] for q in range(len(QUANTITIES))]
    columns[2][0], columns[5][0], columns[5][1] = math.nan, math.inf, -math.inf
    return Record(step, layers, *columns)


def same(first: Any, second: Any) -> bool:
    """Tell whether numbers are equal, NaN being equal to NaN."""
    return first == second or (isinstance(first, float) and math.isnan(first) and math.isnan(second))


def expected_series(records: list[Record], names: tuple[str, ...]) -> dict[str, list[tuple[int, float]]]:
    """Return chart to its steps and values."""
    return {
        f"layerwise/{quantity}/{name}": [(record.step, getattr(record, quantity)[i]) for record in records]
        for quantity in QUANTITIES
        for i, name in enumerate(names)
    }


def assert_same_series(found: Any, expected: Any, single: bool = False) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        for (_, value), (_, wanted) in zip(found[name], points, strict=True):
            assert same(value, struct.unpack("f", struct.pack("f", wanted))[0] if single else wanted), name


@pytest.fixture
def trained(make_model, train) -> Any:
    """Return a function that trains five steps with a monitor at every second one, and gives back what it recorded."""

    def run(*outlets: Any, detach: bool = True) -> list[Record]:
        model, memory = make_model(), Memory()
        optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model)
        watching = Monitor(optimizer, model, every=2, sinks=[*outlets, memory])
        train(model, optimizer, 5)
        assert len(watching.sinks) == len(outlets) + 1
        if detach:
            watching.detach()
        return memory.records

    return run


# --- Records ----------------------------------------------------------------------------------------------------------


def test_the_names_of_charts_are_distinct_and_the_root_module_has_one() -> None:
    assert_same_series(
        {name: [(1, value)] for name, value in made_up(1).scalars()}, expected_series([made_up(1)], NAMES)
    )


def test_a_record_prints_as_a_table() -> None:
    lines = str(made_up(3)).splitlines()
    assert lines[0] == "step 3"
    assert len({len(line) for line in lines[1:]}) == 1
    assert [line.split()[0] for line in lines[2:]] == ["root", "blocks.*", "blocks.?", "a", "root"]
    assert re.split(r"\s{2,}", lines[3]) == ["blocks.*", "300.1", "310.1", "320.1", "330.1", "340.1", "-inf"]


def test_a_record_cannot_be_changed_by_a_sink() -> None:
    with pytest.raises(AttributeError):
        made_up(1).step = 2


# --- JSONL ------------------------------------------------------------------------------------------------------------


def test_jsonl_holds_a_line_of_valid_json_a_record_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    sink = JSONL(tmp_path / "new" / "layers.jsonl")
    records = [made_up(step) for step in (2, 4)]
    for record in records:
        sink(record)
        assert sink.path.read_bytes().endswith(b"}\n"), "there as soon as the sink returns"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in sink.path.read_text().splitlines()]
    assert len(lines) == 2
    for line, record in zip(lines, records, strict=True):
        assert (line.pop("step"), tuple(line.pop("layers"))) == (record.step, record.layers)
        assert line == {q: [x if math.isfinite(x) else None for x in getattr(record, q)] for q in QUANTITIES}


def test_jsonl_is_appended_to_and_a_line_that_was_left_unfinished_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    JSONL(path)(made_up(2))
    with path.open("a") as file:
        file.write('{"step": 3, "lay')
    JSONL(path)(made_up(4))
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["step"] for i in (0, 2)] == [2, 4]
    assert lines[1] == '{"step": 3, "lay'


def test_jsonl_takes_back_what_it_could_not_write_whole(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits the size of files, as Unix does")
    sink = JSONL(tmp_path / "layers.jsonl")
    sink(made_up(2))
    whole = sink.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 3 // 2, before[1]))
        with pytest.raises(OSError, match="only a part of a line could be written"):
            sink(made_up(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sink.path.read_bytes() == whole


@pytest.mark.parametrize("kind", [JSONL, Parquet])
def test_files_stay_where_they_were_when_the_program_changes_its_folder(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("polars")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = kind("layers")
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink(made_up(1))
    getattr(sink, "close", lambda: None)()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert sink.path == tmp_path / "layers"
    assert (sink.path if kind is JSONL else sink.path / "part-000001.parquet").stat().st_size > 0


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_holds_a_row_a_layer_and_step(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    sink = Parquet(tmp_path / "layers", records_per_file=2)
    records = [made_up(step) for step in (2, 4, 6, 8, 10)]
    for number, record in enumerate(records):
        sink(record)
        files = sorted(path.name for path in sink.path.iterdir())
        assert files == ["part-000001.parquet", "part-000002.parquet"][: (number + 1) // 2]
    sink.close()
    sink.close()
    frame = polars.read_parquet(f"{sink.path}/*.parquet")
    assert frame.columns == ["step", "layer", *QUANTITIES]
    rows = [
        (record.step, layer, *(getattr(record, q)[i] for q in QUANTITIES))
        for record in records
        for i, layer in enumerate(LAYERS)
    ]
    assert len(frame) == len(rows)
    assert all(map(same, sum(frame.rows(), ()), sum(rows, ())))


def test_parquet_goes_on_in_a_folder_that_holds_files(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    for step in (2, 4):
        sink = Parquet(tmp_path)
        sink(made_up(step))
        sink.close()
    assert sorted(set(polars.read_parquet(tmp_path / "*.parquet")["step"])) == [2, 4]


def test_parquet_writes_what_is_left_when_the_program_ends_without_a_word(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    code = f"""
import torch, layerwise
p = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([("a.weight", p)], lr=0.1)
layerwise.Monitor(optimizer, every=1, sinks=[layerwise.sinks.Parquet({str(tmp_path)!r})])
for _ in range(3):
    p.grad = torch.ones(2)
    optimizer.step()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert polars.read_parquet(tmp_path / "*.parquet")["step"].to_list() == [1, 2, 3]


def test_a_run_that_is_killed_while_it_writes_leaves_whole_parquet_files_only(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    code = f"""
import os, signal, polars
from layerwise.sinks import Parquet, Record
sink = Parquet({str(tmp_path)!r}, records_per_file=1)
sink(Record(1, ("a", "b"), *[[1.0, 2.0]] * 6))
whole = polars.DataFrame.write_parquet
def half(self, stream, **options):
    whole(self, stream, **options)
    stream.truncate(stream.tell() // 2)
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
polars.DataFrame.write_parquet = half
sink(Record(2, ("a", "b"), *[[1.0, 2.0]] * 6))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the check was in the middle of the second file"
    assert polars.read_parquet(tmp_path / "*.parquet")["step"].to_list() == [1, 1]


def test_parquet_leaves_nothing_of_a_file_that_it_could_not_write_and_keeps_the_records(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    resource = pytest.importorskip("resource", reason="limits the size of files, as Unix does")
    sink = Parquet(tmp_path)
    sink(made_up(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(Exception, match="File too large"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    sink.close()
    assert set(polars.read_parquet(tmp_path / "*.parquet")["step"]) == {2}


@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_parquet_refuses_a_wrong_number_of_records(number: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=f"records_per_file={number!r} must be"):
        Parquet(tmp_path / "new", records_per_file=number)
    assert not (tmp_path / "new").exists()


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parametrize("kind", ["folder", "path", "writer"])
def test_tensorboard_reads_the_charts_back(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    targets = {"folder": lambda: str(tmp_path), "path": lambda: tmp_path, "writer": lambda: SummaryWriter(tmp_path)}
    target: Any = targets[kind]()
    sink = TensorBoard(target)
    records = [made_up(step) for step in (50, 100)]
    for record in records:
        sink(record)
    sink.close()
    assert_same_series(events(tmp_path), expected_series(records, NAMES), single=True)
    if kind == "writer":
        target.add_scalar("loss", 1.0, 100)
        target.close()
        assert events(tmp_path)["loss"] == [(100, 1.0)]


def test_tensorboard_takes_a_folder_or_a_writer_only() -> None:
    with pytest.raises(TypeError, match=r"target=3 must be a folder, or a writer with add_scalar"):
        TensorBoard(3)


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def offline_records(path: Path) -> list[Any]:
    """Read the file of an offline run: records in blocks of 32 KiB, as LevelDB keeps its log."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break  # the process that writes the file has not written the rest of this piece yet
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def offline_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows that an offline run has logged, once its last record is there: another process writes them."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records: list[Any] = []
    for _ in range(600):
        records = offline_records(path)
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key): json.loads(i.value_json) for i in history.item} for history in histories]


def check_rows(rows: list[dict[str, float]], records: list[Record]) -> None:
    found = [{k: v for k, v in row.items() if k.startswith("layerwise/")} for row in rows]
    found = [row for row in found if row]
    assert [row.pop("layerwise/step") for row in found] == [record.step for record in records]
    for row, record in zip(found, records, strict=True):
        series = {name: [(0, float(value))] for name, value in row.items()}
        assert_same_series(series, {n: [(0, p[0][1])] for n, p in expected_series([record], NAMES).items()})


OFFLINE = {"mode": "offline", "project": "layers"}


def test_wandb_offline_holds_a_row_a_record(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(console="off", silent=True)
    sink = WandB(**OFFLINE, dir=str(tmp_path), settings=settings)
    records = [made_up(step) for step in (50, 100)]
    for record in records:
        sink(record)
    sink.close()
    assert wandb.run is None
    check_rows(offline_rows(tmp_path), records)


def test_wandb_takes_a_run_leaves_it_open_and_keeps_an_axis_of_its_own(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(console="off", silent=True)
    ours = wandb.init(**OFFLINE, dir=str(tmp_path), settings=settings)
    with pytest.raises(TypeError, match=r"\['project'\] would have no effect"):
        WandB(ours, project="other")
    sink = WandB(ours)
    records = [made_up(step) for step in (50, 100)]
    for record in records:
        ours.log({"loss": float(record.step)})
        sink(record)
    sink.close()
    ours.log({"loss": 0.0})
    ours.finish()
    rows = offline_rows(tmp_path)
    check_rows(rows, records)
    assert [row["loss"] for row in rows if "loss" in row] == [50.0, 100.0, 0.0]


def test_wandb_ends_its_run_before_what_else_is_done_when_the_program_ends(tmp_path: Path) -> None:
    """W&B's own end leaves nothing behind that could end a run; a monitor's comes after it."""
    pytest.importorskip("wandb")
    code = f"""
import atexit, wandb
from layerwise.sinks import Record, WandB
atexit.register(lambda: print("ended" if wandb.run is None else "not ended"))
sink = WandB(mode="offline", project="x", dir={str(tmp_path)!r}, settings=wandb.Settings(console="off", silent=True))
atexit.register(lambda: print("there" if wandb.run is not None else "not there"))
sink(Record(7, ("a",), *[[1.0]] * 6))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert ended.stdout.split("\n") == ["there", "ended", ""]
    assert [row["layerwise/step"] for row in offline_rows(tmp_path) if "layerwise/step" in row] == [7]


def test_wandb_refuses_what_is_no_run() -> None:
    with pytest.raises(TypeError, match=r"run='abc' must be a run"):
        WandB("abc")


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of MLflow's store in a folder, which recent versions allow on request only."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return tracking.MlflowClient(str(tmp_path / "mlruns"))


def history(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def test_mlflow_reads_the_metrics_back_from_a_run_that_it_ended(store: Any) -> None:
    state = random.getstate()
    sink = MLflow(tracking_uri=Path(store.tracking_uri), experiment="digits")
    assert random.getstate() == state
    records = [made_up(step) for step in (50, 100)]
    for record in records:
        sink(record)
    assert store.get_run(sink.run_id).info.status == "RUNNING"
    sink.close()
    assert store.get_run(sink.run_id).info.status == "FINISHED"
    assert store.get_run(sink.run_id).info.experiment_id == store.get_experiment_by_name("digits").experiment_id
    assert_same_series(history(store, sink.run_id), expected_series(records, FOR_MLFLOW))
    assert MLflow(tracking_uri=store.tracking_uri, experiment="digits").run_id != sink.run_id


@pytest.mark.parametrize("given", ["id", "run", "active"])
def test_mlflow_logs_to_a_run_that_is_there_and_leaves_it_open(given: str, store: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.tracking_uri)
    try:
        with mlflow.start_run() as active:
            sink = MLflow({"id": active.info.run_id, "run": active, "active": None}[given])
            sink(made_up(50))
            sink.close()
            assert sink.run_id == active.info.run_id
            assert store.get_run(sink.run_id).info.status == "RUNNING"
    finally:
        mlflow.set_tracking_uri(before)
    assert_same_series(history(store, sink.run_id), expected_series([made_up(50)], FOR_MLFLOW))


def test_mlflow_makes_a_run_where_it_is_told_to_also_beside_one_that_is_active_elsewhere(
    store: Any, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(str(tmp_path / "elsewhere"))
    try:
        with mlflow.start_run() as active:
            sink = MLflow(tracking_uri=store.tracking_uri)
            sink(made_up(50))
            sink.close()
    finally:
        mlflow.set_tracking_uri(before)
    assert sink.run_id != active.info.run_id
    assert store.get_run(sink.run_id).info.status == "FINISHED"


def test_mlflow_takes_one_call_a_record_and_one_for_each_thousand_metrics(store: Any, monkeypatch: Any) -> None:
    sink = MLflow(tracking_uri=store.tracking_uri)
    calls: list[int] = []
    original = type(store).log_batch

    def count(self: Any, run_id: str, metrics: Any = (), **options: Any) -> Any:
        calls.append(len(metrics))
        return original(self, run_id, metrics, **options)

    monkeypatch.setattr(type(store), "log_batch", count)
    sink(made_up(1))
    sink(made_up(2, tuple(map(str, range(200)))))
    assert calls == [30, 1000, 200]
    assert len(store.get_run(sink.run_id).data.metrics) == 30 + 1200


def test_mlflow_refuses_what_is_no_run() -> None:
    with pytest.raises(TypeError, match=r"run=3 must be a run of MLflow, the id of one, or None"):
        MLflow(3)


# --- All of them ------------------------------------------------------------------------------------------------------


def test_a_whole_training_arrives_everywhere_and_draws_no_random_number(
    tmp_path: Path, store: Any, trained: Any
) -> None:
    polars, wandb = pytest.importorskip("polars"), pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    called: list[Record] = []
    mlflow = MLflow(tracking_uri=store.tracking_uri)
    outlets = [
        JSONL(tmp_path / "layers.jsonl"),
        Parquet(tmp_path / "parts"),
        TensorBoard(tmp_path / "events"),
        WandB(**OFFLINE, dir=str(tmp_path), settings=wandb.Settings(console="off", silent=True)),
        mlflow,
        called.append,
    ]
    records = trained(*outlets)
    assert states == (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    assert [record.step for record in records] == [2, 4]
    assert called == records
    series = expected_series(records, ("0", "2", "4"))
    assert_same_series(events(tmp_path / "events"), series, single=True)
    assert_same_series(history(store, mlflow.run_id), series)
    rows = [row for row in offline_rows(tmp_path) if "layerwise/step" in row]
    assert all(row[name] == dict(points)[row["layerwise/step"]] for row in rows for name, points in series.items())
    assert len(rows) == 2
    lines = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    assert [line["update_norm"] for line in lines] == [record.update_norm for record in records]
    frame = polars.read_parquet(tmp_path / "parts" / "*.parquet")
    assert frame["factor"].to_list() == [*records[0].factor, *records[1].factor]


class Broken:
    """Takes one record and fails at the second."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, record: Record) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the server is gone")

    def __repr__(self) -> str:
        return "Broken(server)"


def test_a_sink_that_raises_is_dropped_with_one_message_and_training_goes_on(
    make_model, train, weights, assert_same_bits, caplog
) -> None:
    bare, model = make_model(), make_model()
    train(bare, optim.SGD(bare.parameters(), lr=0.02), 6)
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    broken, first, memory = Broken(), Memory(), Memory()
    watching = Monitor(optimizer, model, every=1, sinks=[first, broken, memory])
    with caplog.at_level(logging.ERROR, "layerwise"):
        train(model, optimizer, 6)
    assert [record.getMessage() for record in caplog.records] == [
        "sink Broken(server) raised at step 2 and gets no more records; training goes on"
    ]
    assert "the server is gone" in caplog.text
    assert broken.calls == 2
    assert [record.step for record in memory.records] == [1, 2, 3, 4, 5, 6]
    assert first.records == memory.records
    assert watching.sinks == [first, memory]
    assert_same_bits(weights(model), weights(bare))


def test_a_sink_that_was_dropped_is_closed_with_the_others_and_writes_what_it_can(
    make_model, train, tmp_path: Path
) -> None:
    polars = pytest.importorskip("polars")

    class Disturbed(Parquet):
        full = False

        def close(self) -> None:
            if self.full:
                raise OSError("disk full")
            super().close()

    model, sink = make_model(), Disturbed(tmp_path, records_per_file=2)
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    watching = Monitor(optimizer, model, every=1, sinks=[sink])
    train(model, optimizer, 3)
    sink.full = True
    train(model, optimizer, 3)
    assert watching.sinks == []
    sink.full = False
    watching.detach()
    assert sorted(set(polars.read_parquet(tmp_path / "*.parquet")["step"])) == [1, 2, 3, 4]


def test_a_sink_that_cannot_be_closed_does_not_keep_the_others_open(make_model, caplog) -> None:
    class Unclosable(Memory):
        def close(self) -> None:
            raise OSError("disk full")

    class Closing(Memory):
        closed = False

        def close(self) -> None:
            self.closed = True

    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    last = Closing()
    Monitor(optimizer, model, sinks=[Unclosable(), last]).detach()
    assert last.closed
    assert "disk full" in caplog.text


def test_ctrl_c_in_a_sink_stops_the_training(make_model, train) -> None:
    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    Monitor(optimizer, model, every=1, sinks=[stop])
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1)


MISSING = {
    "polars": (lambda folder: Parquet(folder), "Parquet needs polars, .* pip install polars"),
    "tensorboard": (lambda folder: TensorBoard(folder), "TensorBoard needs tensorboard, .* pip install tensorboard"),
    "wandb": (lambda folder: WandB(), "WandB needs wandb, .* pip install wandb"),
    "mlflow": (lambda folder: MLflow(), "MLflow needs mlflow-skinny, .* pip install mlflow-skinny"),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_package_that_is_missing_is_named_with_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = MISSING[package]
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=message):
        make(tmp_path)
