"""The training loop against loops written by hand, and against itself when it is stopped."""

import logging
import math
import re
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import polars
import pytest
import torch
from lab_helpers import hand_written_lenet, tiny_plan
from torch import nn
from torch.nn import functional

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.runs.folder import RunFolder
from layerwise.lab.training.engine import Training, skipping
from layerwise.lab.training.trial import StoppedError, Trial, build

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
    "policy": "inv",
    "gamma": 0.0001,
    "power": 0.75,
    "iterations": 12,
    "test_every": 5,
    "layers_every": 4,
    "factors_every": 1,
}
RESNET = {
    "data": "digits5k",
    "train_count": 40,
    "test_count": 20,
    "inputs": "framed",
    "order": "shuffled",
    "batch_size": 16,
    "model": "resnet10",
    "width": 8,  # oneDNN writes past its memory on machines with AVX2 alone below 8 channels
    "solver": "sgd",
    "rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "policy": "multistep",
    "policy_unit": "epoch",
    "gamma": 0.1,
    "steps": (4,),
    "epochs": 6,
    "layers_every": 2,
    "factors_every": 1,
}
NO_MOMENTUM = {"caffe-adagrad": {"momentum": 0.0}, "adamw": {"momentum": 0.0}}
AMPLIFICATION = {
    "name": "GradientAmplification",
    "selection": {"name": "Directionality", "measure": "G_prime", "threshold": 0.5, "sides": "both", "reselect": 1},
    "phases": [[2, False, 1.0], [5, True, 2.0]],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def training_of(constants, rule=None, apply="auto", folder=None, seed=0, seconds=1e9):
    configuration = Configuration.make(Constants.of(constants), rule=rule, apply=apply, seed=seed)
    made = chains.make_rule(configuration, folder, None)
    return Training(build(configuration), made, configuration, folder=folder, checkpoint_seconds=seconds)


@pytest.mark.parametrize("rule", [None, {"name": "LayerAdaptive"}])
@pytest.mark.parametrize("solver", ["caffe-sgd", "caffe-nesterov", "caffe-adagrad"])
def test_the_weights_are_those_of_a_loop_written_by_hand(solver, rule):
    training = training_of({**LENET, "solver": solver, **NO_MOMENTUM.get(solver, {})}, rule, "lr")
    # In float64: AdaGrad's first updates are signs of gradients, which rounding turns over where they are small.
    training.trial.model.double()
    single = training.trial.prepare
    training.trial.prepare = lambda batch: (single(batch)[0].double(), batch[1])
    training.trial.evaluate = lambda model, stop: {}
    training.run()
    expected = hand_written_lenet(solver, adaptive=rule is not None, iterations=12, batch_size=32, seed=0)
    for name, p in training.trial.model.named_parameters():
        assert torch.allclose(p, expected[name], rtol=1e-9, atol=1e-12), name


def test_a_run_is_the_bare_loop_to_the_bit():
    training = training_of(RESNET)
    training.run()
    configuration = Configuration.make(Constants.of(RESNET), rule=None, apply="auto", seed=0)
    trial = build(configuration)
    torch.manual_seed(0)
    for epoch in range(1, 7):
        for batch in trial.batches(epoch, 0):
            inputs, labels = trial.prepare(batch)
            trial.optimizer.zero_grad()
            functional.cross_entropy(trial.model(inputs), labels).backward()
            trial.optimizer.step()
        trial.scheduler.step()
    for ours, bare in zip(training.trial.model.state_dict().values(), trial.model.state_dict().values(), strict=True):
        assert torch.equal(ours, bare)


def test_training_accuracy_is_that_of_each_epochs_images_before_each_update():
    constants = {**RESNET, "training_accuracy": True}
    training = training_of(constants)
    summary = training.run()
    trial = build(Configuration.make(Constants.of(RESNET), rule=None, apply="auto", seed=0))
    torch.manual_seed(0)
    expected = []
    for epoch in range(1, 7):
        right = count = 0
        for batch in trial.batches(epoch, 0):  # of 16, 16 and 8 images
            inputs, labels = trial.prepare(batch)
            trial.optimizer.zero_grad()
            scores = trial.model(inputs)
            right, count = right + int((scores.argmax(1) == labels).sum()), count + len(labels)
            functional.cross_entropy(scores, labels).backward()
            trial.optimizer.step()
        trial.scheduler.step()
        expected.append(100 * right / count)
    frame = training.recorder.frame().filter(polars.col("quantity") == "training_accuracy")
    assert frame["value"].to_list() == pytest.approx(expected)
    assert frame["epoch"].to_list() == [1, 2, 3, 4, 5, 6]
    assert summary["finals"]["training_accuracy"] == pytest.approx(expected[-1])
    assert summary["weights"] == training_of(RESNET).run()["weights"]


def test_tests_and_losses_are_recorded_where_the_plan_says():
    training = training_of(LENET)
    summary = training.run()
    frame = training.recorder.frame()
    assert frame.filter(polars.col("quantity") == "test_error")["step"].to_list() == [0, 5, 10, 12]
    assert frame.filter(polars.col("quantity") == "training_loss")["step"].to_list() == list(range(1, 13))
    assert frame.filter(polars.col("quantity") == "gradient_norm")["step"].unique().sort().to_list() == [1, 4, 8, 12]
    assert summary["finals"]["test_error"] + summary["finals"]["accuracy"] == pytest.approx(100.0)
    assert summary["iterations"] == 12
    assert summary["parameters"] == 431_080
    assert summary["layers"] == ["conv1", "conv2", "ip1", "ip2"]
    rates = frame.filter((polars.col("quantity") == "rate") & (polars.col("layer") == "ip1"))["value"].to_list()
    assert rates == pytest.approx([0.01 * (1 + 1e-4 * k) ** -0.75 for k in (0, 3, 7, 11)])


def test_epochs_are_counted_tested_and_ended():
    training = training_of(RESNET, AMPLIFICATION)
    summary = training.run()
    frame = training.recorder.frame()
    tests = frame.filter(polars.col("quantity") == "test_error")
    assert tests["step"].to_list() == [3, 6, 9, 12, 15, 18]
    assert tests["epoch"].to_list() == [1, 2, 3, 4, 5, 6]
    assert summary["epochs"] == 6
    assert summary["selections"][0]["epoch"] == 3  # chosen at the end of the epoch of analysis
    factors = frame.filter(polars.col("quantity") == "factor").group_by("epoch").agg(polars.col("value").max())
    by_epoch = dict(factors.iter_rows())
    assert by_epoch[1] == by_epoch[2] == by_epoch[3] == by_epoch[6] == 1.0
    assert by_epoch[4] == 2.0
    rate = frame.filter((polars.col("quantity") == "rate") & (polars.col("layer") == "fc") & (polars.col("epoch") == 6))
    assert rate["value"].to_list()[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("constants", "rule", "apply"),
    [
        (LENET, None, "auto"),
        (LENET, {"name": "LayerAdaptive"}, "lr"),
        ({**RESNET, "training_accuracy": True}, AMPLIFICATION, "auto"),
        pytest.param(
            {**LENET, "solver": "caffe-adagrad", "momentum": 0.0},
            {"name": "LayerAdaptive"},
            "lr",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {**RESNET, "solver": "adamw", "rate": 0.01, "momentum": 0.0},
            {"name": "LARS"},
            "auto",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {**RESNET, "train_count": 50, "batch_size": 25}, {"name": "LayerAdaptive"}, "auto", marks=pytest.mark.full
        ),
    ],
    ids=["plain", "layer-adaptive", "amplification", "adagrad", "adamw and lars", "whole epochs"],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, constants, rule, apply):
    whole = training_of(constants, rule, apply)
    expected = whole.run()
    total = expected["iterations"]
    for stops in [(1,), (4,), (total - 1,), (2, 3, 5)]:
        folder = RunFolder(tmp_path / str(stops), whole_configuration(constants, rule, apply))
        folder.path.mkdir()
        for allowed in stops:
            training = training_of(constants, rule, apply, folder)
            asked = iter(range(10_000))
            with pytest.raises(StoppedError):
                training.run(stop=lambda asked=asked, allowed=allowed: next(asked) >= allowed)
        training = training_of(constants, rule, apply, folder)
        summary = training.run()
        assert summary["weights"] == expected["weights"]
        assert summary["selections"] == expected["selections"]
        assert summary["factor"] == expected["factor"]
        assert training.recorder.frame().equals(whole.recorder.frame())
        assert summary["sessions"] == len(stops) + 1


def whole_configuration(constants, rule, apply):
    return Configuration.make(Constants.of(constants), rule=rule, apply=apply, seed=0)


def test_a_checkpoint_at_every_update_changes_nothing(tmp_path):
    folder = RunFolder(tmp_path, whole_configuration(RESNET, AMPLIFICATION, "auto"))
    often = training_of(RESNET, AMPLIFICATION, folder=folder, seconds=0.0).run()
    assert often["weights"] == training_of(RESNET, AMPLIFICATION).run()["weights"]
    assert (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "checkpoint-before.pt").exists()


def test_dropout_goes_on_with_the_same_random_numbers(tmp_path):
    def make(folder=None):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trial = Trial(
            model=model,
            optimizer=optimizer,
            scheduler=None,
            schedule_unit="epoch",
            batches=skipping(lambda epoch: [torch.full((2, 4), epoch + number / 7) for number in range(5)]),
            loss=lambda network, batch: network(batch).square().mean(),
            evaluate=lambda network, stop: {"size": float(sum(p.detach().abs().sum() for p in network.parameters()))},
            iterations=None,
            epochs=3,
            epoch_length=None,
            test_every=None,
            layers_every=100,
            factors_every=100,
        )
        return Training(trial, None, Configuration(trial={}, seed=1), folder=folder)

    expected = make().run()
    folder = RunFolder(tmp_path, Configuration(trial={}, seed=1))
    asked = iter(range(100))
    with pytest.raises(StoppedError):
        make(folder).run(stop=lambda: next(asked) >= 7)
    assert make(folder).run()["weights"] == expected["weights"]


def test_a_run_told_to_stop_in_a_test_does_it_again(tmp_path):
    configuration = whole_configuration(LENET, None, "auto")
    folder = RunFolder(tmp_path, configuration)
    training = training_of(LENET, folder=folder)
    real, tested = training.trial.evaluate, []

    def interrupted(model, stop):
        tested.append(training.position.iteration)
        if len(tested) == 2:
            return real(model, lambda: True)
        return real(model, stop)

    training.trial.evaluate = interrupted
    with pytest.raises(StoppedError):
        training.run()
    assert tested == [0, 5]
    again = training_of(LENET, folder=folder)
    summary = again.run()
    assert again.recorder.frame().filter(polars.col("quantity") == "test_error")["step"].to_list() == [0, 5, 10, 12]
    assert summary["weights"] == training_of(LENET).run()["weights"]


@pytest.mark.parametrize("blow_up_at", [0, 3, 11])
def test_a_diverged_run_says_when_and_ends_within_ten_updates(blow_up_at):
    training = training_of({**LENET, "iterations": 40})
    real, calls = training.trial.loss, []

    def loss(model, batch):
        calls.append(1)
        return real(model, batch) * (math.inf if len(calls) - 1 == blow_up_at else 1.0)

    training.trial.loss = loss
    summary = training.run()
    assert summary["diverged_at"] == blow_up_at
    assert len(calls) <= blow_up_at + 10
    losses = training.recorder.frame().filter(polars.col("quantity") == "training_loss")
    assert losses["step"].to_list() == list(range(1, blow_up_at + 1))
    assert all(math.isfinite(value) for value in losses["value"])


def test_measuring_layers_changes_no_bit():
    often = training_of({**LENET, "layers_every": 1}, {"name": "LayerAdaptive"}, "lr").run()
    never = training_of({**LENET, "layers_every": 1000}, {"name": "LayerAdaptive"}, "lr").run()
    assert often["weights"] == never["weights"]


def test_an_epoch_without_a_batch_is_told():
    training = training_of(RESNET)
    training.trial.batches = lambda epoch, skip: iter(())
    with pytest.raises(ValueError, match="epoch 1 has no batch"):
        training.run()


def test_skipping_leaves_the_first_batches_out():
    batches = skipping(lambda epoch: range(epoch, epoch + 5))
    assert list(batches(10, 0)) == [10, 11, 12, 13, 14]
    assert list(batches(10, 3)) == [13, 14]


def test_the_factors_recorded_are_those_of_the_rule():
    training = training_of(LENET, {"name": "LayerAdaptive"}, "lr")
    training.run()
    frame = training.recorder.frame()
    norms = frame.filter(polars.col("quantity") == "gradient_norm")
    factors = frame.filter(polars.col("quantity") == "factor")
    joined = norms.join(factors, on=["step", "layer"], suffix="_factor")
    assert joined.height == 4 * 4
    for norm, factor in zip(joined["value"], joined["value_factor"], strict=True):
        assert factor == pytest.approx(1 + math.log(1 + 1 / norm), rel=1e-5)


def test_a_rule_object_can_be_used_as_it_is():
    configuration = whole_configuration(LENET, None, "lr")
    training = Training(build(configuration), rules.LayerAdaptive(), configuration)
    assert SimpleNamespace(**training.run()).place == "lr"


def test_runs_in_this_process_leave_the_log_level(carried_out):
    logger = logging.getLogger("layerwise")
    level = logger.level
    plan = tiny_plan()
    carried_out(replace(plan, runs=plan.runs[:1]))
    assert logger.level == level


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("metric"), "is of an earlier version of layerwise .it has no 'metric'.; remove"),
        (lambda state: state["model"].pop("conv1.bias"), "is not of this run .RuntimeError: .*; remove"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_with_says_why(tmp_path, change, words):
    folder = RunFolder(tmp_path, Configuration(trial={}, seed=0))
    with pytest.raises(StoppedError):
        training_of(LENET, folder=folder).run(stop=lambda: True)
    state = folder.load_checkpoint()
    change(state)
    folder.save_checkpoint(state)
    with pytest.raises(UsageError, match=f"{re.escape(str(tmp_path))}: the checkpoint {words} the folder"):
        training_of(LENET, folder=folder).run()


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"},
        {"memory_format": "contiguous"},
        {"compile": True},
    ],
    ids=["bfloat16", "contiguous", "compile"],
)
def test_precision_layout_and_compilation_are_near_to_float32(change, monkeypatch):
    # Traced as ever, but without the C++ compiler, which takes half a minute.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    constants = {**LENET, "iterations": 3}
    plain, changed = training_of(constants), training_of({**constants, **change})
    expected, summary = plain.run(), changed.run()
    assert summary["finals"]["test_loss"] == pytest.approx(expected["finals"]["test_loss"], rel=0.02)
    assert {p.dtype for p in changed.trial.model.parameters()} == {torch.float32}
    if change.get("precision") == "bfloat16":
        assert summary["weights"] != expected["weights"]
    assert changed.measures.names == plain.measures.names
