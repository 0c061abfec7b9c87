"""The networks that recipes name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import UsageError

if TYPE_CHECKING:  # a report names networks and does not wait for PyTorch
    from torch import nn

ACTIVATIONS = ("sigmoid", "tanh")
"""Of the networks without normalisation, ``sigmoid-mlp8`` and their like."""

NETWORKS = {
    "lenet": "LeNet",
    "cifar10-full": "cifar10_full",
    "cifar10-quick": "cifar10_quick",
    "alexnet": "AlexNet",
    "vgg19": "VGG-19",
    "small-cnn": "CNN of three blocks",
    **{f"gpt{depth}": f"GPT of {depth} block{'s' * (depth > 1)}" for depth in range(1, 13)},
    **{f"resnet{depth}": f"ResNet-{depth}" for depth in (10, 18, 34, 50, 101)},
    **{f"{kind}-mlp{depth}": f"{kind} MLP of {depth} hidden layers" for kind in ACTIVATIONS for depth in range(1, 33)},
}
"""Name -> the name in tables."""

WITH_WIDTH = ("alexnet", "vgg", "resnet", "small-cnn", "gpt", *(f"{kind}-mlp" for kind in ACTIVATIONS))
"""How the names of networks begin that come in several widths."""

OF_TEXT = "gpt"
"""How the names of networks begin that read text."""

WITH_BATCH_NORMALISATION = ("vgg", "resnet")
"""How the names of networks begin that normalise over the batch."""


HEAD_WIDTH = 32
"""Numbers of an attention head of a GPT."""


def build(
    name: str, seed: int, *, classes: int, channels: int, width: float | None = None, context: int | None = None
) -> nn.Module:
    """Build a network; a width of None is the paper's. ``context`` is the number of symbols that a text's one reads."""
    from layerwise.lab.models.alexnet import AlexNet
    from layerwise.lab.models.cifar_full import CifarFull, CifarQuick
    from layerwise.lab.models.lenet import LeNet
    from layerwise.lab.models.perceptron import Perceptron
    from layerwise.lab.models.resnet import ResNet
    from layerwise.lab.models.small_cnn import SmallCNN
    from layerwise.lab.models.transformer import TransformerLanguageModel
    from layerwise.lab.models.vgg import VGG19

    check(name, width)
    options: dict[str, Any] = {} if width is None else {"width": width}
    match name:
        case "lenet":
            return LeNet(seed)
        case "cifar10-full":
            return CifarFull(seed, classes=classes)
        case "cifar10-quick":
            return CifarQuick(seed, classes=classes)
        case "alexnet":
            return AlexNet(seed, classes=classes, **options)
        case "vgg19":
            return VGG19(seed, classes, channels=channels, **options)
        case "small-cnn":
            return SmallCNN(seed, classes, channels=channels, **options)
        case _ if name.startswith(OF_TEXT):
            sizes: Any = {"width": 128, **options, "depth": int(name.removeprefix(OF_TEXT)), "context": context or 128}
            heads = max(1, int(sizes["width"]) // HEAD_WIDTH)
            return TransformerLanguageModel(seed, vocabulary=classes, heads=heads, separate=True, tied=False, **sizes)
        case _ if name.startswith(ACTIVATIONS):
            activation, _, depth = name.partition("-mlp")
            return Perceptron(seed, classes, depth=int(depth), activation=activation, **options)
        case _:
            return ResNet(int(name.removeprefix("resnet")), seed, classes=classes, channels=channels, **options)


def check(name: str, width: float | None) -> None:
    """Refuse a network that is not known, or a width where it has only one."""
    if name not in NETWORKS:
        raise UsageError(f"model={name!r}: use one of {', '.join(NETWORKS)}")
    if width is not None and not name.startswith(WITH_WIDTH):
        raise UsageError(f"width={width!r} of model={name!r}: it has one width; leave width out")
