"""The networks that recipes name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from layerwise.lab.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def _lenet(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
    from layerwise.lab.models.lenet import LeNet

    return LeNet(seed)


def _cifar_full(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
    from layerwise.lab.models.cifar_full import CifarFull

    return CifarFull(seed, classes=classes)


def _cifar_quick(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
    from layerwise.lab.models.cifar_full import CifarQuick

    return CifarQuick(seed, classes=classes)


def _alexnet(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
    from layerwise.lab.models.alexnet import AlexNet

    return AlexNet(seed, classes=classes, **width)


def _vgg19(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
    from layerwise.lab.models.vgg import VGG19

    return VGG19(seed, classes, channels=channels, **width)


def _resnet(depth: int) -> Callable[..., nn.Module]:
    def build(seed: int, classes: int, channels: int, **width: Any) -> nn.Module:
        from layerwise.lab.models.resnet import ResNet

        return ResNet(depth, seed, classes=classes, channels=channels, **width)

    return build


NETWORKS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "lenet": ("LeNet", _lenet),
    "cifar10-full": ("cifar10_full", _cifar_full),
    "cifar10-quick": ("cifar10_quick", _cifar_quick),
    "alexnet": ("AlexNet", _alexnet),
    "vgg19": ("VGG-19", _vgg19),
    **{f"resnet{depth}": (f"ResNet-{depth}", _resnet(depth)) for depth in (10, 18, 34, 50, 101)},
}
"""Name -> the name in tables, and what builds the network."""


WITH_WIDTH = ("alexnet", "vgg", "resnet")
"""How the names of networks begin that come in several widths."""


def build(name: str, seed: int, *, classes: int, channels: int, width: float | None = None) -> nn.Module:
    """Build a network.

    Args:
        name: a key of ``NETWORKS``.
        seed: of the initial weights.
        classes: outputs.
        channels: of the inputs.
        width: as the network's class counts it; None for the paper's.

    Returns:
        The network, in training mode.

    Raises:
        UsageError: unknown name, or a value that the network does not take.
    """
    check(name, width)
    return NETWORKS[name][1](seed, classes, channels, **({} if width is None else {"width": width}))


def check(name: str, width: float | None) -> None:
    """Refuse a network that is not known, or a width where it has only one.

    Args:
        name: a key of ``NETWORKS``.
        width: or None.

    Raises:
        UsageError: either.
    """
    if name not in NETWORKS:
        raise UsageError(f"model={name!r}: use one of {', '.join(NETWORKS)}")
    if width is not None and not name.startswith(WITH_WIDTH):
        raise UsageError(f"width={width!r} of model={name!r}: it has one width; leave width out")
