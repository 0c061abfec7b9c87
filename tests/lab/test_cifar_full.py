import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models.caffe_layers import normalise_within_channel
from layerwise.lab.models.cifar_full import CifarFull, CifarQuick
from layerwise.lab.models.lenet import LeNet

MODELS = pytest.mark.parametrize("model_class", [CifarFull, CifarQuick])

STDS = {
    CifarFull: {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "ip1": 0.01},
    CifarQuick: {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "ip1": 0.1, "ip2": 0.1},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a core with another process wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels_without_their_mean(images, dtype=torch.float32):
    """Give random bytes minus 127.5."""
    generator = torch.Generator().manual_seed(17)
    return torch.randint(0, 256, (images, 3, 32, 32), generator=generator).to(dtype) - 127.5


def with_large_activations(model):
    """Enlarge the weights until no layer leaves its input nearly as it is, and give every bias a value of its own."""
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        model.conv1.weight.mul_(1000)
        model.conv2.weight.mul_(10)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 1, generator=generator)
    return model


def slow_convolution(image, weight, bias):
    """Correlate (channels, height, width) with windows of 5 x 5 behind an edge of two zeros, in NumPy."""
    windows = sliding_window_view(np.pad(image, ((0, 0), (2, 2), (2, 2))), (5, 5), axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


def slow_pool(image, reduce):
    """Pool 3 x 3 pixels in steps of 2 as Caffe's PoolingLayer does without padding: the last window is cut short."""
    height, width = image.shape[1:]
    rows, columns = math.ceil((height - 3) / 2) + 1, math.ceil((width - 3) / 2) + 1
    pooled = np.empty((len(image), rows, columns))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(2 * row + 3, height), min(2 * column + 3, width)
            cells = image[:, 2 * row : bottom, 2 * column : right]
            assert cells[0].size == (bottom - 2 * row) * (right - 2 * column)
            pooled[:, row, column] = reduce(cells.reshape(len(image), -1), axis=1)
    return pooled


def slow_normalisation(image, size=3, alpha=5e-5, beta=0.75):
    """Compute x (1 + alpha / size^2 * sum(x^2))^(-beta) pixel by pixel, in NumPy."""
    reach = size // 2
    height, width = image.shape[1:]
    normalised = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            top, left = max(row - reach, 0), max(column - reach, 0)
            cells = image[:, top : row + reach + 1, left : column + reach + 1]
            scale = 1 + alpha * (cells**2).sum(axis=(1, 2)) / size**2
            normalised[:, row, column] = image[:, row, column] * scale**-beta
    return normalised


def rectify(image):
    return np.maximum(image, 0)


def slow_full(image, p):
    image = slow_convolution(image, p["conv1.weight"], p["conv1.bias"])
    image = slow_normalisation(rectify(slow_pool(image, np.max)))
    image = slow_convolution(image, p["conv2.weight"], p["conv2.bias"])
    image = slow_normalisation(slow_pool(rectify(image), np.mean))
    image = slow_convolution(image, p["conv3.weight"], p["conv3.bias"])
    image = slow_pool(rectify(image), np.mean)
    return p["ip1.weight"] @ image.reshape(-1) + p["ip1.bias"]


def slow_quick(image, p):
    image = rectify(slow_pool(slow_convolution(image, p["conv1.weight"], p["conv1.bias"]), np.max))
    image = slow_pool(rectify(slow_convolution(image, p["conv2.weight"], p["conv2.bias"])), np.mean)
    image = slow_pool(rectify(slow_convolution(image, p["conv3.weight"], p["conv3.bias"])), np.mean)
    hidden = p["ip1.weight"] @ image.reshape(-1) + p["ip1.bias"]
    return p["ip2.weight"] @ hidden + p["ip2.bias"]


def test_the_parameter_counts_are_those_of_caffe():
    assert sum(parameter.numel() for parameter in CifarFull(0).parameters()) == 89_578
    assert sum(parameter.numel() for parameter in CifarQuick(0).parameters()) == 145_578


def test_names_and_shapes_are_those_of_caffe():
    convolutions = {
        "conv1.weight": (32, 3, 5, 5),
        "conv1.bias": (32,),
        "conv2.weight": (32, 32, 5, 5),
        "conv2.bias": (32,),
        "conv3.weight": (64, 32, 5, 5),
        "conv3.bias": (64,),
    }
    full = convolutions | {"ip1.weight": (10, 1024), "ip1.bias": (10,)}
    quick = convolutions | {"ip1.weight": (64, 1024), "ip1.bias": (64,), "ip2.weight": (10, 64), "ip2.bias": (10,)}
    assert {name: tuple(p.shape) for name, p in CifarFull(0).named_parameters()} == full
    assert {name: tuple(p.shape) for name, p in CifarQuick(0).named_parameters()} == quick


@MODELS
def test_images_shrink_to_16_to_8_and_to_4_pixels(model_class):
    model = model_class(0)
    seen = {}
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: tuple(inputs[0].shape)}))
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    assert seen["conv1"] == (3, 3, 32, 32)
    assert seen["conv2"] == (3, 32, 16, 16)
    assert seen["conv3"] == (3, 32, 8, 8)
    assert seen["ip1"] == (3, 64 * 4 * 4)


@MODELS
def test_weights_begin_normally_distributed_and_biases_at_zero(model_class):
    model = model_class(3)
    assert {name for name, _ in model.named_children()} == set(STDS[model_class])
    for name, std in STDS[model_class].items():
        weight = model.get_parameter(f"{name}.weight").detach().double()
        count = weight.numel()
        # Four standard errors of the mean and of the standard deviation of a normal sample.
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(count)
        assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * count)
        assert math.isclose((weight.abs() < std).double().mean().item(), 0.6827, abs_tol=4 * 0.466 / math.sqrt(count))
        assert not model.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize(("model_class", "tolerance"), [(CifarFull, 1e-3), (CifarQuick, 5e-3)])
