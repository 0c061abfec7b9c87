"""Several processes that share a run against one process that does it alone."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lab_helpers import stored, tiny_plan

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments import torchrun as shared_runs
from layerwise.lab.experiments.chain import Advance, Chain, Memory
from layerwise.lab.experiments.plan import Arm, PlannedRun
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.runs.folder import RunFolder, Runs
from layerwise.lab.training import distributed
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import StoppedError, build

pytestmark = pytest.mark.full

LENET = {
    "data": "digits5k",
    "test_count": 60,
    "inputs": "scaled",
    "order": "sequential",
    "batch_size": 32,
    "model": "lenet",
    "solver": "caffe-sgd",
    "rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "iterations": 12,
    "test_every": 5,
    "layers_every": 4,
    "factors_every": 1,
}
EPOCHS = {
    **{name: value for name, value in LENET.items() if name not in ("iterations", "test_every")},
    "train_count": 39,  # batches of 16, 16 and 7: the last cannot be divided
    "test_count": 20,
    "order": "shuffled",
    "batch_size": 16,
    "epochs": 3,
    "layers_every": 2,
}
RESNET = {**EPOCHS, "inputs": "framed", "model": "resnet10", "width": 8, "solver": "sgd"}
AMPLIFICATION = {
    "name": "GradientAmplification",
    "selection": {"name": "Directionality", "measure": "G_prime", "threshold": 0.5, "sides": "both", "reselect": 1},
    "phases": [[1, False, 1.0], [3, True, 2.0]],
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def be_a_process(rank, port, folder):
    """Do every part of this file in one of two processes; runs in another process than the tests."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    distributed.FAILURE_WAIT = timedelta(seconds=8)
    processes = distributed.joined()
    done = {}
    for part in PARTS:
        done[part.__name__] = part(processes, folder)
        (folder / f"done{rank}").write_bytes(pickle.dumps(done))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Give what came of each part in each of two processes; starting them takes longer than what they do."""
    context, port, folder = multiprocessing.get_context("spawn"), free_port(), tmp_path_factory.mktemp("shared")
    started = [context.Process(target=be_a_process, args=(rank, port, folder)) for rank in range(2)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(120)
    finally:
        for process in started:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"done{rank}").read_bytes()) for rank in range(2)]


def training_of(constants, rule=None, processes=None, folder=None, *, double=True):
    configuration = Configuration.make(Constants.of(constants), rule=rule, apply="auto", seed=0)
    trial = build(configuration)
    if double:
        trial.model.double()
        single = trial.prepare
        trial.prepare = lambda batch: (single(batch)[0].double(), batch[1])
        trial.evaluate = lambda model, stop: {"test_error": float(sum(p.sum() for p in model.state_dict().values()))}
    made = chains.make_rule(configuration, folder, None)
    return Training(trial, made, configuration, folder=folder, processes=processes, checkpoint_seconds=1e9)


def outcome_of(training, **arguments):
    summary = training.run(**arguments)
    state = {name: tensor.clone() for name, tensor in training.trial.model.state_dict().items()}
    return summary, state, training.recorder.frame()


CASES = {
    "layer-adaptive": (LENET, {"name": "LayerAdaptive"}, True),
    "float32": (LENET, {"name": "LayerAdaptive"}, False),
    "epochs, amplification": (EPOCHS, AMPLIFICATION, True),
    "epochs, lars": (EPOCHS, {"name": "LARS"}, True),
}


def cases(processes, folder):
    return {
        name: outcome_of(training_of(constants, rule, processes, double=double))
        for name, (constants, rule, double) in CASES.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_numbers_of_one(shared, name):
    constants, rule, double = CASES[name]
    summary, state, frame = outcome_of(training_of(constants, rule, double=double))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if double else {"rtol": 1e-5, "atol": 1e-6}
    for rank in range(2):
        their_summary, their_state, their_frame = shared[rank]["cases"][name]
        torch.testing.assert_close(their_state, state, **tolerance)
        assert their_frame.drop("value").equals(frame.drop("value"))
        ours, theirs = torch.tensor(frame["value"].to_list()), torch.tensor(their_frame["value"].to_list())
        torch.testing.assert_close(theirs, ours, rtol=1e-5 if double else 1e-4, atol=1e-5, equal_nan=True)
        assert their_summary["processes"] == [2]
        chosen, theirs = (
            [{layer: row[2] for layer, row in choice["layers"].items()} for choice in run["selections"]]
            for run in (summary, their_summary)
        )
        assert theirs == chosen
    assert shared[0]["cases"][name][0]["weights"] == shared[1]["cases"][name][0]["weights"]


def stopped_and_gone_on(processes, folder):
    results = {}
    for name in ("float32", "epochs, amplification"):
        constants, rule, _ = CASES[name]
        whole = outcome_of(training_of(constants, rule, processes, double=False))
        configuration = Configuration.make(Constants.of(constants), rule=rule, apply="auto", seed=0)
        # Only the first process sees the folder, and only the second is told to stop.
        own = RunFolder(folder / name, configuration) if processes.first else None
        if own is not None:
            own.path.mkdir()
        for allowed in (0, 4):
            asked = iter(range(10_000))
            with pytest.raises(StoppedError):
                training_of(constants, rule, processes, own, double=False).run(
                    stop=lambda asked=asked, allowed=allowed: processes.rank == 1 and next(asked) >= allowed
                )
        again = outcome_of(training_of(constants, rule, processes, own, double=False))
        results[name] = (whole[0], again[0], whole[2].equals(again[2]))
    return results


@pytest.mark.dist
def test_a_shared_run_that_was_stopped_goes_on_to_the_same_bits(shared):
    for done in shared:
        for whole, again, same_frame in done["stopped_and_gone_on"].values():
            assert again["weights"] == whole["weights"]
            assert again["selections"] == whole["selections"]
            assert again["sessions"] == 3
            assert same_frame


class Dropping(torch.nn.Sequential):
    """Draws random numbers, and blows up where it is told."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))


