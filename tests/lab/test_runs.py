import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from lab_helpers import series_of, stored

from layerwise.lab.runs import store
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.runs.folder import MAGIC, BusyError, RunFolder, Runs
from layerwise.lab.runs.record import Recorder

VALUES = {
    "data": "digits5k",
    "inputs": "scaled",
    "order": "shuffled",
    "batch_size": 64,
    "model": "lenet",
    "solver": "sgd",
    "rate": 0.1,
    "epochs": 2,
}
SUMMARY = {
    "diverged_at": None,
    "iterations": 3,
    "finals": {"test_error": 1.0},
    "parameters": 10,
    "layers": ["fc"],
    "seconds": 2.0,
    "test_seconds": 1.0,
    "factor": {"mean": 1.0, "spread": 1.0, "layers": {}},
}


@pytest.fixture
def configuration():
    return Configuration.make(Constants.of(VALUES), seed=0)


@pytest.fixture
def finished(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    recorder = Recorder()
    recorder.add("test_error", 3, 1, 1.0)
    with folder.lock():
        folder.begin({"arm": "plain"})
        folder.save_checkpoint({"number": torch.tensor(1)})
        folder.finish(recorder, dict(SUMMARY))
    return folder


def test_a_finished_run_is_found_by_its_configuration(tmp_path, configuration, finished):
    record = Runs(tmp_path).find(configuration)
    assert record is not None
    assert series_of(record, "test_error") == [(3, 1.0)]
    assert not record.diverged
    assert record.about["labels"] == {"arm": "plain"}
    assert set(record.about["hardware"]) == {"processor", "cores", "system"}
    assert json.loads((finished.path / "status.json").read_text())["state"] == "finished"
    assert not list(finished.path.glob("checkpoint*"))
    assert [found.folder for found in stored(Runs(tmp_path))] == [finished.path]


def test_another_configuration_is_not_found(tmp_path, finished):
    assert Runs(tmp_path).find(Configuration.make(Constants.of(VALUES), seed=1)) is None


@pytest.mark.parametrize("name", ["record.json", "run.json", "metrics.parquet"])
@pytest.mark.parametrize("how", ["empty", "cut", "turned bit", "gone"])
def test_a_broken_file_is_named_and_kept_aside_and_the_run_is_not_taken_for_finished(
    tmp_path, configuration, finished, name, how
):
    path = finished.path / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 0x01]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": content[:middle], "turned bit": flipped}[how])
    runs = Runs(tmp_path)
    if runs.find(configuration) is not None:
        pytest.fail("a damaged run was taken for finished")
    if how != "gone":
        assert path in runs.set_aside
        assert path.with_name(name + ".broken").exists()


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    assert folder.load_checkpoint() is None
    for number in (1, 2, 3):
        folder.save_checkpoint({"number": torch.tensor(number)})
    assert folder.load_checkpoint() == {"number": torch.tensor(3)}
    path = folder.path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-7] + b"1234567")
    assert folder.load_checkpoint() == {"number": torch.tensor(2)}
    assert folder.set_aside == [path]
    (folder.path / "checkpoint-before.pt").write_bytes(b"")
    assert folder.load_checkpoint() is None


def rows_of(recorder):
    return recorder.state_dict()["rows"].tolist()


def checkpoints_of(folder, count):
    """Write checkpoints of a growing record; give the record after each."""
    recorder, states = Recorder(), []
    for number in range(count):
        recorder.add("training_loss", number + 1, 1, 1.0 / (number + 1))
        folder.save_checkpoint({"number": number, "recorder": recorder.state_dict()})
        states.append(rows_of(recorder))
    return recorder, states


def loaded(folder):
    state = folder.load_checkpoint()
    return state["number"], state["recorder"]["rows"].tolist()


def test_a_checkpoint_only_adds_what_is_new_to_the_record(tmp_path, configuration, monkeypatch):
    folder = Runs(tmp_path).folder(configuration)
    recorder, _ = checkpoints_of(folder, 1)
    for step in range(2, 20_000):
        recorder.add("training_loss", step, 1, 0.5)
    written = []
    real = store.write_whole
    monkeypatch.setattr(store, "write_whole", lambda path, data: (written.append(len(data)), real(path, data)))
    folder.save_checkpoint({"number": 1, "recorder": recorder.state_dict()})
    recorder.add("training_loss", 20_000, 1, 0.5)
    folder.save_checkpoint({"number": 2, "recorder": recorder.state_dict()})
    assert max(written) < 5000
    assert (folder.path / "checkpoint-rows.bin").stat().st_size == 24 * 20_000
    assert loaded(Runs(tmp_path).folder(configuration)) == (2, rows_of(recorder))