def test_the_first_loss_is_that_of_ten_equal_scores(model_class, tolerance):
    scores = model_class(0)(pixels_without_their_mean(50))
    loss = functional.cross_entropy(scores, torch.arange(50) % 10)
    assert math.isclose(loss.item(), math.log(10), abs_tol=tolerance)


@pytest.mark.parametrize(("model_class", "slow"), [(CifarFull, slow_full), (CifarQuick, slow_quick)])
@pytest.mark.parametrize("prepare", [lambda model: model, with_large_activations], ids=["fresh", "large"])
def test_the_forward_pass_is_that_of_a_slow_one_in_numpy(model_class, slow, prepare):
    model = prepare(model_class(5)).double()
    pixels = pixels_without_their_mean(1, torch.float64)
    expected = slow(pixels[0].numpy(), {name: p.detach().numpy() for name, p in model.named_parameters()})
    torch.testing.assert_close(model(pixels)[0].detach(), torch.from_numpy(expected), rtol=1e-11, atol=1e-15)


def test_the_normalisation_matters_to_the_comparison_with_numpy():
    model = with_large_activations(CifarFull(5)).double()
    seen = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda *arguments, name=name: seen.update({name: arguments}))
    model(pixels_without_their_mean(1, torch.float64))
    raw = functional.max_pool2d(seen["conv1"][2], 3, 2, ceil_mode=True).relu()
    normalised = seen["conv2"][1][0]
    assert (normalised / raw)[raw > 0].min() < 0.8
    raw = functional.avg_pool2d(seen["conv2"][2].relu(), 3, 2, ceil_mode=True)
    normalised = seen["conv3"][1][0]
    assert (normalised / raw)[raw > 0].min() < 0.99


@pytest.mark.parametrize("side", [32, 16, 8, 7, 4])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_pooling_divides_by_the_cells_inside_the_image(side, pool):
    fast, slow = {"max": (functional.max_pool2d, np.max), "mean": (functional.avg_pool2d, np.mean)}[pool]
    # Negative numbers, so that a zero outside the image would be the largest.
    images = torch.rand(2, side, side + 1, dtype=torch.float64) - 2
    expected = torch.from_numpy(slow_pool(images.numpy(), slow))
    torch.testing.assert_close(fast(images, 3, 2, ceil_mode=True), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_normalisation_within_a_channel_is_that_of_a_slow_one(size):
    images = 100 * torch.randn(4, 7, 6, dtype=torch.float64)
    fast = normalise_within_channel(images[None], size=size, alpha=0.02, beta=0.75)[0]
    slow = slow_normalisation(images.numpy(), size, alpha=0.02, beta=0.75)
    torch.testing.assert_close(fast, torch.from_numpy(slow), rtol=1e-13, atol=0)


def test_normalisation_within_a_channel_divides_by_nine_in_a_corner_too():
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    fast = normalise_within_channel(ones, size=3, alpha=9.0, beta=1.0)[0, 0]
    neighbours = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], dtype=torch.float64)
    torch.testing.assert_close(fast, 1 / (1 + neighbours))


def test_normalisation_within_a_channel_has_the_gradient_of_its_differences():
    images = (10 * torch.randn(2, 2, 4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise_within_channel(x, size=3, alpha=0.02, beta=0.75), images)


@MODELS
def test_channels_last_gives_the_same_scores_and_gradients(model_class):
    pixels = pixels_without_their_mean(4)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = with_large_activations(model_class(2)).to(memory_format=memory_format)
        scores = model(pixels.contiguous(memory_format=memory_format))
        functional.cross_entropy(scores, torch.arange(4)).backward()
        results.append((scores, [p.grad.contiguous() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_the_multipliers_of_the_full_network_are_those_of_caffe():
    assert CifarFull(0).multipliers == {
        "conv1.weight": (1.0, 1.0),
        "conv1.bias": (2.0, 1.0),
        "conv2.weight": (1.0, 1.0),
        "conv2.bias": (2.0, 1.0),
        "conv3.weight": (1.0, 1.0),
        "conv3.bias": (1.0, 1.0),
        "ip1.weight": (1.0, 250.0),
        "ip1.bias": (2.0, 0.0),
    }


def test_biases_of_the_quick_network_and_of_lenet_learn_twice_as_fast_and_all_parameters_decay():
    for model in (CifarQuick(0), LeNet(0)):
        expected = {name: (2.0 if name.endswith("bias") else 1.0, 1.0) for name, _ in model.named_parameters()}
        assert model.multipliers == expected


@MODELS
def test_every_parameter_has_multipliers_in_the_order_of_the_parameters(model_class):
    model = model_class(0)
    assert list(model.multipliers) == [name for name, _ in model.named_parameters()]


@MODELS
def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone(model_class):
    before = torch.get_rng_state()
    first = model_class(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = model_class(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = model_class(4)
    assert not any(torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in weights_of(first))


def weights_of(model):
    return [name for name, _ in model.named_parameters() if name.endswith("weight")]


@MODELS
def test_the_default_device_does_not_change_the_weights(model_class):
    with torch.device("meta"):
        model = model_class(3)
    assert torch.equal(model.ip1.weight, model_class(3).ip1.weight)


@MODELS
def test_other_numbers_of_classes(model_class):
    assert model_class(0, classes=100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    with pytest.raises(UsageError, match="classes=0: use a whole number from 1"):
        model_class(0, classes=0)