def dropping(processes, folder=None, blow_up=None, loss=None, metric=""):
    from layerwise.lab.training.engine import skipping
    from layerwise.lab.training.trial import Trial

    model, calls = Dropping(), []

    def square(network, batch):
        calls.append(1)
        value = network(batch).square().mean()
        return value * float("inf") if blow_up == (processes.rank, len(calls) - 1) else value

    trial = Trial(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        scheduler=None,
        schedule_unit="epoch",
        batches=skipping(lambda epoch: [torch.full((4, 4), epoch + number / 7) for number in range(5)]),
        loss=loss or square,
        evaluate=lambda network, stop: {"size": 1.0},
        iterations=None,
        epochs=3,
        epoch_length=None,
        test_every=None,
        layers_every=100,
        factors_every=100,
        training_metric=metric,
    )
    return Training(trial, None, Configuration(trial={}, seed=1), folder=folder, processes=processes)


def random_numbers_and_divergence(processes, folder):
    def with_metric(network, batch):
        return network(batch).tanh().mean(), batch.mean() + processes.rank

    whole = dropping(processes).run()
    own = RunFolder(folder / "dropping", Configuration(trial={}, seed=1)) if processes.first else None
    asked = iter(range(100))
    with pytest.raises(StoppedError):
        dropping(processes, own).run(stop=lambda: next(asked) >= 7)
    again = dropping(processes, own).run()
    blown = dropping(processes, blow_up=(1, 3)).run()
    drifting = dropping(processes, loss=lambda network, batch: network.module(batch).sum())
    with pytest.raises(RuntimeError, match="weights of 2 processes differ"):
        drifting.run()
    draws = processes.gather(torch.rand(1).item())
    parted = dropping(processes, loss=with_metric, metric="own")
    own_part = parted.run()
    return whole["weights"], again["weights"], blown["diverged_at"], draws, own_part["finals"]["own"]


@pytest.mark.dist
def test_dropout_divergence_and_drift(shared):
    first, second = (done["random_numbers_and_divergence"] for done in shared)
    assert first == second
    whole, again, diverged_at, draws, own_part = first
    assert own_part == pytest.approx(3 + 2 / 7 + 1 / 2)  # of the last epoch, the mean over both processes
    assert whole == again
    assert diverged_at == 3  # in the second process alone, and both ended
    assert draws[0] != draws[1]


def words_of(act):
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refuse(value):
    raise UsageError(f"value={value!r}: must be another")