@pytest.mark.parametrize("left", [b"", b"half a row", bytes(1000)])
def test_rows_behind_those_of_the_checkpoint_are_written_again(tmp_path, configuration, left):
    """A process may be killed after it has added rows and before its checkpoint is in place."""
    recorder, states = checkpoints_of(Runs(tmp_path).folder(configuration), 2)
    path = Runs(tmp_path).folder(configuration).path / "checkpoint-rows.bin"
    path.write_bytes(path.read_bytes() + left)
    folder = Runs(tmp_path).folder(configuration)
    assert loaded(folder) == (1, states[1])
    recorder.add("training_loss", 3, 1, 0.25)
    folder.save_checkpoint({"number": 2, "recorder": recorder.state_dict()})
    assert path.stat().st_size == 24 * 3
    assert loaded(Runs(tmp_path).folder(configuration)) == (2, rows_of(recorder))


@pytest.mark.parametrize("how", ["turned bit", "cut", "gone", "checkpoint"])
def test_a_record_that_is_damaged_is_gone_on_with_from_the_checkpoint_before(tmp_path, configuration, how):
    folder = Runs(tmp_path).folder(configuration)
    recorder, states = checkpoints_of(folder, 3)
    path = folder.path / "checkpoint-rows.bin"
    content = path.read_bytes()
    if how == "turned bit":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "cut":
        path.write_bytes(content[:50])
    elif how == "gone":
        path.unlink()
    else:
        (folder.path / "checkpoint.pt").write_bytes(b"")
    again = Runs(tmp_path).folder(configuration)
    if how == "gone":
        assert again.load_checkpoint() is None
        return
    assert loaded(again) == (1, states[1])
    assert again.set_aside == [folder.path / "checkpoint.pt"]
    again.save_checkpoint({"number": 2, "recorder": recorder.state_dict()})
    assert path.read_bytes() == content
    assert loaded(Runs(tmp_path).folder(configuration)) == (2, states[2])


@pytest.mark.parametrize("how", ["gone", "cut", "a link"])
def test_a_record_that_is_lost_while_the_run_is_at_work_is_written_anew(tmp_path, configuration, how):
    folder = Runs(tmp_path).folder(configuration)
    recorder, _ = checkpoints_of(folder, 2)
    path, other = folder.path / "checkpoint-rows.bin", tmp_path / "other"
    other.write_bytes(bytes(1000))
    path.write_bytes(b"") if how == "cut" else path.unlink()
    if how == "a link":
        path.symlink_to(other)
    recorder.add("training_loss", 3, 1, 0.25)
    folder.save_checkpoint({"number": 2, "recorder": recorder.state_dict()})
    assert loaded(Runs(tmp_path).folder(configuration)) == (2, rows_of(recorder))
    assert other.read_bytes() == bytes(1000)


def test_a_checkpoint_runs_nothing(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)

    class Hostile:
        def __reduce__(self):
            return os.system, ("touch hostile",)

    with pytest.raises(TypeError, match=r"state\['state'\] is of type Hostile, which a checkpoint cannot hold safely"):
        folder.save_checkpoint({"state": Hostile()})
    # One that somebody else has written, with a right checksum.
    buffer = io.BytesIO()
    torch.save({"state": Hostile()}, buffer)
    content = buffer.getvalue()
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "checkpoint.pt").write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        folder.load_checkpoint()
    assert not (tmp_path / "hostile").exists()


