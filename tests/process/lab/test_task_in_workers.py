"""A task whose data set stands in its file, in every process that draws from it; and failures that all runs share."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharded import processes

from layerwise.lab import cli

TASK = """
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

FOLDER = Path(__file__).parent
if __name__ == "__main__":
    raise RuntimeError("no process runs this file as its main module")


@dataclass
class Row:
    place: int
    count: int = 4

    def tensor(self):
        return torch.full((3,), 0.1 * (self.place % self.count))


class Outer:
    class Rows(Dataset):
        def __init__(self, change=None):
            self.change = change

        def __len__(self):
            return 64

        def __getitem__(self, place):
            assert (FOLDER / "beside.txt").read_text() == "data beside the file"
            PLACE
            return Row(place).tensor() + DRAWN


def together(rows):
    return torch.stack(rows)


def prepare(worker):
    torch.set_num_threads(1)


def task(seed, lr=0.001):
    CHANGE
    loader = DataLoader(
        Outer.Rows(change), batch_size=8, shuffle=True, collate_fn=together, worker_init_fn=prepare, num_workers=1, HOW
    )
    model = nn.Linear(3, 1)
    return {
        "model": model,
        "batches": loader,
        "loss": lambda model, batch: (model(batch) - 1.0).square().mean(),
        "metric": lambda model: {"error": float(model(torch.ones(3)) - 1.0) ** 2},
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr),
        "epochs": 1,
    }
"""

FORK, SPAWN, FORKSERVER = (f'multiprocessing_context="{how}"' for how in ("fork", "spawn", "forkserver"))
LOCAL = "change = lambda row: row"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a task and its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.txt").write_text("data beside the file", encoding="utf-8")

    def make(how: str = "", change: str = "change = None", place: str = "pass", drawn: str = "0.0") -> Path:
        path = tmp_path / "own.py"
        source = TASK.replace("HOW", how).replace("CHANGE", change).replace("PLACE", place).replace("DRAWN", drawn)
        path.write_text(source, encoding="utf-8")
        return path

    return make


def doctor(capfd, *more: str) -> tuple[int, str]:
    """Examine the task in this process; give the exit code and what was printed."""
    code = cli.main(["doctor", "own.py:task", "--steps", "2", *more])
    told = capfd.readouterr()
    return code, " ".join((told.out + told.err).split())


def compare(*more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "layerwise", "compare", "own.py:task", "--arms", "layer-adaptive"]
    return subprocess.run([*words, *more], capture_output=True, text=True, check=False)


def finals(out: str) -> dict[str, dict[str, float]]:
    """Give the result of every run, by the name of its folder."""
    read = [(path, json.loads(path.read_text())) for path in Path(out, "store").glob("*/record.json")]
    return {path.parent.name: record["finals"] for path, record in read}


# --- Workers of loaders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        FORK,
        pytest.param(SPAWN, marks=pytest.mark.full),
        pytest.param(FORKSERVER, marks=pytest.mark.full),
    ],
    ids=["fork", "spawn", "forkserver"],
)
def test_a_data_set_of_the_file_is_drawn_by_workers(write, capfd, how):
    processes.end()  # else a server that forks for other tests may be there already, which knows nothing of the file
    write(how)
    code, said = doctor(capfd)
    assert code == 0, said
    assert "problems none found" in said
    assert "does not fork" not in said


@pytest.mark.full
def test_spawned_and_forked_workers_give_the_same_numbers(write):
    path = write(SPAWN, drawn="0.01 * torch.rand(())")
    original = path.read_bytes()
    spawned = compare("--out", "spawned", "--seeds", "1")
    assert spawned.returncode == 0, spawned.stdout + spawned.stderr
    assert "Traceback" not in spawned.stderr
    # The copy is the file as it was, under its digest, and says nothing of where the file was.
    (copy,) = Path("spawned", "tasks").iterdir()
    assert copy.read_bytes() == original
    assert hashlib.sha256(original).hexdigest() in copy.name
    # Runs are done by spawned processes, whose default Python changes to spawn: a loader has the command's own default,
    # as a lambda shows, which is drawn by forked workers alone.
    forks = multiprocessing.get_context().get_start_method() == "fork"
    path = write("" if forks else FORK, change=LOCAL, drawn="0.01 * torch.rand(())")
    forked = compare("--out", "forked", "--seeds", "1", "--jobs", "1")
    assert forked.returncode == 0, forked.stdout + forked.stderr
    one, other = finals("spawned"), finals("forked")  # another file: other runs, of the same numbers
    assert sorted(final["error"] for final in one.values()) == sorted(final["error"] for final in other.values())
    assert len({final["error"] for final in one.values()}) == len(one) == len(other)
    assert one.keys().isdisjoint(other)
    # A changed copy is not trusted, and finished runs are found again without it.
    (copy,) = Path("forked", "tasks").iterdir()
    copy.write_text("raise RuntimeError('changed')\n", encoding="utf-8")
    again = compare("--out", "forked", "--seeds", "2", "--jobs", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(other)} of {2 * len(other)} runs were finished already" in again.stdout
    assert copy.read_bytes() == path.read_bytes()
    copy.unlink()
    assert cli.main(["report", "forked", "--quiet"]) == 0


def test_a_start_method_that_the_task_sets_holds_for_it_alone(write, capfd):
    default = multiprocessing.get_context().get_start_method()
    write(change=f"torch.multiprocessing.set_start_method('spawn'); {LOCAL}")
    code, said = doctor(capfd)
    assert code == 2
    assert "own.py:task: batches of epoch 1 raised AttributeError: Can't " in said
    write(change=f"assert torch.multiprocessing.get_start_method() == {default!r}")
    assert "AssertionError" not in doctor(capfd)[1]


REMEDY = "define them at the top level of own.py, without lambdas"


def test_what_cannot_be_pickled_is_told_with_the_remedy(write, capfd):
    write(SPAWN, change=LOCAL)
    code, said = doctor(capfd)
    assert code == 2
    assert said.count("Can't ") == 1
    assert REMEDY in said
    assert "task_module" not in said
    # Each remedy works: the first in the tests above, the others here.
    write(FORK, change=LOCAL)
    code, said = doctor(capfd)
    assert code == 0, said
    assert "problems none found" in said
    assert "note where Python does not fork" in said
    assert REMEDY in said
    path = write(change=LOCAL)
    path.write_text(path.read_text().replace("num_workers=1", "num_workers=0"), encoding="utf-8")
    code, said = doctor(capfd)
    assert code == 0, said
    assert "does not fork" not in said


def test_notes_are_on_the_page_and_in_the_json(write, capfd):
    write(FORK, change=LOCAL)
    assert cli.main(["doctor", "own.py:task", "--steps", "2", "--json"]) == 0
    (note,) = json.loads(capfd.readouterr().out)["notes"]
    assert REMEDY in note
    assert "1 thing to note" in Path("runs", "doctor", "own-task.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("how", [FORK, pytest.param(SPAWN, marks=pytest.mark.full)], ids=["fork", "spawn"])
def test_an_error_in_a_worker_points_into_the_file(write, capfd, how):
    path = write(how, place="raise KeyError('gone')")
    code, said = doctor(capfd)
    assert code == 2
    line = 1 + path.read_text().splitlines().index("            raise KeyError('gone')")
    assert f"own.py:task: batch 1 of epoch 1 raised KeyError: 'gone' (line {line})" in said
    assert f"File \"{path}\", line {line}, in __getitem__ raise KeyError('gone')" in said


@pytest.mark.full
def test_workers_that_are_kept_begin_anew_in_each_epoch(write, capfd):
    write(f"{FORK}, persistent_workers=True", drawn="0.01 * torch.rand(())")
    code, said = doctor(capfd)  # which refuses batches that are others when an epoch is begun a second time
    assert code == 0, said


# --- Failures that all runs share -------------------------------------------------------------------------------------


BROKEN = """
import os
import torch
from torch import nn

