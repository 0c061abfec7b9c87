import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models.alexnet import SIDE, AlexNet
from layerwise.lab.models.caffe_layers import normalise_across_channels

FILLERS = {
    "conv1": (0.01, 0.0),
    "conv2": (0.01, 0.1),
    "conv3": (0.01, 0.0),
    "conv4": (0.01, 0.1),
    "conv5": (0.01, 0.1),
    "fc6": (0.005, 0.1),
    "fc7": (0.005, 0.1),
    "fc8": (0.01, 0.0),
}
SMALL = 1 / 16


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a core with another process wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def full():
    """Make the 244 MB of the full network once."""
    return AlexNet(3).eval()


def pixels_without_their_mean(images, dtype=torch.float32):
    """Give random bytes minus 127.5."""
    generator = torch.Generator().manual_seed(17)
    return torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=generator).to(dtype) - 127.5


def slow_normalisation(image, size=5, alpha=1e-4, beta=0.75):
    """Compute x (1 + alpha / size * sum(x^2))^(-beta) channel by channel, in NumPy."""
    reach = size // 2
    normalised = np.empty_like(image)
    for channel in range(len(image)):
        neighbours = image[max(channel - reach, 0) : channel + reach + 1]
        normalised[channel] = image[channel] * (1 + alpha / size * (neighbours**2).sum(axis=0)) ** -beta
    return normalised


def slow_pool(images):
    """Take the largest of 3 x 3 pixels in steps of 2; the sides are odd, so that every window is whole."""
    rows, columns = (images.shape[2] - 1) // 2, (images.shape[3] - 1) // 2
    return torch.stack(
        [images[..., i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)]
    ).amax(0)


def in_two_halves(images, layer, padding):
    """Convolve the first half of the channels with the first half of the filters, and so the second."""
    halves = zip(images.chunk(2, 1), layer.weight.chunk(2), layer.bias.chunk(2), strict=True)
    return torch.cat([functional.conv2d(*half, padding=padding) for half in halves], 1)


def test_the_parameter_count_is_that_of_caffe(full):
    assert sum(parameter.numel() for parameter in full.parameters()) == 60_965_224


def test_the_shapes_are_those_of_caffe(full):
    assert {name: tuple(p.shape) for name, p in full.named_parameters() if name.endswith("weight")} == {
        "conv1.weight": (96, 3, 11, 11),
        "conv2.weight": (256, 48, 5, 5),
        "conv3.weight": (384, 256, 3, 3),
        "conv4.weight": (384, 192, 3, 3),
        "conv5.weight": (256, 192, 3, 3),
        "fc6.weight": (4096, 9216),
        "fc7.weight": (4096, 4096),
        "fc8.weight": (1000, 4096),
    }


def test_weights_begin_normally_distributed_and_biases_at_a_constant(full):
    assert [name for name, _ in full.named_children()] == list(FILLERS)
    for name, (std, bias) in FILLERS.items():
        weight = full.get_parameter(f"{name}.weight").detach()
        # Sums of 38 million float32 numbers lose digits; the first two million show the distribution as well.
        sample = weight.flatten()[:2_000_000].double()
        # Four standard errors of the mean and of the standard deviation of a normal sample.
        assert abs(sample.mean().item()) < 4 * std / math.sqrt(sample.numel())
        assert abs(sample.std().item() / std - 1) < 4 / math.sqrt(2 * sample.numel())
        assert (full.get_parameter(f"{name}.bias") == bias).all()


def test_two_images_pass_through_55_27_13_and_6_pixels_to_a_loss_of_a_thousand_equal_scores(full):
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0].shape[1:], o.shape[1:])}))
        for name, layer in full.named_children()
    ]
    with torch.no_grad():
        scores = full(pixels_without_their_mean(2))
    for hook in hooks:
        hook.remove()
    assert seen == {
        "conv1": ((3, 227, 227), (96, 55, 55)),
        "conv2": ((96, 27, 27), (256, 27, 27)),
        "conv3": ((256, 13, 13), (384, 13, 13)),
        "conv4": ((384, 13, 13), (384, 13, 13)),
        "conv5": ((384, 13, 13), (256, 13, 13)),
        "fc6": ((256 * 6 * 6,), (4096,)),
        "fc7": ((4096,), (4096,)),
        "fc8": ((4096,), (1000,)),
    }
    assert scores.shape == (2, 1000)
    # Scores of standard deviation s add s^2 / 2 on average; s is about 0.3 here.
    loss = functional.cross_entropy(scores.expand(500, 2, 1000).flatten(0, 1), torch.arange(1000))
    assert math.isclose(loss.item(), math.log(1000), abs_tol=0.1)


