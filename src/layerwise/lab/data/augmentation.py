"""Random crops, mirroring and normalisation of small images, a whole batch at a time.

Basodi et al. 2023 do not give their preprocessing; this is that of kuangliu/pytorch-cifar, whose networks fit their
running times (inferred). The padding is black in the raw image, so it is ``-mean / std`` in the input.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from layerwise.lab.errors import UsageError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Mean and divisor of red, green and blue of CIFAR-10 on [0, 1]. Not in the paper; kuangliu/pytorch-cifar. The standard
deviation over all pixels is larger, (0.2470, 0.2435, 0.2616); this is what the recipe divides by."""

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""Mean and standard deviation of CIFAR-100 on [0, 1]. Not in the paper; the data's own statistics."""

PADDING = 4
"""Black pixels added on every side before the crop. Not in the paper; kuangliu/pytorch-cifar."""


def normalised(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Turn bytes, shape (n, channels, height, width), into float32: x = (images / 255 - mean) / std, by channel."""
    channels = images.shape[1]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise UsageError(f"mean={mean!r}, std={std!r}: give {channels} of each, std above 0, one for each channel")
    # Mean and divisor are scaled to bytes here, so that the images are passed over twice and not three times.
    offset = torch.tensor(mean, device=images.device).mul_(255.0).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).mul_(255.0).view(-1, 1, 1)
    return images.to(torch.float32).sub_(offset).div_(scale)


def cropped_and_mirrored(images: torch.Tensor, generator: torch.Generator, padding: int = PADDING) -> torch.Tensor:
    """Cut a window of the original size from each padded image, and mirror half of the images, at random.

    Each of the (2 padding + 1)² places is as likely as any other. The generator may be on another device than the
    images, which are uint8 of shape (n, channels, height, width).
    """
    count, channels, height, width = images.shape
    drawn = {"generator": generator, "device": generator.device}
    corner = torch.randint(0, 2 * padding + 1, (2, count, 1), **drawn).to(images.device)
    mirrored = torch.randint(0, 2, (count, 1), **drawn).to(images.device).bool()
    columns = torch.arange(width, device=images.device)
    columns = corner[0] + torch.where(mirrored, columns.flip(0), columns)
    rows = corner[1] + torch.arange(height, device=images.device)
    # One gather on flattened images, the same positions for all channels, does the crop and the mirroring.
    positions = (rows * (width + 2 * padding)).unsqueeze(2) + columns.unsqueeze(1)
    positions = positions.view(count, 1, height * width).expand(count, channels, height * width)
    padded = functional.pad(images, (padding, padding, padding, padding))
    return padded.flatten(2).gather(2, positions).view(images.shape)


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Deal the numbers from 0 to count - 1 into batches in random order; the last batch may be smaller."""
    return torch.randperm(count, generator=generator, device=generator.device).split(batch_size)