def collectives(processes, folder):
    rank = processes.rank
    return {
        "gather": processes.gather(rank),
        "mean": processes.mean(torch.tensor([rank, 1.0 / (rank + 1)], dtype=torch.float64)).tolist(),
        "agree": processes.agree(rank == 1, False, True),
        "from first": processes.from_first(lambda: rank),
        "error of the first": words_of(lambda: processes.from_first(lambda: refuse(rank))),
        "unsendable": words_of(lambda: processes.from_first(lambda: int.from_bytes(object()))),
        "part": processes.share((torch.arange(4), {"length": torch.tensor(7), "words": list("abcd")}), begins=True),
        "rest": processes.share(torch.arange(3), begins=False),
        "odd": words_of(lambda: processes.share(torch.arange(63), begins=True)),
        "other": words_of(lambda: processes.share((torch.arange(4), torch.arange(5)), begins=True)),
        "none": words_of(lambda: processes.share("words", begins=True)),
        "device": words_of(lambda: distributed.joined("cuda:1")),
        "batch normalisation": words_of(lambda: training_of(RESNET, processes=processes)),
    }


class Guest:
    """A task that fails at its fourth loss, in some of the processes."""

    def __init__(self, ranks):
        self.ranks = ranks

    def trial(self, configuration, device, copies=None):
        calls = []

        def loss(network, batch):
            calls.append(1)
            if len(calls) == 4 and torch.distributed.get_rank() in self.ranks:
                raise ArithmeticError("four\nlines")
            return network(batch).square().mean()

        return dropping(distributed.Processes(), loss=loss).trial


def guest_run(name, ranks):
    arm = Arm(name=name, words=name)
    return PlannedRun(
        subject="s", arm=arm, seed=0, configuration=Configuration(trial={"model": name}), task=Guest(ranks)
    )


def leading(processes, chains):
    """Lead in the first process and follow in the other; give messages, failures and an error."""
    messages, error = [], None
    try:
        if processes.first:
            shared_runs.lead(
                processes,
                chains,
                1,
                on_message=lambda worker, message: messages.append(message),
                on_failure=lambda failure: None,
                stop=lambda: False,
            )
            processes.from_first(lambda: None)
        else:
            shared_runs.follow(processes)
    except Exception as raised:
        error = type(raised).__name__
    failures = [message for message in messages if isinstance(message, Failure)]
    return [message for message in messages if not isinstance(message, Advance | Memory | Failure)], failures, error


def failures_of_all(processes, folder):
    (missing,) = tiny_plan(data="mnist", iterations=8).chains()[0]
    busy, works = guest_run("busy", ()), guest_run("works", ())
    chains = [
        Chain(runs=(run,), out=folder / "led", data_dir=folder)
        for run in (guest_run("all", (0, 1)), missing, busy, works)
    ]
    held = Runs(folder / "led").folder(busy.configuration)
    with held.lock() if processes.first else nullcontext():
        processes.gather(None)
        done = leading(processes, chains)
    if processes.first:
        status = json.loads(
            (Runs(folder / "led").folder(chains[0].runs[0].configuration).path / "status.json").read_text()
        )
        return *done, status
    return done


def failure_of_one(processes, folder):
    began = time.monotonic()
    done = leading(processes, [Chain(runs=(guest_run("one", (1,)),), out=folder / "one")])
    return *done, processes.in_step, time.monotonic() - began


PARTS = (
    cases,
    stopped_and_gone_on,
    random_numbers_and_divergence,
    collectives,
    failures_of_all,
    failure_of_one,  # the last one: the processes are out of step then
)


@pytest.mark.dist
def test_what_fails_in_all_fails_that_chain_only(shared):
    first, second = (done["failures_of_all"] for done in shared)
    messages, failures, error, status = first
    assert second == ([], [], None)
    assert error is None
    assert [(failure.job, failure.reason) for failure in failures] == [
        ("s all seed 0", "ArithmeticError: four"),
        (failures[1].job, failures[1].reason),
    ]
    assert failures[1].reason.startswith("UsageError: ")
    assert "lines" in failures[0].details
    assert status["state"] == "failed"
    skipped, finished = messages
    assert skipped.key == ("s", "busy", 0)
    assert "another process works on this run" in skipped.reason
    assert finished.key == ("s", "works", 0)


@pytest.mark.dist
def test_what_fails_in_one_ends_all(shared):
    (_, failures, error, in_step, seconds), (_, _, their_error, their_in_step, their_seconds) = (
        done["failure_of_one"] for done in shared
    )
    assert failures == []
    assert their_error == "ArithmeticError"
    assert error is not None
    assert not in_step
    assert not their_in_step
    assert seconds < 60
    assert their_seconds < 60