def test_the_forward_pass_is_that_of_a_slow_one():
    model = AlexNet(5, classes=7, width=SMALL).double().eval()
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        # Activations so large that the normalisation changes them, and biases that differ.
        model.conv1.weight.mul_(5)
        model.conv2.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 1, generator=generator)
        pixels = pixels_without_their_mean(1, torch.float64)
        hidden = functional.conv2d(pixels, model.conv1.weight, model.conv1.bias, stride=4).clamp(min=0)
        normalised = torch.from_numpy(slow_normalisation(hidden[0].numpy()))[None]
        assert (normalised / hidden)[hidden > 0].min() < 0.8
        hidden = in_two_halves(slow_pool(normalised), model.conv2, 2).clamp(min=0)
        normalised = torch.from_numpy(slow_normalisation(hidden[0].numpy()))[None]
        assert (normalised / hidden)[hidden > 0].min() < 0.8
        hidden = functional.conv2d(slow_pool(normalised), model.conv3.weight, model.conv3.bias, padding=1)
        hidden = in_two_halves(hidden.clamp(min=0), model.conv4, 1).clamp(min=0)
        hidden = slow_pool(in_two_halves(hidden, model.conv5, 1).clamp(min=0)).reshape(1, -1)
        for layer in (model.fc6, model.fc7):
            hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
        expected = hidden @ model.fc8.weight.T + model.fc8.bias
        torch.testing.assert_close(model(pixels), expected, rtol=1e-11, atol=1e-12)


def test_normalisation_across_channels_is_that_of_a_slow_one():
    images = 100 * torch.randn(9, 4, 5, dtype=torch.float64)
    fast = normalise_across_channels(images[None], size=5, alpha=0.02, beta=0.75)[0]
    torch.testing.assert_close(fast, torch.from_numpy(slow_normalisation(images.numpy(), 5, 0.02)), rtol=1e-13, atol=0)


def test_normalisation_across_channels_divides_by_five_at_the_ends_too():
    ones = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    fast = normalise_across_channels(ones, size=5, alpha=5.0, beta=1.0).flatten()
    torch.testing.assert_close(fast, 1 / (1 + torch.tensor([3, 4, 5, 5, 4, 3], dtype=torch.float64)))


def test_normalisation_across_channels_has_the_gradient_of_its_differences():
    images = (10 * torch.randn(1, 7, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise_across_channels(x, size=5, alpha=0.02, beta=0.75), images)


def test_half_of_the_units_of_fc6_and_fc7_are_dropped_in_training_and_none_in_evaluation():
    model = AlexNet(0, width=SMALL)
    seen = {}
    for name in ("fc6", "fc7", "fc8"):
        model.get_submodule(name).register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0], o)}))
    pixels = pixels_without_their_mean(4)
    model(pixels)
    for first, second in (("fc6", "fc7"), ("fc7", "fc8")):
        before, after = seen[first][1].relu(), seen[second][0]
        alive = after[before > 0] > 0
        assert 0.35 < alive.float().mean() < 0.65
        torch.testing.assert_close(after[after > 0], 2 * before[after > 0])
    model.eval()
    torch.testing.assert_close(model(pixels), model(pixels), rtol=0, atol=0)
    assert torch.equal(seen["fc6"][1].relu(), seen["fc7"][0])


def test_channels_last_gives_the_same_scores_and_gradients():
    pixels = pixels_without_their_mean(2)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = AlexNet(2, classes=10, width=SMALL).to(memory_format=memory_format).eval()
        scores = model(pixels.contiguous(memory_format=memory_format))
        functional.cross_entropy(scores, torch.arange(2)).backward()
        results.append((scores, [p.grad.contiguous() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_biases_learn_twice_as_fast_and_do_not_decay(full):
    assert full.multipliers == {
        name: (2.0, 0.0) if name.endswith("bias") else (1.0, 1.0) for name, _ in full.named_parameters()
    }
    assert list(full.multipliers) == [name for name, _ in full.named_parameters()]


def test_width_multiplies_all_outputs_but_the_classes():
    model = AlexNet(0, classes=20, width=0.125)
    outputs = {name: layer.weight.shape[0] for name, layer in model.named_children()}
    assert outputs == {
        "conv1": 12,
        "conv2": 32,
        "conv3": 48,
        "conv4": 48,
        "conv5": 32,
        "fc6": 512,
        "fc7": 512,
        "fc8": 20,
    }
    assert AlexNet(0, width=SMALL)(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 1000)


@pytest.mark.parametrize("width", [0, -1.0, 0.3, 1 / 32, math.nan, math.inf])
def test_a_width_that_leaves_no_two_halves_is_named(width):
    with pytest.raises(UsageError, match=f"width={width}: use a positive multiple of 1/16"):
        AlexNet(0, width=width)


def test_no_classes_are_refused():
    with pytest.raises(UsageError, match="classes=0: use a whole number from 1"):
        AlexNet(0, classes=0)


def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = AlexNet(3, width=SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with torch.device("meta"):
        second = AlexNet(3, width=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = AlexNet(4, width=SMALL)
    assert not any(torch.equal(first.get_parameter(f"{n}.weight"), other.get_parameter(f"{n}.weight")) for n in FILLERS)
