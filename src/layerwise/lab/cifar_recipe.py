"""How the CIFAR networks of Basodi et al. 2023 are trained.

The paper gives the number of epochs, the learning rates and the factor of the amplification (section 4), but not
batch size, momentum, weight decay or augmentation. These are taken from kuangliu/pytorch-cifar, whose
networks fit the paper's running times (inferred); its own schedule of 350 epochs is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from layerwise.lab.errors import UsageError

WEIGHT_DECAYS = (5e-4, 0.0)
"""Weight decays of the baseline. Not in the paper; 5e-4 is that of the recipe of the CIFAR networks whose running times
fit. The paper's baselines are lower than that recipe gives, perhaps for want of weight decay (inferred), hence 0."""


@dataclass(frozen=True)
class Recipe:
    """The constants of one training.

    Attributes:
        batch_size: images of a training batch. Not in the paper; recipe of the CIFAR networks whose running times fit.
        test_batch_size: images of a test batch; changes no result. As batch_size.
        rate: learning rate of the first epochs. Basodi et al. 2023, section 4.
        momentum: of SGD, not Nesterov's. As batch_size.
        weight_decay: L2, on all parameters. As batch_size; see WEIGHT_DECAYS.
        epochs: passes over the training images. Basodi et al. 2023, section 4.
        milestones: epochs after which the rate is multiplied by rate_decay: 0.1 in epochs 1 to 100, 0.01 in
            101 to 150. Basodi et al. 2023, section 4.
        rate_decay: see milestones. Basodi et al. 2023, section 4.
    """

    batch_size: int = 128
    test_batch_size: int = 100
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = WEIGHT_DECAYS[0]
    epochs: int = 150
    milestones: tuple[int, ...] = (100,)
    rate_decay: float = 0.1


def build(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.MultiStepLR]:
    """Make the optimizer and its rate policy.

    The rate of epoch e, from 1, is rate * rate_decay^(number of milestones below e).

    Args:
        model: the network; all its parameters form one group, with their names.
        recipe: the constants.

    Returns:
        The optimizer, and the scheduler; call the scheduler's ``step`` after each epoch.
    """
    optimizer = torch.optim.SGD(
        model.named_parameters(), lr=recipe.rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    policy = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), gamma=recipe.rate_decay)
    return optimizer, policy


def compressed(recipe: Recipe, epochs: int) -> Recipe:
    """Shorten a recipe, keeping the share of each learning rate.

    A milestone m becomes m * epochs / recipe.epochs, rounded, but not below 1.

    Args:
        recipe: the full one.
        epochs: passes over the training images, from 1.

    Returns:
        The recipe with these epochs and with milestones scaled to them.

    Raises:
        UsageError: epochs below 1.
    """
    if epochs < 1:
        raise UsageError(f"epochs={epochs!r}: use a whole number from 1 (the full recipe has {recipe.epochs})")
    milestones = tuple(max(1, round(milestone * epochs / recipe.epochs)) for milestone in recipe.milestones)
    return replace(recipe, epochs=epochs, milestones=milestones)