def task(seed, lr=0.01):
    model = nn.Linear(3, 1)

    def loss(model, batch):
        if os.environ.get("BROKEN") and seed in SEEDS:
            raise RuntimeError(f"no room for {id(model)} of seed {seed}")
        return model(batch).square().mean()

    return {"model": model, "batches": [torch.ones(2, 3)] * 2, "loss": loss, "metric": lambda m: {"error": 1.0}}
"""


@pytest.mark.parametrize("seeds", ["range(9)", "[3]"], ids=["of every run", "of one seed"])
def test_a_failure_stops_the_rest_only_where_all_share_it(tmp_path, monkeypatch, capfd, seeds):
    monkeypatch.setenv("COLUMNS", "300")  # no path is wrapped
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(BROKEN.replace("SEEDS", seeds), encoding="utf-8")
    arguments = ["compare", "own.py:task", "--seeds", "5", "--jobs", "1"]
    # The command tries the task before anything is trained; this fault shows in the workers alone.
    monkeypatch.setattr("layerwise.lab.experiments.runner.chains_left", breaking(monkeypatch))
    assert cli.main(arguments) == 1
    told = capfd.readouterr().out
    said = " ".join(told.split())
    assert said.count('File "') == 1
    assert f'File "{tmp_path / "own.py"}", line 11, in loss' in said
    if seeds == "[3]":
        assert "Not begun" not in said
        assert "Incomplete: 20 of 25 runs are finished; correct what failed" in said
        return
    # Plain and layer-adaptive of the first seed, and the first run of the second one.
    assert "FAILED task plain seed 0: UsageError: own.py:task: loss(model, batch) raised RuntimeError: no room" in said
    assert "FAILED in the same way: task layer-adaptive seed 0 and task plain seed 1." in said
    assert "Not begun: the other 22 runs, as every arm failed in the same way." in said
    assert "Incomplete: 0 of 25 runs are finished; correct what failed, then start the command again." in said
    assert "the same command goes on" not in said
    assert "Skipped" not in said
    assert "Next:" not in said
    assert len(told.splitlines()) < 20


def breaking(monkeypatch):
    """Let the workers, which begin after the chains were laid out, see the fault."""
    from layerwise.lab.experiments import runner as experiment

    before = experiment.chains_left

    def chains_left(*given):
        os.environ["BROKEN"] = "1"
        return before(*given)

    monkeypatch.setenv("BROKEN", "")
    return chains_left
