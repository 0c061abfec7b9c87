"""Shifted images, the network that was trained before, and the images that a seed draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from layerwise.lab.data import Dataset, digits
from layerwise.lab.data.augmentation import CIFAR10_MEAN, CIFAR10_STD
from layerwise.lab.data.shifts import MIXTURE, SHIFTS, shifted
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.recipe import Recipe, load
from layerwise.lab.models.small_cnn import SmallCNN
from layerwise.lab.runs.configuration import Configuration, Constants
from layerwise.lab.training import inputs, networks, pretraining, trial
from layerwise.lab.training.streams import MemoryStream, drawn, epoch_generator, without_first


@pytest.fixture
def colours() -> Dataset:
    """Give ten images of random bytes in three colours, each of the last two test images of one colour."""
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8, generator=source)
    labels = torch.arange(10) % 4
    return Dataset("cifar10", "made up", images[:8], labels[:8], images[8:], labels[8:])


def test_mixed_colours_are_rounded_sums_pixel_by_pixel(colours):
    found = shifted(colours, "mixed-colours", 4)
    assert found.train_images.dtype == torch.uint8
    for before, after in ((colours.train_images, found.train_images), (colours.test_images, found.test_images)):
        for number in range(len(before)):
            for row in range(4):
                for column in range(4):
                    old = [int(value) for value in before[number, :, row, column]]
                    for channel, shares in enumerate(MIXTURE):
                        exact = sum(share * value for share, value in zip(shares, old, strict=True))
                        assert abs(int(after[number, channel, row, column]) - exact) <= 0.5 + 1e-4
    assert torch.equal(found.train_labels, colours.train_labels)
    assert all(sum(shares) == pytest.approx(1.0) for shares in MIXTURE)  # bytes stay bytes


def test_inverted_images_are_255_minus_the_bytes_and_flipped_classes_count_from_the_end(colours):
    inverted, flipped = shifted(colours, "inverted", 4), shifted(colours, "flipped-classes", 4)
    assert torch.equal(inverted.train_images.int(), 255 - colours.train_images.int())
    assert torch.equal(inverted.test_labels, colours.test_labels)
    assert flipped.train_labels.tolist() == [3, 2, 1, 0, 3, 2, 1, 0]
    assert flipped.test_labels.tolist() == [3, 2]  # though no test image has the highest class
    assert torch.equal(flipped.test_images, colours.test_images)
    assert shifted(colours, None, 4) is colours


def test_shifts_that_cannot_be_are_refused(colours):
    with pytest.raises(UsageError, match="shift='blurred': use one of mixed-colours, inverted, flipped-classes, or"):
        shifted(colours, "blurred", 4)
    with pytest.raises(UsageError, match="images with 1 channel: use 'inverted'"):
        shifted(digits.load(), "mixed-colours", 10)
    assert shifted(digits.load(), "inverted", 10).name == "digits5k"
    assert list(SHIFTS) == ["mixed-colours", "inverted", "flipped-classes"]


def test_normalised_inputs_are_normalised_and_nothing_else(colours):
    made = inputs.make("normalised", colours)
    given = made.train(colours.train_images, torch.Generator())
    mean, std = (torch.tensor(each).double().view(-1, 1, 1) for each in (CIFAR10_MEAN, CIFAR10_STD))
    expected = (colours.train_images.double() / 255 - mean) / std
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="inputs='normalised' with data='digits5k': use one of cifar10, cifar100"):
        inputs.make("normalised", digits.load())


def test_a_seed_draws_its_own_images_of_those_that_are_left():
    whole = digits.load()
    left = without_first(whole, 3000)
    assert torch.equal(left.train_labels, whole.train_labels[3000:])
    first, again, other = (drawn(left, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_images, other.train_images)
    order = torch.randperm(1000, generator=epoch_generator(1, 0))[:50]
    assert torch.equal(first.train_labels, whole.train_labels[3000 + order])
    assert first.test_images is whole.test_images
    assert drawn(left, None, 1) is left
    assert without_first(whole, None) is whole
    with pytest.raises(UsageError, match="drawn_count=1001 of 1,000 training images that are left: give at most 1000"):
        drawn(left, 1001, 1)
    assert len(drawn(left, 1000, 1).train_labels) == 1000
    with pytest.raises(UsageError, match="pretrain_count=4000 leaves none of 4,000 images: give fewer"):
        without_first(whole, 4000)


def test_the_small_network_is_the_one_written_by_hand():
    model = SmallCNN(3, 5, channels=2, width=8)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 9 * 8 * (2 + 80) + 21 * 8 + 4 * 8 * 5 + 5
    w = {name: p.detach().double() for name, p in parameters.items()}
    pixels = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    hidden = pixels.double()
    for block in range(3):
        own = f"blocks.{block}"
        hidden = functional.conv2d(hidden, w[f"{own}.conv.weight"], w[f"{own}.conv.bias"], padding=1)
        groups = hidden.reshape(3, 4, -1)  # four groups of neighbouring channels
        centred = groups - groups.mean(2, keepdim=True)
        scale = (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        hidden = (centred / scale).reshape(hidden.shape)
        hidden = hidden * w[f"{own}.norm.weight"].view(-1, 1, 1) + w[f"{own}.norm.bias"].view(-1, 1, 1)
        hidden = hidden.clamp(min=0)
        n, c, side, _ = hidden.shape
        hidden = hidden.reshape(n, c, side // 2, 2, side // 2, 2).amax((3, 5))
    scores = hidden.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(pixels).double(), scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="width=6: use a multiple of 4"):
        SmallCNN(0, width=6)


# --- Training before --------------------------------------------------------------------------------------------------


def constants(**changes: Any) -> Constants:
    """Give the constants of the recipe's smoke scale."""
    read = load("surgical-shift")
    run = read.plan("smoke", seeds=1).runs[0]
    return Constants.of({**run.configuration.trial, **changes})