@pytest.mark.dist
def test_what_processes_say_to_each_other(shared):
    first, second = (done["collectives"] for done in shared)
    assert first["gather"] == second["gather"] == [0, 1]
    assert first["mean"] == second["mean"] == [0.5, 0.75]
    assert first["agree"] == second["agree"] == (True, False, True)
    assert first["from first"] == second["from first"] == 0
    assert first["error of the first"] == second["error of the first"] == ("UsageError", "value=0: must be another")
    assert first["unsendable"][0] == second["unsendable"][0] == "TypeError"
    assert [seen["part"][0].tolist() for seen in (first, second)] == [[0, 1], [2, 3]]
    assert [seen["part"][1]["words"] for seen in (first, second)] == [["a", "b"], ["c", "d"]]
    assert first["part"][1]["length"] == 7
    assert first["rest"].tolist() == second["rest"].tolist() == [0, 1, 2]
    expected = "batch_size=63 cannot be divided among processes=2: use a multiple of 2, or start 1 of them"
    assert first["odd"] == ("UsageError", expected)
    assert "shapes [(4,), (5,)] cannot be divided" in first["other"][1]
    assert "batch of type str" in first["none"][1]
    assert "device='cuda:1'" in first["device"][1]
    assert first["batch normalisation"] == second["batch normalisation"]
    assert "processes=2 on the CPU cannot share a network with batch norm" in first["batch normalisation"][1]


SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
from dataclasses import replace
from pathlib import Path
from lab_helpers import tiny_plan
from layerwise.lab.experiments import torchrun as shared_runs
from layerwise.lab.experiments.runner import Settings
if __name__ == "__main__":
    # Without delta AdaGrad's first updates are signs of gradients, which rounding turns over where they are small.
    plan = tiny_plan(batch_size=int(sys.argv[2]), iterations=int(sys.argv[3]), delta=0.01)
    if len(sys.argv) > 4:
        plan = replace(plan, runs=plan.runs[:1])
    outcome = shared_runs.run_shared(plan, Settings(out=Path(sys.argv[1])))
    if outcome is not None:
        print("found", outcome.found, "of", outcome.planned, outcome.complete, outcome.failures, outcome.skipped)
"""


def torchrun(folder, *arguments, **more):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), str(script), *map(str, arguments)]
    here = Path(__file__).parents[2]
    places = os.pathsep.join([str(here / "lab"), str(here), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": places}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.dist
def test_a_plan_with_controls_under_torchrun(tmp_path, carried_out):
    plan = tiny_plan(delta=0.01)
    alone = carried_out(plan, out=tmp_path / "alone").results.records
    for found in (0, len(plan.runs)):
        output, errors = torchrun(tmp_path, tmp_path / "shared", 64, 8).communicate(timeout=120)
        assert output == f"found {found} of {len(plan.runs)} True [] []\n", errors
    runs = Runs(tmp_path / "shared")
    assert len(list(runs.path.iterdir())) == len(plan.runs)
    for record in stored(runs):
        labels = record.about["labels"]
        expected = alone[labels["subject"], labels["arm"], record.configuration.seed]
        assert record.summary["processes"] == [2]
        for quantity, value in expected.summary["finals"].items():
            if quantity.endswith("loss"):
                assert record.summary["finals"][quantity] == pytest.approx(value, rel=1e-4)
        assert record.summary["factor"]["mean"] == pytest.approx(expected.summary["factor"]["mean"], rel=1e-4)
    output, errors = torchrun(tmp_path, tmp_path / "odd", 63, 8).communicate(timeout=60)
    assert "batch_size=63 cannot be divided among processes=2" in errors
    assert not (tmp_path / "odd").exists()


@pytest.mark.dist
def test_batch_normalisation_on_the_cpu_is_refused_before_anything_is_written(tmp_path):
    asked = ["run", "basodi2023-figure3", "--scale", "smoke", "--out", str(tmp_path / "runs")]
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "layerwise", *asked],
            env={**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert started[0].returncode == 2, errors
    assert "processes=2 on the CPU cannot share a network with batch normalisation" in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.dist
def test_an_interrupt_of_torchrun_keeps_what_was_done(tmp_path):
    out = tmp_path / "runs"
    process = torchrun(tmp_path, out, 64, 3000, "one")
    deadline = time.monotonic() + 60
    while not list(out.glob("store/*/status.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    (status,) = out.glob("store/*/status.json")
    told = json.loads(status.read_text())
    assert told["state"] == "stopped"
    assert 0 < told["iteration"] < 3000
    assert status.with_name("checkpoint.pt").exists()
