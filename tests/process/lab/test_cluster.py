"""Chains on Ray: the same records as local workers make, and what happens when tasks stop, die or see no folder."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_helpers import stored, tiny_plan

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import ray as cluster
from layerwise.lab.experiments.chain import Advance, Chain, Finished, Skipped
from layerwise.lab.experiments.plan import Arm, PlannedRun
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.experiments.runner import Settings, carry_out
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training.trial import Trial

pytestmark = pytest.mark.full

HERE, TESTS = Path(__file__).parent, Path(__file__).parents[2]


class Guest:
    """A task that does something odd at its fourth update."""

    def __init__(self, what):
        self.what = what

    def trial(self, configuration, device, copies=None):
        model, calls = torch.nn.Linear(2, 1), []

        def loss(network, batch):
            calls.append(1)
            if len(calls) == 4:
                if self.what == "raise":
                    raise ArithmeticError("first line\nsecond line")
                if self.what == "exit":
                    os._exit(3)
            if self.what.startswith("wait"):
                time.sleep(0.01)
            return network(batch).square().mean()

        return Trial(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            scheduler=None,
            schedule_unit="epoch",
            batches=lambda epoch, skip: iter([torch.ones(2, 2)] * (5 - skip)),
            loss=loss,
            evaluate=lambda network, stop: {"size": 1.0},
            iterations=None,
            epochs=2 if not self.what.startswith("wait") else 10_000,
            epoch_length=5,
            test_every=None,
            layers_every=100,
            factors_every=100,
        )


def guest_chain(out, what, threads=1, **more):
    configuration = Configuration(trial={"model": what}, threads=threads)
    run = PlannedRun(subject="s", arm=Arm(name=what, words=what), seed=0, configuration=configuration, task=Guest(what))
    return Chain(runs=(run,), out=out, **more)


@pytest.fixture(scope="module")
def ray():
    """Start Ray once; ``run_chains`` joins what it finds."""
    with pytest.MonkeyPatch.context() as patch:
        places = [str(HERE), str(TESTS / "lab"), str(TESTS), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))  # so that workers find this file
        imported = pytest.importorskip("ray")
        with cluster._connected(imported, 2, 1, None):
            yield imported
        assert not imported.is_initialized()


@pytest.fixture
def messages():
    return []


@pytest.fixture
def keep(messages):
    return lambda worker, message: messages.append((worker, message))


def digests(out):
    return {record.folder.name: record.summary["weights"] for record in stored(Runs(out))}


def chains_of(plan, out, **more):
    return [Chain(runs=chain, out=out, **more) for chain in plan.chains()]


@pytest.mark.dist
def test_the_records_are_those_of_local_workers_to_the_bit(tmp_path, ray, carried_out):
    plan = tiny_plan()
    local = carried_out(plan, out=tmp_path / "local")
    assert local.complete
    settings = Settings(out=tmp_path / "ray", engine="ray", jobs=2)
    outcome = carry_out(plan, settings)
    assert outcome.failures == outcome.skipped == []
    assert outcome.complete
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    for key, record in outcome.results.records.items():
        assert record.metrics().equals(local.results.records[key].metrics())
    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["store"]  # the token is gone
    again = carry_out(plan, settings)
    assert again.found == again.planned


@pytest.mark.dist
def test_without_a_shared_folder_runs_travel_both_ways(tmp_path, ray, carried_out, keep, messages, monkeypatch):
    make = tempfile.NamedTemporaryFile

    def elsewhere(*places, **options):  # no token: nothing looks shared
        return make(*places, **{**options, "dir": None} if options.get("prefix") == ".shared-" else options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", elsewhere)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    plan = tiny_plan()
    plan = replace(plan, runs=tuple(run for run in plan.runs if run.subject == "sgd"))
    carried_out(plan, out=tmp_path / "local")
    # The method's run and one control are finished here already: the others need them there.
    done = replace(plan, runs=tuple(run for run in plan.runs if run.arm.name in ("layer-adaptive", "frozen")))
    out = tmp_path / "out"
    found = digests(out) if carried_out(done, out=out) else {}
    assert len(found) == 2
    stale = Runs(out).folder(next(run for run in plan.runs if run.arm.name == "plain").configuration).path
    stale.mkdir()
    (stale / "checkpoint.pt").write_bytes(b"of an earlier attempt")
    assert cluster.run_chains(chains_of(plan, out), 2, address=None, on_message=keep) == []
    assert digests(out) == digests(tmp_path / "local")
    finished = [message.key[1] for _, message in messages if isinstance(message, Finished)]
    assert sorted(finished) == ["frozen", "layer-adaptive", "mean-factor", "plain", "shuffled"]
    assert not list(out.glob("store/*/checkpoint*")) + list(out.glob("store/*/.*.tmp"))
    assert json.loads((stale / "status.json").read_text())["state"] == "finished"
    # A run that another process here works on is left to it.
    for name in ("record.json", "metrics.parquet"):
        (stale / name).unlink()
    messages.clear()
    with Runs(out).folder(next(run for run in plan.runs if run.arm.name == "plain").configuration).lock():
        assert cluster.run_chains(chains_of(plan, out), 2, address=None, on_message=keep) == []
    (skipped,) = [message for _, message in messages if isinstance(message, Skipped)]
    assert "another process works on this run" in skipped.reason


@pytest.mark.dist
def test_what_fails_fails_alone(tmp_path, ray, keep, messages):
    (missing,) = [chain for chain in tiny_plan(data="mnist").chains() if chain[0].label == "sgd plain seed 0"]
    chains = [guest_chain(tmp_path, what) for what in ("raise", "exit", "work")]
    chains.append(Chain(runs=missing, out=tmp_path, data_dir=tmp_path / "nowhere"))
    failures = cluster.run_chains(chains, 2, address=None, on_message=keep)
    failures += [message for _, message in messages if isinstance(message, Failure)]
    named = {failure.job: failure for failure in failures}
    assert set(named) == {"s raise seed 0", "s exit seed 0", "sgd plain seed 0"}
    raised, died, lacking = named["s raise seed 0"], named["s exit seed 0"], named["sgd plain seed 0"]
    assert (raised.doing, raised.reason) == ("s raise seed 0", "ArithmeticError: first line")
    assert "second line" in raised.details
    assert died.doing == "s exit seed 0"
    assert died.reason.startswith("its process died: WorkerCrashedError: ")
    assert "nowhere" in lacking.reason
    assert "does not exist on" in lacking.reason
    assert [message.key for _, message in messages if isinstance(message, Finished)] == [("s", "work", 0)]
    assert {worker for worker, _ in messages} <= {0, 1}


@pytest.mark.dist
def test_a_stop_lets_tasks_write_checkpoints(tmp_path, ray, keep, messages):
    chains = [guest_chain(tmp_path, what) for what in ("wait", "wait too", "wait for ever")]
    began = time.monotonic()
    failures = cluster.run_chains(
        chains,
        2,
        address=None,
        on_message=keep,
        stop=lambda: {worker for worker, message in messages if isinstance(message, Advance)} == {0, 1},
    )
    assert failures == []
    assert time.monotonic() - began < 40
    folders = list((tmp_path / "store").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert (folder / "checkpoint.pt").exists()
        assert json.loads((folder / "status.json").read_text())["state"] == "stopped"


@pytest.mark.dist
def test_machines_that_would_give_other_numbers_are_refused(tmp_path, ray, keep, monkeypatch):
    monkeypatch.setattr(cluster, "versions", lambda: {"torch": "1.0"})
    (failure,) = cluster.run_chains([guest_chain(tmp_path, "work")], 1, address=None, on_message=keep)
    assert "'torch': '1.0'" in failure.reason
    assert "install the same there" in failure.reason


JOIN = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
from test_cluster import guest_chain
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import ray as cluster
if __name__ == "__main__":
    out, address = Path(sys.argv[1]), sys.argv[2]
    seen = []
    keep = lambda *told: seen.append(told)
    print(cluster.run_chains([guest_chain(out, "work")], 1, address=address, on_message=keep))
    for threads, place in ((64, address), (1, "nowhere")):
        try:
            cluster.run_chains([guest_chain(out, "wait", threads=threads)], 1, address=place, on_message=keep)
        except UsageError as error:
            print(error)
"""


@pytest.mark.dist
def test_a_cluster_is_joined_and_left(tmp_path, ray):
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    places = os.pathsep.join([str(HERE), str(TESTS / "lab"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), address],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    empty, refused, unknown = done.stdout.splitlines()
    assert empty == "[]"
    assert refused.startswith("threads=64 of a run: the largest machine of the cluster has 2 processors")
    assert unknown.startswith("address='nowhere': ")
    assert len(digests(tmp_path / "out")) == 1
    assert ray.get(ray.remote(Path.exists).remote(tmp_path)) is True  # it is still at work


def test_no_chain_needs_no_ray(keep, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cluster.run_chains([], 4, address=None, on_message=keep) == []


def test_a_missing_ray_is_told_with_the_remedy(tmp_path, keep, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"not installed: run  pip install -e '\.\[ray\]'"):
        cluster.run_chains([guest_chain(tmp_path, "work")], 1, address=None, on_message=keep)
    assert list(tmp_path.iterdir()) == []