def built(seed: int, **changes: Any) -> trial.Trial:
    return trial.build(replace(Configuration.make(constants(**changes)), seed=seed))


def test_training_before_is_the_loop_written_by_hand(one_thread):
    whole, steps = digits.load(), 5
    made = pretraining.pretrained("digits5k", None, 300, "framed", "small-cnn", 8, steps)
    data = replace(whole, train_images=whole.train_images[:300], train_labels=whole.train_labels[:300])
    sizes = {"batch_size": 128, "test_batch_size": 128, "seed": 0}
    stream = MemoryStream(dataset=data, classes=10, form="framed", order="shuffled", **sizes)
    batches = [*stream.batches(1), *stream.batches(2)][:steps]
    model = networks.build("small-cnn", 0, classes=10, channels=1, width=8).double()
    w = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    for k, (pixels, labels) in enumerate(batches):
        loss = functional.cross_entropy(model(pixels.double()), labels)
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        rate = 0.003 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / steps, dtype=torch.float64)))
        with torch.no_grad():
            for name, p in w.items():
                first[name] = 0.9 * first[name] + 0.1 * gradients[name]
                second[name] = 0.999 * second[name] + 0.001 * gradients[name].square()
                m, v = first[name] / (1 - 0.9 ** (k + 1)), second[name] / (1 - 0.999 ** (k + 1))
                p -= rate * m / (v.sqrt() + 1e-8)
    for name, p in w.items():
        torch.testing.assert_close(made[name].double(), p.detach(), rtol=1e-3, atol=1e-4)


def test_all_seeds_begin_with_the_weights_that_were_trained_before(one_thread):
    pretraining.pretrained.cache_clear()
    first, second = built(0), built(1, shift="flipped-classes")
    assert pretraining.pretrained.cache_info().misses == 1  # once a process, whatever the shift
    begun = first.model.state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in second.model.state_dict().items())
    fresh = networks.build("small-cnn", 0, classes=10, channels=1, width=8)
    assert not torch.equal(fresh.head.weight, begun["head.weight"])
    with torch.no_grad():
        first.model.head.weight.zero_()
    assert built(2).model.head.weight.any()  # what a run does leaves them alone


def test_a_run_trains_on_images_that_the_network_has_not_seen(one_thread):
    seen = torch.cat([images for images, _ in built(0, batch_size=64).batches(1, 0)])
    whole = digits.load()
    frames = inputs.make("framed", whole)

    def among(images: torch.Tensor) -> int:
        known = {tuple(image.flatten().tolist()) for image in frames.test(255 - images)}
        return sum(tuple(image.flatten().tolist()) in known for image in seen)

    assert len(seen) == 64
    assert among(whole.train_images[2000:3900]) == 64
    assert among(whole.train_images[:2000]) == among(whole.train_images[3900:]) == 0


def test_training_before_needs_both_images_and_updates():
    for changes in ({"pretrain_count": None}, {"pretrain_iterations": 0}):
        with pytest.raises(UsageError, match=r"pretrain_iterations=\d+: give both or none of them"):
            constants(**changes)
    assert constants(pretrain_count=None, pretrain_iterations=0).pretrain_count is None


def test_the_decay_of_the_recipe_is_reversed_from_layer_to_layer(carried_out):
    read = load("surgical-shift")
    smoke = {**read.content["scales"]["smoke"], "arms": ["plain", "layer-decay", "reversed", "first"], "seeds": 1}
    content = {**read.content, "scales": {"smoke": {**smoke, "subjects": ["inverted"]}}}
    outcome = carried_out(Recipe("tiny", content).plan("smoke"))
    factors = {arm: each.summary["factor"]["layers"] for (_, arm, _), each in outcome.results.records.items()}
    layers = [f"blocks.{block}.{part}" for block in range(3) for part in ("conv", "norm")]
    decayed = [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0]
    assert factors["layer-decay"] == dict(zip([*layers, "head"], decayed, strict=True))
    assert factors["reversed"] == dict(zip([*layers, "head"], [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125], strict=True))
    assert factors["first"] == dict(zip([*layers, "head"], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], strict=True))
