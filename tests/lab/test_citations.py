"""The constants of a page: their values, and where they come from."""

from __future__ import annotations

import pytest

from layerwise.lab.experiments import recipe
from layerwise.lab.experiments.plan import distinct, written


def constants(name: str, scale: str, **more):
    return recipe.load(name).plan(scale, **more).constants


def test_a_value_of_this_scale_stands_beside_the_original_one_with_its_own_source():
    found = constants("basodi2023-figure3", "reduced")
    assert found["epochs"] == (15, "this scale; else 150: Basodi et al. 2023, section 4")
    assert found["batch_size"] == (32, "this scale; else 128: not in the paper; kuangliu/pytorch-cifar (inferred)")
    assert found["train_count"] == (2000, "this scale; else not set")
    assert found["rate"] == (0.1, "Basodi et al. 2023, section 4")


@pytest.mark.parametrize("name", recipe.names())
def test_no_value_is_said_to_be_the_papers(name):
    for scale in recipe.load(name).content["scales"]:
        assert not any("the paper's:" in source for _, source in constants(name, scale).values())


def test_swept_values_are_all_there():
    found = constants("demo-lenet", "full", vary={"rate": [0.01, 0.05]})
    assert found["rate"] == ("0.01, 0.05", "as swept; else 0.01: Caffe lenet_solver.prototxt: base_lr")
    assert constants("basodi2023-figure3", "reduced", vary={"batch_size": [16]})["batch_size"] == (
        16,
        "as swept; else 32: this scale; else 128: not in the paper; kuangliu/pytorch-cifar (inferred)",
    )


def test_values_of_subjects_are_named_once_in_a_sweep_too():
    source = (
        "differs by subject: caffe-nesterov for “NAG”, caffe-adagrad for “AdaGrad”; else caffe-sgd: "
        "Caffe lenet_solver.prototxt"
    )
    assert constants("demo-lenet", "full")["solver"] == ("caffe-sgd, caffe-nesterov, caffe-adagrad", source)
    assert constants("demo-lenet", "full", vary={"rate": [0.01, 0.05]})["solver"][1] == source


def test_values_of_arms_are_named():
    value, source = constants("singh2015-figure1", "reduced")["iterations"]
    assert value == "7000, 6000"
    assert source.startswith(
        "differs by arm: 6000 for “plain, step at 50,000” and “layer-adaptive, step at 50,000”; else 7000: this scale; "
        "else 70000: "
    )


def test_values_are_written_as_they_are_given():
    assert distinct([[1, 2], (1, 2), 0.5, "a", None]) == [(1, 2), 0.5, "a", None]
    assert [written(value) for value in ([1, 2], 0.5, "a", None, True)] == ["[1, 2]", "0.5", "a", "none", "true"]
