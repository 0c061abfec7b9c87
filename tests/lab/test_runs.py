import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from layerwise.lab.configuration import Configuration, Constants
from layerwise.lab.recorder import Recorder
from layerwise.lab.runs import BusyError, RunFolder, Runs

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
SUMMARY = {"diverged_at": None, "iterations": 3, "finals": {"test_error": 1.0}}


@pytest.fixture
def configuration():
    return Configuration.make(Constants.of(VALUES), seed=0)


@pytest.fixture
def finished(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    recorder = Recorder()
    recorder.add("test_error", 3, 1, 1.0)
    with folder.lock():
        folder.begin({"arm": "plain"}, 1)
        folder.save_checkpoint({"number": torch.tensor(1)})
        folder.finish(recorder, dict(SUMMARY))
    return folder


def test_a_finished_run_is_found_by_its_configuration(tmp_path, configuration, finished):
    record = Runs(tmp_path).find(configuration)
    assert record is not None
    assert record.series("test_error") == [(3, 1.0)]
    assert not record.diverged
    assert record.about["labels"] == {"arm": "plain"}
    assert set(record.about["hardware"]) == {"processor", "cores", "system"}
    assert json.loads((finished.path / "status.json").read_text())["state"] == "finished"
    assert not list(finished.path.glob("checkpoint*"))
    assert [found.folder for found in Runs(tmp_path).all()] == [finished.path]


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
        flipped = content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]
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


def test_a_checkpoint_runs_nothing(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)

    class Hostile:
        def __reduce__(self):
            return os.system, ("touch hostile",)

    folder.save_checkpoint({"state": Hostile()})
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        folder.load_checkpoint()
    assert not (tmp_path / "hostile").exists()


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    script = """
    import sys, time
    from pathlib import Path
    from layerwise.lab.runs import RunFolder
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


def test_leftovers_of_a_killed_writer_are_removed(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    folder.path.mkdir(parents=True)
    (folder.path / ".record.json.123.tmp").write_bytes(b"half")
    with folder.lock():
        assert not list(folder.path.glob(".*.tmp"))


def test_a_folder_that_is_no_run_is_not_listed(tmp_path, finished):
    (tmp_path / "store" / "something").mkdir()
    (tmp_path / "store" / "something" / "run.json").write_text("[]")
    other = tmp_path / "store" / "renamed"
    other.mkdir()
    for path in finished.path.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert [found.folder for found in Runs(tmp_path).all()] == [finished.path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_named_and_the_checkpoint_before_is_kept(tmp_path, configuration):
    folder = Runs(tmp_path).folder(configuration)
    folder.save_checkpoint({"number": torch.zeros(10)})
    script = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from layerwise.lab.runs import RunFolder
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