def test_numbers_of_numpy_in_a_state_are_saved_as_python_has_them(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    state = {"groups": [{"lr": np.float64(0.1), "betas": (np.float32(0.5), 1)}], "step": np.int64(3), "done": np.True_}
    folder.save_checkpoint(state)
    assert folder.load_checkpoint() == {"groups": [{"lr": 0.1, "betas": (0.5, 1)}], "step": 3, "done": True}


def test_any_bit_of_a_record_counts(tmp_path, configuration, finished):
    path = finished.path / "record.json"
    path.write_text(path.read_text().replace('"test_error": 1.0', '"test_error": 2.0'))
    assert Runs(tmp_path).find(configuration) is None
    assert path.with_name("record.json.broken").exists()


def test_a_damaged_run_file_does_not_stop_the_run_from_being_done_again(tmp_path, configuration, finished):
    path = finished.path / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    folder = Runs(tmp_path).folder(configuration)
    assert folder.record() is None
    with folder.lock():
        folder.begin({})
        folder.finish(Recorder(), dict(SUMMARY))
    assert folder.record() is not None


def test_files_copied_from_another_run_are_not_taken(tmp_path, finished):
    other = Runs(tmp_path).folder(Configuration.make(Constants.of(VALUES), seed=1))
    other.path.mkdir()
    for path in finished.path.iterdir():
        (other.path / path.name).write_bytes(path.read_bytes())
    assert other.record() is None
    assert (other.path / "run.json.broken").exists()
    assert finished.record() is not None


def test_a_reader_moves_nothing_while_the_run_is_at_work(tmp_path, configuration, finished):
    path = finished.path / "metrics.parquet"
    path.write_bytes(b"half")
    script = """
    import sys, time
    from pathlib import Path
    from layerwise.lab.runs.folder import RunFolder
    with RunFolder(Path(sys.argv[1]), None).lock():
        print("locked", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(finished.path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        runs = Runs(tmp_path)
        assert runs.find(configuration) is None
        assert runs.set_aside == []
        assert path.exists()
    finally:
        other.kill()
        other.communicate()
    assert Runs(tmp_path).find(configuration) is None
    assert not path.exists()


def test_what_a_kill_after_the_record_left_is_tidied(tmp_path, configuration, finished):
    (finished.path / "checkpoint.pt").write_bytes(b"left")
    (finished.path / "status.json").unlink()
    with finished.lock():
        finished.tidy(finished.record().summary)
    assert not (finished.path / "checkpoint.pt").exists()
    assert json.loads((finished.path / "status.json").read_text())["state"] == "finished"


def test_a_run_that_goes_on_on_another_machine_names_both(tmp_path, configuration, monkeypatch):
    folder = Runs(tmp_path).folder(configuration)
    first = store.hardware()
    with folder.lock():
        folder.begin({})
        monkeypatch.setattr(store, "hardware", lambda: {**first, "cores": 64})
        assert folder.begin({})["later"] == [{**first, "cores": 64}]
        assert folder.begin({})["hardware"] == first


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    script = """
    import sys, time
    from pathlib import Path
    from layerwise.lab.runs.folder import RunFolder
    with RunFolder(Path(sys.argv[1]), None).lock():
        print("locked", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder.path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match="another process"), folder.lock():
            pass
    finally:
        other.kill()
        other.communicate()
    with folder.lock():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_from_the_one_that_was_killed_holds_no_lock(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    script = """
    import os, sys, time
    from pathlib import Path
    from layerwise.lab.runs.folder import RunFolder
    with RunFolder(Path(sys.argv[1]), None).lock():
        if os.fork() == 0:
            print(os.getpid(), flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder.path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(BusyError), folder.lock():
            pass
        owner.kill()
        owner.wait()
        os.kill(child, 0)
        with folder.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    folder.path.mkdir(parents=True)
    (folder.path / ".record.json.123.tmp").write_bytes(b"half")
    with folder.lock():
        assert not list(folder.path.glob(".*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_named_and_the_checkpoint_before_is_kept(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    folder.save_checkpoint({"number": torch.zeros(10)})
    script = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from layerwise.lab.runs.folder import RunFolder
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        RunFolder(Path(sys.argv[1]), None).save_checkpoint({"number": torch.ones(10_000)})
    except OSError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder.path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "File too large" in said
    assert "checkpoint.pt" in said
    assert torch.equal(folder.load_checkpoint()["number"], torch.zeros(10))
    assert not list(folder.path.glob(".*.tmp"))
    assert isinstance(RunFolder(folder.path, configuration).record(), type(None))
