import pytest
import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models.resnet import ResNet

DEPTHS = (10, 18, 34, 50, 101)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that share a core with another process wait for each other longer than these networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("depth", "modules", "tensors", "parameters"),
    [
        (18, 41, 62, 11_173_962),
        (34, 73, 110, 21_282_122),
        (50, 107, 161, 23_520_842),
        (101, 209, 314, 42_512_970),
    ],
)
def test_modules_tensors_and_parameters_are_those_of_the_cifar_layout(depth, modules, tensors, parameters):
    model = ResNet(depth, 0)
    parametric = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    assert len(parametric) == modules
    assert len(list(model.parameters())) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_depth_counts_the_layers_outside_the_shortcuts(depth):
    layers = [
        name
        for name, module in ResNet(depth, 0, width=4).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in name
    ]
    assert len(layers) == depth


def test_layers_are_named_by_stage_and_block():
    names = [name for name, _ in ResNet(18, 0, width=4).named_parameters()]
    assert names[:6] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer1.0.bn1.weight",
        "layer1.0.bn1.bias",
    ]
    assert {"layer2.0.shortcut.conv.weight", "layer4.1.conv2.weight", "fc.weight", "fc.bias"} <= set(names)
    assert "layer1.0.shortcut.conv.weight" not in names
    assert "layer1.0.shortcut.conv.weight" in dict(ResNet(50, 0, width=4).named_parameters())


@pytest.mark.parametrize("depth", DEPTHS)
def test_any_batch_of_32_by_32_pixels_gives_scores(depth):
    model = ResNet(depth, 0, width=4)
    for batch in (1, 2, 5):
        assert model(torch.rand(batch, 3, 32, 32)).shape == (batch, 10)
    grey = ResNet(depth, 0, classes=100, width=4, channels=1)
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 100)


def normalised(hidden):
    mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
    variance = hidden.var(dim=(0, 2, 3), keepdim=True, correction=0)
    return (hidden - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("depth", "blocks", "windows"), [(10, (1, 1, 1, 1), 2), (34, (3, 4, 6, 3), 2), (50, (3, 4, 6, 3), 3)]
)
def test_the_scores_are_those_of_the_equations(depth, blocks, windows):
    # Where the stride is: in the first 3 x 3 convolution of a basic block, in the 3 x 3 convolution of a bottleneck.
    model = ResNet(depth, 5, width=4).double()
    weights = dict(model.named_parameters())
    pixels = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    hidden = normalised(functional.conv2d(pixels, weights["conv1.weight"], padding=1)).clamp(min=0)
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = hidden
            for position in range(1, windows + 1):
                weight = weights[f"{name}.conv{position}.weight"]
                here = stride if position == windows - 1 else 1
                inner = normalised(functional.conv2d(inner, weight, stride=here, padding=weight.shape[2] // 2))
                inner = inner.clamp(min=0) if position < windows else inner
            around = weights.get(f"{name}.shortcut.conv.weight")
            if around is not None:
                hidden = normalised(functional.conv2d(hidden, around, stride=stride))
            hidden = (inner + hidden).clamp(min=0)
    assert hidden.shape[2:] == (4, 4)
    expected = hidden.flatten(2).sum(2) / 16 @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(pixels), expected)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone(depth):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = ResNet(depth, 3, width=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with torch.device("meta"):
        second = ResNet(depth, 3, width=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.fc.weight, ResNet(depth, 4, width=4).fc.weight)


def test_weights_begin_as_pytorch_begins_them():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model = ResNet(18, 3, width=16)
    assert torch.equal(model.conv1.weight, first.weight)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.9 * bound < layer.weight.abs().max().item() <= bound * (1 + 1e-6)


def test_an_unknown_depth_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="depth=20: use one of 10, 18, 34, 50, 101"):
        ResNet(20, 0)


@pytest.mark.parametrize("argument", ["classes", "width", "channels"])
def test_a_size_below_one_is_named(argument):
    with pytest.raises(UsageError, match=f"{argument}=0: use a whole number from 1"):
        ResNet(18, 0, **{argument: 0})
