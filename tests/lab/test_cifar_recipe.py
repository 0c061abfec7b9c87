import pytest
import torch
from torch import nn

from layerwise.lab.cifar_recipe import WEIGHT_DECAYS, Recipe, build, compressed
from layerwise.lab.errors import UsageError


def rates(recipe):
    """Give the learning rate of each epoch, from the first."""
    optimizer, scheduler = build(nn.Linear(1, 1), recipe)
    seen = []
    for _ in range(recipe.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_constants_are_those_of_the_specification():
    recipe = Recipe()
    assert (recipe.batch_size, recipe.test_batch_size, recipe.epochs) == (128, 100, 150)
    assert (recipe.rate, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 5e-4)
    assert WEIGHT_DECAYS == (5e-4, 0.0)


def test_the_rate_is_a_tenth_until_epoch_100_and_a_hundredth_from_101():
    assert rates(Recipe()) == pytest.approx([0.1] * 100 + [0.01] * 50)


@pytest.mark.parametrize("weight_decay", WEIGHT_DECAYS)
def test_the_optimizer_is_sgd_with_the_recipes_values_and_named_parameters(weight_decay):
    optimizer, _ = build(nn.Linear(2, 3), Recipe(weight_decay=weight_decay))
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["weight", "bias"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, weight_decay)
    assert (group["dampening"], group["nesterov"]) == (0, False)


@pytest.mark.parametrize(("epochs", "first"), [(1, 1), (3, 2), (15, 10), (30, 20), (150, 100), (300, 200)])
def test_a_short_run_keeps_the_share_of_each_rate(epochs, first):
    short = compressed(Recipe(weight_decay=0.0), epochs)
    assert short.epochs == epochs
    assert short.weight_decay == 0.0
    assert rates(short) == pytest.approx([0.1] * first + [0.01] * (epochs - first))


def test_the_full_length_is_the_recipe_itself():
    assert compressed(Recipe(), 150) == Recipe()


def test_epochs_below_one_are_named():
    with pytest.raises(UsageError, match="epochs=0: use a whole number from 1"):
        compressed(Recipe(), 0)
