import pytest
import torch

from layerwise.lab.errors import UsageError
from layerwise.lab.models.lenet import LeNet
from layerwise.lab.runs.configuration import Constants
from layerwise.lab.training import caffe, networks, solvers

VALUES = {
    "data": "digits5k",
    "inputs": "scaled",
    "order": "sequential",
    "batch_size": 64,
    "model": "lenet",
    "solver": "caffe-sgd",
    "rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "policy": "inv",
    "gamma": 0.0001,
    "power": 0.75,
    "iterations": 10,
    "test_every": 10,
}
CLASSES = {
    "caffe-sgd": caffe.SGD,
    "caffe-nesterov": caffe.Nesterov,
    "caffe-adagrad": caffe.AdaGrad,
    "caffe-adadelta": caffe.AdaDelta,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}


def constants_of(solver):
    momentum = 0.0 if solver in ("caffe-adagrad", "adamw") else 0.9
    return Constants.of({**VALUES, "solver": solver, "momentum": momentum})


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_rate_follows_the_policy_and_the_rest_is_as_given(solver):
    model = LeNet(0)
    optimizer, scheduler = solvers.build(constants_of(solver), model)
    assert type(optimizer) is CLASSES[solver]
    for iteration in range(4):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.01 * (1 + 1e-4 * iteration) ** -0.75, rel=1e-12)
            assert group["weight_decay"] == 0.0005
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("solver", ["caffe-sgd", "caffe-adagrad"])
def test_caffes_solvers_know_the_rate_and_decay_of_each_blob(solver):
    model = networks.build("cifar10-full", 0, classes=10, channels=3)
    optimizer, _ = solvers.build(constants_of(solver), model)
    found = {
        name: (group["lr_mult"], group["decay_mult"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found["conv1.weight"] == (1.0, 1.0)
    assert found["conv1.bias"] == (2.0, 1.0)
    assert found["conv3.bias"] == (1.0, 1.0)
    assert found["ip1.weight"] == (1.0, 250.0)
    assert found["ip1.bias"] == (2.0, 0.0)


def test_delta_is_taken_where_it_is_given():
    made, _ = solvers.build(Constants.of({**VALUES, "solver": "caffe-adadelta", "delta": 1e-3}), LeNet(0))
    assert made.param_groups[0]["delta"] == 1e-3


def test_the_mean_of_squares_of_adamw_is_as_given():
    of_adamw = {**VALUES, "solver": "adamw", "momentum": 0.0}
    assert solvers.build(Constants.of(of_adamw), LeNet(0))[0].param_groups[0]["betas"] == (0.9, 0.999)
    made, _ = solvers.build(Constants.of({**of_adamw, "beta2": 0.95}), LeNet(0))
    assert made.param_groups[0]["betas"] == (0.9, 0.95)
    with pytest.raises(UsageError, match=r"beta2=1\.0: must be below 1"):
        solvers.build(Constants.of({**of_adamw, "beta2": 1.0}), LeNet(0))
    with pytest.raises(UsageError, match=r"beta2=0\.95 of solver='sgd': leave it out, or use 'adamw'"):
        solvers.build(Constants.of({**VALUES, "solver": "sgd", "beta2": 0.95}), LeNet(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solver": "adam"}, "solver='adam'"),
        ({"policy": "exp"}, "exp"),
        ({"solver": "caffe-adagrad"}, "momentum=0.9 with AdaGrad: must be 0"),
        ({"solver": "adamw"}, "momentum=0.9 with AdamW: must be 0"),
    ],
)
def test_what_a_solver_does_not_take_is_told(change, words):
    with pytest.raises(UsageError, match=words):
        solvers.build(Constants.of({**VALUES, **change}), LeNet(0))


@pytest.mark.parametrize(
    "name", [name for name in networks.NETWORKS if name not in ("alexnet", "resnet50", "resnet101")]
)
def test_every_network_is_built_of_its_name_and_seed(name):
    width = 4 if name.startswith(("resnet", "vgg")) else None
    channels = 1 if name == "lenet" else 3
    first, again, other = (networks.build(name, seed, classes=10, channels=channels, width=width) for seed in (0, 0, 1))
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_network_is_told():
    with pytest.raises(UsageError, match="model='lenet5': use one of lenet"):
        networks.build("lenet5", 0, classes=10, channels=1)


def test_a_width_where_there_is_only_one_is_told():
    with pytest.raises(UsageError, match="width=2 of model='lenet': it has one width"):
        networks.build("lenet", 0, classes=10, channels=1, width=2)
