import pytest
import torch

from layerwise.lab import solvers
from layerwise.lab.models.lenet import LeNet


def test_the_inv_policy_is_the_formula():
    assert solvers.inv_policy(0) == 1.0
    assert solvers.inv_policy(10_000) == pytest.approx(2**-0.75, rel=1e-15)
    assert solvers.inv_policy(1799) == pytest.approx((1 + 0.0001 * 1799) ** -0.75, rel=1e-15)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_rate_follows_the_policy_and_biases_learn_at_twice_the_rate(solver):
    model = LeNet(0)
    optimizer, scheduler = solvers.build(solver, model)
    for iteration in range(4):
        weights, biases = optimizer.param_groups
        assert weights["lr"] == pytest.approx(0.01 * (1 + 1e-4 * iteration) ** -0.75, rel=1e-12)
        assert biases["lr"] == pytest.approx(2 * weights["lr"], rel=1e-12)
        assert weights["weight_decay"] == biases["weight_decay"] == 0.0005
        assert {parameter.dim() for parameter in biases["params"]} == {1}
        model(torch.rand(1, 1, 28, 28)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8


@pytest.mark.parametrize(
    ("solver", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("nag", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adagrad", torch.optim.Adagrad, {"eps": 1e-8, "lr_decay": 0, "initial_accumulator_value": 0}),
    ],
)
def test_the_solver_is_the_papers(solver, kind, expected):
    optimizer, _ = solvers.build(solver, LeNet(0))
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in expected} == expected


def test_the_control_multiplies_the_base_rate_of_weights_and_biases():
    optimizer, _ = solvers.build("sgd", LeNet(0), rate_factor=1.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.015, 0.03])


def test_an_unknown_solver_is_named_with_the_choices():
    with pytest.raises(ValueError, match="solver='adam': use one of sgd, nag, adagrad"):
        solvers.build("adam", LeNet(0))
