"""Weights that runs begin from: the same bits whatever happens while they are trained, and the same for all arms."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_helpers import series_of

from layerwise.lab import data
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.rules import make_rule
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training import pretraining, trial
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import StoppedError

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_plan(arms: tuple[str, ...] = ("plain", "first-block"), **constants: Any) -> Plan:
    """Lay out fine-tuning of a few updates on digits."""
    content = recipe.load("surgical-shift").content
    smoke = content["scales"]["smoke"]
    changed = {**smoke["constants"], **constants}
    scale = {**smoke, "constants": changed, "arms": list(arms), "seeds": 2}
    return recipe.Recipe("tiny", {**content, "scales": {"smoke": scale}}).plan("smoke")


def before_of(plan: Plan) -> Configuration:
    """Give the one training that all runs of a plan begin from."""
    (found,) = {run.configuration.pretraining.identity: run.configuration.pretraining for run in plan.runs}.values()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Train the weights without a break."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = pretraining.weights(before_of(tiny_plan()), tmp_path_factory.mktemp("whole"))
    torch.set_num_threads(threads)
    return found


def test_all_arms_shifts_and_seeds_share_one_training(whole):
    plan = tiny_plan(("plain", "decay-0.5", "auto-rgn", "first-block"))
    before = before_of(plan)
    assert len({run.configuration.identity for run in plan.runs}) == len(plan.runs) == 16
    at_another_rate = before_of(tiny_plan(rate=0.3, drawn_count=50, iterations=4))
    assert at_another_rate.identity == before.identity
    assert before.constants.shift is None
    assert before.constants.measured == "validation"
    assert before.constants.train_count == 2000
    assert before_of(tiny_plan(width=16)).identity != before.identity


def test_the_weights_are_those_of_the_training_and_named_by_their_checksum(tmp_path, whole):
    before = before_of(tiny_plan())
    training = Training(trial.build(before), None, before)
    summary = training.run()
    assert equal(training.trial.model.state_dict(), whole)
    assert equal(pretraining.weights(before, tmp_path), whole)
    told = (pretraining.folder_of(before, tmp_path).path / "status.json").read_text(encoding="utf-8")
    assert summary["weights"] in told
    assert summary["finals"]["validation_error"] < 80.0  # it has learned something


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("updates", [0, 10, 30])
def test_a_training_that_was_killed_goes_on_to_the_same_bits(tmp_path, whole, updates):
    before, told = before_of(tiny_plan()), []

    def kill(done: int) -> None:
        told.append(done)
        if done == updates:
            raise KilledError

    with pytest.raises(KilledError):
        pretraining.weights(before, tmp_path, progress=kill, checkpoint_seconds=0.0)
    assert max(told) == updates
    told.clear()
    assert equal(pretraining.weights(before, tmp_path, progress=told.append), whole)
    assert min(told) == max(0, updates - 1)  # the last checkpoint was written before the look at the losses
    told.clear()
    assert equal(pretraining.weights(before, tmp_path, progress=told.append), whole)
    assert not told  # it is trained once


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, whole):
    before, asked = before_of(tiny_plan()), []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 15

    with pytest.raises(StoppedError):
        pretraining.weights(before, tmp_path, stop=stop)
    assert equal(pretraining.weights(before, tmp_path), whole)


@pytest.mark.parametrize("damaged", [("checkpoint.pt",), ("checkpoint.pt", "checkpoint-before.pt")])
@pytest.mark.parametrize("how", ["a byte", "cut", "empty"])
def test_damaged_weights_are_trained_again_to_the_same_bits(tmp_path, whole, damaged, how):
    before = before_of(tiny_plan())
    pretraining.weights(before, tmp_path, checkpoint_seconds=0.0)
    place = pretraining.folder_of(before, tmp_path).path
    for name in damaged:
        content = bytearray((place / name).read_bytes())
        if how == "a byte":
            content[len(content) // 2] ^= 1
        (place / name).write_bytes({"a byte": content, "cut": content[:-9], "empty": b""}[how])
    told: list[int] = []
    assert equal(pretraining.weights(before, tmp_path, progress=told.append), whole)
    assert told[0] == (0 if len(damaged) == 2 else 39)
    assert len(list(place.glob("*.broken*"))) == len(damaged)


def test_weights_are_waited_for_while_another_process_trains_them(tmp_path, whole):
    before, told = before_of(tiny_plan()), []
    folder = pretraining.folder_of(before, tmp_path)
    found: list[dict[str, torch.Tensor]] = []
    with folder.lock():
        with pytest.raises(StoppedError):
            pretraining.weights(before, tmp_path, stop=lambda: True)
        waiting = threading.Thread(
            target=lambda: found.append(pretraining.weights(before, tmp_path, progress=told.append))
        )
        waiting.start()
        time.sleep(3 * pretraining.WAIT_SECONDS)
        assert not found
        assert not told
    waiting.join(60)
    assert equal(found[0], whole)


def test_a_training_that_diverges_is_told_and_keeps_nothing(tmp_path):
    given = {**tiny_plan().runs[0].configuration.constants.pretrained, "rate": 1e30}
    before = before_of(tiny_plan(pretrained=given))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"diverged after .* updates: give pretrained a lower rate"):
            pretraining.weights(before, tmp_path)


def test_runs_begin_from_the_weights_and_keep_what_is_frozen(tmp_path, carried_out, whole):
    outcome = carried_out(tiny_plan())
    assert outcome.complete
    before = before_of(outcome.plan)
    (place,) = (tmp_path / "runs" / pretraining.FOLDER).iterdir()
    assert place.name == before.name
    for run in outcome.plan.runs:
        made = trial.build(run.configuration)
        made.model.load_state_dict(whole)
        expected = made.evaluate(made.model, lambda: False)
        assert series_of(outcome.results.records[run.key], "test_error")[0] == (0, expected["test_error"])
    # Labels that are permuted are never those that the weights have learned: the test error tells shifted data.
    flipped = [series_of(outcome.results.records["permuted-labels", "plain", seed], "test_error") for seed in (0, 1)]
    assert min(values[0][1] for values in flipped) > 90.0


@pytest.mark.full
def test_every_arm_of_the_recipe_trains_at_smoke_scale(carried_out, whole):
    plan = recipe.load("surgical-shift").plan("smoke", seeds=1)
    outcome = carried_out(plan)
    assert outcome.complete
    assert len(plan.runs) == 2 * 17

    def factors(arm: str) -> dict[str, float]:
        return outcome.results.records["inverted", arm, 0].summary["factor"]["layers"]

    names = [f"blocks.{block}.{part}" for block in range(3) for part in ("conv", "norm")] + ["head"]
    by_depth = [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0]
    assert factors("decay-0.5") == dict(zip(names, by_depth, strict=True))
    assert factors("reversed-0.5") == {name: 0.125 / value for name, value in factors("decay-0.5").items()}
    assert sorted(factors("shuffled:decay-0.5").values()) == by_depth
    assert factors("shuffled:decay-0.5") != factors("decay-0.5")
    assert [factors("first-block")[name] for name in names] == [1, 1, 0, 0, 0, 0, 0]
    assert [factors("last-block")[name] for name in names] == [0, 0, 0, 0, 1, 1, 0]
    assert [factors("head")[name] for name in names] == [0, 0, 0, 0, 0, 0, 1]
    mean = outcome.results.records["inverted", "mean-factor:first-block", 0].configuration.rule["factors"]
    assert mean == {"*": pytest.approx(2 / 7)}
    assert 0.0 < min(factors("auto-rgn").values()) < 1.0  # it was measured, in a smoke test too
    for arm, trained in (("first-block", "blocks.0"), ("head", "head"), ("last-block", "blocks.2")):
        run = next(run for run in plan.runs if run.arm.name == arm)
        made = trial.build(run.configuration)
        made.model.load_state_dict(whole)
        Training(made, make_rule(run.configuration.rule, 0), run.configuration).run()
        for name, value in made.model.state_dict().items():
            assert torch.equal(value, whole[name]) == (not name.startswith(trained)), name


def test_a_run_goes_on_in_the_middle_as_if_it_had_never_stopped(tmp_path, carried_out, whole):
    plan = tiny_plan(("auto-rgn",))
    first = carried_out(plan, tmp_path / "first")
    run, asked = plan.runs[0], []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 52  # the training before asks 43 times, and the run 17

    chain = chains.Chain(runs=(run,), out=tmp_path / "second")
    chains.do_chain(chain, chains.Alone(stop))
    assert Runs(tmp_path / "second").find(run.configuration) is None
    chains.do_chain(chain, chains.Alone())
    again = Runs(tmp_path / "second").find(run.configuration)
    assert again.summary["weights"] == first.results.records[run.key].summary["weights"]
    assert again.summary["sessions"] == 2


def test_fine_tuning_reads_no_image_that_the_weights_were_trained_on(monkeypatch):
    """Images are numbered in their pixels, and every batch of both trainings is looked at."""
    count = 4000
    whole = data.load("digits5k")
    codes = torch.zeros((count, 1, 28, 28), dtype=torch.uint8)
    codes[:, 0, 0, 0] = (torch.arange(count) // 100).byte()
    codes[:, 0, 0, 1] = (torch.arange(count) % 100).byte()
    marked = replace(whole, train_images=codes, train_labels=torch.arange(count) % 10)
    monkeypatch.setattr(data, "load", lambda name, folder=None: marked)
    trial._source.cache_clear()

    def places(batch: torch.Tensor) -> set[int]:
        pixels = (batch[:, 0, 0, :2] * 256).round().long()
        return {int(high) * 100 + int(low) for high, low in pixels}

    def trained_on(configuration: Configuration) -> set[int]:
        return set().union(*(places(batch) for batch, _ in trial.build(configuration).batches(1, 0)))

    try:
        run = next(run for run in tiny_plan().runs if run.subject == "permuted-labels")
        validated = replace(run.configuration.constants, measured="validation")
        before = trained_on(run.configuration.pretraining)
        tuned = [trained_on(replace(run.configuration, seed=seed)) for seed in (0, 1, 10_000)]
        stream = trial.build(Configuration.make(validated))
        seen: list[set[int]] = []
        stream.model.register_forward_pre_hook(lambda module, given: seen.append(places(given[0])))
        stream.evaluate(stream.model, lambda: False)
    finally:
        trial._source.cache_clear()
    assert before == set(range(2000))
    assert all(len(each) == 60 and each <= set(range(2000, 3800)) for each in tuned)
    assert len(set(map(frozenset, tuned))) == 3
    assert set().union(*seen) == set(range(3800, 4000))


VALUES = {
    "data": "digits5k",
    "inputs": "scaled",
    "order": "shuffled",
    "batch_size": 10,
    "model": "small-cnn",
    "width": 8,
    "solver": "adamw",
    "rate": 0.01,
    "iterations": 2,
}
BEFORE = {"train_count": 100, "batch_size": 10, "solver": "adamw", "rate": 0.01, "iterations": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("weights.pt", "pretrained='weights.pt': give the constants of a run, train_count among them"),
        ({"rate": 0.1}, "train_count among them: these images of the file are left out"),
        ({**BEFORE, "model": "lenet"}, "pretrained has model='lenet': leave it out"),
        ({**BEFORE, "pretrained": BEFORE}, "pretrained has pretrained="),
        ({**BEFORE, "rates": 1}, "unknown constant 'rates'"),
        ({**BEFORE, "rate": -1.0}, "rate=-1.0: must be a finite number"),
    ],
)
def test_what_weights_cannot_come_from_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        Constants.of({**VALUES, "pretrained": given})
    assert Constants.of({**VALUES, "pretrained": BEFORE}).pretraining.train_count == 100


def test_a_solver_of_the_training_before_is_checked_beforehand():
    with pytest.raises(UsageError, match="solver='adam'"):
        trial.check(Constants.of({**VALUES, "pretrained": {**BEFORE, "solver": "adam"}}))


def test_photographs_of_a_folder_take_no_shift_and_no_weights():
    folder = {**VALUES, "data": "imagenet", "inputs": "crops", "model": "alexnet", "width": None}
    trial.check(Constants.of(folder))
    for change in ({"shift": "inverted"}, {"drawn_count": 3}, {"pretrained": BEFORE}):
        with pytest.raises(UsageError, match=r"leave .*drawn_count, shift and pretrained out"):
            trial.check(Constants.of({**folder, **change}))


def test_names_of_runs_without_weights_are_what_they_were():
    made = Configuration.make(Constants.of(VALUES))
    assert not {"pretrained", "shift", "drawn_count"} & set(made.trial)
    assert made.pretraining is None


def test_the_whole_recipe_begins_from_weights_on_images_of_its_own():
    for scale in recipe.SCALES:
        for run in recipe.load("surgical-shift").plan(scale, seeds=1).runs:
            constants = run.configuration.constants
            assert constants.pretraining is not None
            assert constants.pretraining.train_count in (30_000, 2_000)


def test_the_folder_of_the_weights_is_no_experiment(tmp_path, carried_out):
    carried_out(tiny_plan(("plain",)), tmp_path / "runs")
    assert sorted(path.name for path in Path(tmp_path / "runs").iterdir()) == [pretraining.FOLDER, "store"]
