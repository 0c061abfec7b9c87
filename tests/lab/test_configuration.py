import dataclasses

import pytest

from layerwise.lab.errors import UsageError
from layerwise.lab.runs import configuration
from layerwise.lab.runs.configuration import Configuration, Constants

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 5}, "give exactly one"),
        ({"epochs": None}, "give exactly one"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number from 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"order": "random"}, "order='random': use one of sequential, shuffled"),
        ({"order": "sequential"}, "has no epochs"),
        (
            {"order": "sequential", "epochs": None, "iterations": 5, "test_every": 1, "training_accuracy": True},
            "training_accuracy=True with order='sequential', which has no epochs: use 'shuffled'",
        ),
        ({"policy_unit": "day"}, "policy_unit='day'"),
        ({"rate": -1.0}, "rate=-1.0: must be a finite number"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rat": 1.0}, "unknown constant 'rat': use one of"),
        ({"data_digest": 5}, "data_digest=5: must be the digest of an image folder, or None"),
        ({"weight_decay": "big"}, "weight_decay='big'"),
        ({"precision": "fp16"}, "precision='fp16': use one of float32, tf32, bfloat16"),
        ({"memory_format": "nhwc"}, "memory_format='nhwc': use one of channels_last, contiguous"),
        ({"compile": 1}, "compile=1: use one of false, true"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(change, words):
    with pytest.raises(UsageError, match=words):
        Constants.of({**VALUES, **change})


def test_a_missing_constant_is_named():
    with pytest.raises(UsageError, match="'data'"):
        Constants.of({name: value for name, value in VALUES.items() if name != "data"})


def test_every_value_changes_the_identity_and_equal_ones_share_it():
    constants = Constants.of(VALUES)
    first = Configuration.make(constants, rule=None, apply="auto", seed=0)
    assert first == Configuration.make(Constants.of(VALUES), rule=None, apply="auto", seed=0)
    others = [Configuration.make(constants, rule=None, apply="auto", seed=1)]
    others.append(Configuration.make(constants, rule={"name": "LARS"}, apply="auto", seed=0))
    others.append(Configuration.make(constants, rule=None, apply="lr", seed=0))
    changed = {"rate": 0.2, "batch_size": 32, "train_count": 10, "gamma": 0.5, "epochs": 3, "training_accuracy": True}
    for name, value in changed.items():
        others.append(Configuration.make(Constants.of({**VALUES, name: value}), rule=None, apply="auto", seed=0))
    assert len({other.identity for other in (first, *others)}) == len(others) + 1


def test_a_constant_at_its_default_is_not_part_of_the_identity():
    plain = Configuration.make(Constants.of(VALUES), seed=0)
    defaults = {"momentum": 0.0, "test_batch_size": 100, "training_accuracy": False}
    written = Configuration.make(Constants.of({**VALUES, **defaults}), seed=0)
    assert plain.identity == written.identity
    assert plain.constants == Constants.of(VALUES)


def test_other_versions_are_other_runs(monkeypatch):
    made = Configuration.make(Constants.of(VALUES), seed=0)
    before = made.identity
    monkeypatch.setattr(configuration, "versions", lambda: {"layerwise": "99", "torch": "9"})
    assert made.identity != before


def test_a_configuration_survives_json():
    made = Configuration.make(Constants.of({**VALUES, "steps": (1, 2), "policy": "multistep"}), seed=3)
    again = Configuration(**made.as_json())
    assert again == made
    assert again.constants.steps == (1, 2)
    assert dataclasses.asdict(again) == made.as_json()


def test_the_name_is_made_for_people():
    made = Configuration.make(Constants.of(VALUES), rule={"name": "LARS"}, seed=7)
    assert made.name == f"lenet-digits5k-LARS-seed7-{made.identity}"


def test_constants_of_the_big_machine_leave_finished_runs_finished():
    plain = Configuration.make(Constants.of(VALUES))
    same = {"precision": "float32", "memory_format": "channels_last", "compile": "false"}
    assert Configuration.make(Constants.of({**VALUES, **same})).name == plain.name
    other = [{"precision": "tf32"}, {"memory_format": "contiguous"}, {"compile": "true"}]
    names = {Configuration.make(Constants.of({**VALUES, **change})).name for change in other}
    assert len(names | {plain.name}) == 4


@pytest.mark.parametrize("name", ["training_accuracy", "compile", "timed"])
def test_a_switch_is_read_from_a_command_line(name):
    given = {**VALUES, name: "false"}
    assert Constants.of(given) == Constants.of({**given, name: False})
    with pytest.raises(UsageError, match=f"{name}='no'"):
        Constants.of({**given, name: "no"})
