import math

import torch
from torch import nn

from layerwise.lab.models.lenet import LeNet, caffe_xavier_


def test_the_parameter_count_is_that_of_caffe():
    assert sum(parameter.numel() for parameter in LeNet(0).parameters()) == 431_080


def test_the_shapes_are_those_of_caffe():
    shapes = {name: tuple(parameter.shape) for name, parameter in LeNet(0).named_parameters()}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "ip1.weight": (500, 800),
        "ip1.bias": (500,),
        "ip2.weight": (10, 500),
        "ip2.bias": (10,),
    }
    assert LeNet(0)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_weights_fill_the_range_of_caffes_xavier_filler_and_biases_are_zero():
    for layer, fan_in in zip(LeNet(0).children(), (25, 500, 800, 500), strict=True):
        bound = math.sqrt(3 / fan_in)
        largest = layer.weight.abs().max().item()
        assert 0.95 * bound < largest <= bound
        # The variance of a uniform distribution on (-a, a) is a^2 / 3, so here 1 / fan_in.
        assert math.isclose(layer.weight.var().item(), 1 / fan_in, rel_tol=0.15)
        assert not layer.bias.any()


def test_the_filler_of_a_convolution_counts_its_whole_window():
    weight = caffe_xavier_(torch.empty(400, 3, 2, 2), torch.Generator().manual_seed(0))
    assert 0.99 * 0.5 < weight.abs().max().item() <= 0.5


def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone():
    first = LeNet(3)
    torch.manual_seed(99)
    second = LeNet(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.ip1.weight, LeNet(4).ip1.weight)


def test_there_is_no_relu_after_the_convolutions():
    # Convolutions made to give negative values only: a ReLU after one of them would leave nothing but zeros.
    model = LeNet(0)
    with torch.no_grad():
        model.conv1.weight.abs_()
        model.conv2.weight.abs_().neg_()
    seen = []
    model.ip1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.rand(2, 1, 28, 28))
    assert (seen[0] < 0).all()


def test_there_is_one_relu_and_it_is_between_the_inner_products():
    model = LeNet(0)
    seen = []
    model.ip2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.rand(2, 1, 28, 28))
    assert (seen[0] >= 0).all()
    assert (seen[0] == 0).any()
    assert [type(layer) for layer in model.children()] == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear]
