import pytest
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.data.augmentation import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_MEAN,
    CIFAR100_STD,
    cropped_and_mirrored,
    normalised,
    shuffled_batches,
)
from layerwise.lab.errors import UsageError
from layerwise.lab.training import inputs


def training_images(images, generator):
    """Make inputs as a run does."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    return inputs.make("augmented", Dataset("cifar10", "noise", images, labels, images, labels)).train(
        images, generator
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, channels=3, height=32, width=32):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=seeded(1))


def every_window(image, padding):
    """Give each window of one image by its place, pixel by pixel."""
    channels, height, width = image.shape
    pixels = image.tolist()
    windows = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            plain = [[[0] * width for _ in range(height)] for _ in range(channels)]
            for channel in range(channels):
                for row in range(height):
                    for column in range(width):
                        y, x = row + top - padding, column + left - padding
                        if 0 <= y < height and 0 <= x < width:
                            plain[channel][row][column] = pixels[channel][y][x]
            mirrored = [[line[::-1] for line in plane] for plane in plain]
            windows[top, left, False] = torch.tensor(plain, dtype=torch.uint8)
            windows[top, left, True] = torch.tensor(mirrored, dtype=torch.uint8)
    return windows


def test_every_image_is_one_of_its_windows_and_each_window_is_as_likely():
    image = random_images(1, height=6, width=5)
    windows = every_window(image[0], padding=1)
    assert len(windows) == 18
    count = 3600
    drawn = cropped_and_mirrored(image.expand(count, -1, -1, -1), seeded(), padding=1)
    matches = torch.stack([(drawn == window).flatten(1).all(dim=1) for window in windows.values()])
    assert (matches.sum(dim=0) == 1).all()
    # 200 expected of each; the standard deviation is 13.7.
    assert (matches.sum(dim=1) - 200).abs().max() < 4.5 * 13.7


def test_each_image_of_a_batch_is_cut_from_itself():
    images = random_images(8, height=7, width=9)
    drawn = cropped_and_mirrored(images, seeded(3))
    places = set()
    for image, cut in zip(images, drawn, strict=True):
        found = [place for place, window in every_window(image, 4).items() if torch.equal(window, cut)]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 4  # one place for each image, not one for the batch
    assert {mirrored for _, _, mirrored in places} == {True, False}


def test_channels_move_together():
    grey = random_images(16, channels=1).expand(-1, 3, -1, -1)
    drawn = cropped_and_mirrored(grey, seeded())
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert torch.equal(drawn[:, 0], drawn[:, 2])


def test_the_recipes_order_is_kept_padding_then_scaling_then_normalising():
    white = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    batch = training_images(white, seeded())
    assert batch.shape == white.shape
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    for channel, (mean, std) in enumerate(zip(CIFAR10_MEAN, CIFAR10_STD, strict=True)):
        low, high = batch[:, channel].unique().tolist()
        assert low == pytest.approx(-mean / std, rel=1e-6)
        assert high == pytest.approx((1 - mean) / std, rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"), [(CIFAR10_MEAN, CIFAR10_STD), (CIFAR100_MEAN, CIFAR100_STD), ((0.1,), (0.3,))]
)
def test_images_are_normalised_by_channel(mean, std):
    images = random_images(5, channels=len(mean))
    by_hand = torch.stack([(images[:, n].double() / 255 - mean[n]) / std[n] for n in range(len(mean))], dim=1)
    made = normalised(images, mean, std)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_training_images_are_the_normalised_crops():
    images = random_images(9)
    made = training_images(images, seeded(4))
    assert torch.equal(made, normalised(cropped_and_mirrored(images, seeded(4)), CIFAR10_MEAN, CIFAR10_STD))


def test_a_seed_gives_the_same_batches_whatever_else_is_drawn():
    images = random_images(16)
    before = images.clone()
    first_source, second_source = seeded(5), seeded(5)
    state = torch.get_rng_state()
    first = [training_images(images, first_source) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = [training_images(images, second_source) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(images, before)


def test_without_padding_images_are_only_mirrored():
    image = random_images(1, height=4, width=4)
    drawn = cropped_and_mirrored(image.expand(40, -1, -1, -1), seeded(), padding=0)
    same = (drawn == image).flatten(1).all(dim=1)
    assert 5 < same.sum() < 35
    assert (drawn[~same] == image.flip(3)).all()


@pytest.mark.parametrize("count", [1, 5, 128, 391])
def test_batches_hold_every_index_once_and_the_last_one_what_is_left(count):
    batches = shuffled_batches(count, 128, seeded())
    assert [len(batch) for batch in batches] == [min(128, count - start) for start in range(0, count, 128)]
    assert torch.cat(batches).sort().values.tolist() == list(range(count))


def test_cifar_makes_391_batches_in_another_order_each_epoch():
    source = seeded(2)
    first, second = shuffled_batches(50_000, 128, source), shuffled_batches(50_000, 128, source)
    assert len(first) == 391
    assert len(first[-1]) == 80
    assert not torch.equal(first[0], second[0])
    again = shuffled_batches(50_000, 128, seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5,)), (CIFAR10_MEAN, (0.2, 0.2)), (CIFAR10_MEAN, (0.2, 0.0, 0.2))]
)
def test_statistics_that_do_not_fit_the_channels_are_named(mean, std):
    with pytest.raises(UsageError, match=r"mean=\(.*std=\(.*give 3 of each"):
        normalised(random_images(1), mean, std)
