"""ResNet-18, -34, -50 and -101 for images of 32 x 32 pixels, networks of Basodi et al. 2023, tables 1 to 4.

The paper names the networks and not their layout. Its running times fit the layout of kuangliu/pytorch-cifar
(inferred): the blocks of He et al. 2015 (arXiv 1512.03385), table 1, behind a stem for small images, which is one
3 x 3 convolution of stride 1 without pooling. Every shortcut that changes the shape is a 1 x 1 convolution with
batch normalisation, and a bottleneck has its stride in the 3 x 3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

from layerwise.lab.errors import UsageError
from layerwise.lab.models import check_sizes, seeded


def _convolution(inputs: int, outputs: int, window: int, stride: int = 1) -> nn.Conv2d:
    """Make a convolution without bias that keeps the size of the image, but for the stride."""
    return nn.Conv2d(inputs, outputs, window, stride=stride, padding=window // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Make the way around a block: nothing where the shape stays, else a 1 x 1 convolution and normalisation."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(
        OrderedDict([("conv", _convolution(inputs, outputs, 1, stride)), ("bn", nn.BatchNorm2d(outputs))])
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added; the first has the stride.

    y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); He et al. 2015, figure 5 left.
    """

    expansion = 1
    """Channels of the output for each channel of the convolutions."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the block: channels times ``expansion``, height and width divided by the stride."""
        inner = functional.relu(self.bn1(self.conv1(hidden)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(hidden))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, around which the input is added; the one in the middle has the stride.

    y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)); He et al. 2015, figure 5 right.
    """

    expansion = 4
    """Channels of the output for each channel of the inner convolutions."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = _convolution(inputs, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _convolution(channels, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the block: channels times ``expansion``, height and width divided by the stride."""
        inner = functional.relu(self.bn1(self.conv1(hidden)))
        inner = functional.relu(self.bn2(self.conv2(inner)))
        return functional.relu(self.bn3(self.conv3(inner)) + self.shortcut(hidden))


BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth -> kind of block, blocks of each stage. He et al. 2015, table 1; depth 10 is ours, for demonstrations."""


class ResNet(nn.Module):
    """A 3 x 3 convolution, four stages of residual blocks, the mean over the image, one fully connected layer.

    conv1, bn1, then layer1 to layer4 of width, 2, 4 and 8 times the width, the last three beginning with stride 2,
    then fc. Parametric modules: 41, 73, 107, 209 for depth 18, 34, 50, 101; parameter tensors: 62, 110, 161, 314;
    parameters at width 64 with 10 classes: 11,173,962; 21,282,122; 23,520,842; 42,512,970. The depth counts the
    convolutions outside the shortcuts and the fully connected layer.
    """

    def __init__(self, depth: int, seed: int, classes: int = 10, width: int = 64, *, channels: int = 3) -> None:
        if depth not in BLOCKS:
            raise UsageError(f"depth={depth!r}: use one of {', '.join(map(str, BLOCKS))}")
        check_sizes(classes=classes, width=width, channels=channels)
        super().__init__()
        block, (first, second, third, fourth) = BLOCKS[depth]
        outputs = width * block.expansion
        with seeded(seed):
            self.conv1 = _convolution(channels, width, 3)
            self.bn1 = nn.BatchNorm2d(width)
            self.layer1 = _stage(block, first, width, width, 1)
            self.layer2 = _stage(block, second, outputs, 2 * width, 2)
            self.layer3 = _stage(block, third, 2 * outputs, 4 * width, 2)
            self.layer4 = _stage(block, fourth, 4 * outputs, 8 * width, 2)
            self.fc = nn.Linear(8 * outputs, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score float32 of shape (n, channels, 32, 32)."""
        hidden = functional.relu(self.bn1(self.conv1(pixels)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(hidden.mean(dim=(2, 3)))


def _stage(block: type[BasicBlock | Bottleneck], count: int, inputs: int, channels: int, stride: int) -> nn.Sequential:
    """Chain the blocks of a stage; only the first changes the shape."""
    blocks = [block(inputs, channels, stride)]
    blocks += [block(channels * block.expansion, channels, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
