import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models.vgg import VGG19


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a core with another process wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parametric(model):
    return [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]


def test_modules_tensors_and_parameters_are_those_of_the_cifar_layout():
    model = VGG19(0)
    assert len(parametric(model)) == 33
    assert len(list(model.parameters())) == 66
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_040_522


def test_the_channels_are_those_of_column_e():
    convolutions = [module for module in VGG19(0, width=4).modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4] * 2 + [8] * 2 + [16] * 4 + [32] * 8
    assert {layer.kernel_size for layer in convolutions} == {(3, 3)}
    assert all(layer.bias is not None for layer in convolutions)


def test_layers_are_named_by_stage():
    names = [name for name, _ in VGG19(0, width=4).named_parameters()]
    assert names[:4] == [
        "features.conv1_1.weight",
        "features.conv1_1.bias",
        "features.bn1_1.weight",
        "features.bn1_1.bias",
    ]
    assert names[-6:] == [
        "features.conv5_4.weight",
        "features.conv5_4.bias",
        "features.bn5_4.weight",
        "features.bn5_4.bias",
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_of_32_by_32_pixels_gives_scores(batch):
    assert VGG19(0, width=4)(torch.rand(batch, 3, 32, 32)).shape == (batch, 10)
    assert VGG19(0, classes=100, width=4, channels=1)(torch.rand(batch, 1, 32, 32)).shape == (batch, 100)


def test_every_convolution_is_normalised_and_rectified_and_every_stage_is_pooled():
    model = VGG19(5, width=4).double()
    pixels = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    layers = dict(model.named_modules())
    hidden = pixels
    for stage, depth in enumerate((2, 2, 4, 4, 4), start=1):
        for position in range(1, depth + 1):
            convolution, norm = layers[f"features.conv{stage}_{position}"], layers[f"features.bn{stage}_{position}"]
            hidden = functional.conv2d(hidden, convolution.weight, convolution.bias, padding=1)
            mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
            variance = hidden.var(dim=(0, 2, 3), keepdim=True, correction=0)
            hidden = ((hidden - mean) / (variance + norm.eps).sqrt()).clamp(min=0)
        hidden = torch.maximum(hidden[..., 0::2, :], hidden[..., 1::2, :])
        hidden = torch.maximum(hidden[..., 0::2], hidden[..., 1::2])
    torch.testing.assert_close(model(pixels), hidden[:, :, 0, 0] @ model.fc.weight.T + model.fc.bias)


def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone():
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = VGG19(3, width=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = VGG19(3, width=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.fc.weight, VGG19(4, width=4).fc.weight)


def test_the_default_device_does_not_change_the_weights():
    with torch.device("meta"):
        model = VGG19(3, width=4)
    assert torch.equal(model.fc.weight, VGG19(3, width=4).fc.weight)


def test_weights_begin_as_pytorch_begins_them():
    model = VGG19(3, width=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = nn.Conv2d(3, 16, 3, padding=1)
    assert torch.equal(model.features.conv1_1.weight, first.weight)
    assert torch.equal(model.features.conv1_1.bias, first.bias)
    for layer in parametric(model):
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        else:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.9 * bound < layer.weight.abs().max().item() <= bound


def test_the_default_weights_are_drawn_layer_after_layer_at_width_64_for_colour_images():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected, inputs = [], 3
        for outputs in [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            expected += [layer.weight, layer.bias]
            inputs = outputs
        layer = nn.Linear(512, 10)
        expected += [layer.weight, layer.bias]
    drawn = [p for layer in parametric(VGG19(3)) if not isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("argument", ["classes", "width", "channels"])
def test_a_size_below_one_is_named(argument):
    with pytest.raises(UsageError, match=f"{argument}=0: use a whole number from 1"):
        VGG19(0, **{argument: 0})
