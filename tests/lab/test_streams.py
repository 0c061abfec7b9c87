import numpy as np
import pytest
import torch
from torch.nn import functional

from layerwise.lab.data import Dataset, augmentation, digits
from layerwise.lab.errors import UsageError
from layerwise.lab.training import inputs
from layerwise.lab.training.streams import MemoryStream, epoch_generator, shortened


def photographs(name="cifar10", count=50):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    return Dataset(name, "noise", images, labels, images[:20], labels[:20])


def stream(dataset, kind, order="shuffled", seed=0, batch_size=16):
    sizes = {"batch_size": batch_size, "test_batch_size": 7}
    return MemoryStream(dataset=dataset, form=kind, order=order, classes=10, seed=seed, **sizes)


@pytest.mark.parametrize("kind", ["augmented", "mean-image"])
def test_an_epoch_can_begin_at_any_batch(kind):
    whole = list(stream(photographs(), kind).batches(3))
    assert len(whole) == stream(photographs(), kind).epoch_length == 4
    for skip in range(5):
        rest = list(stream(photographs(), kind).batches(3, skip))
        assert len(rest) == len(whole) - skip
        for (ours, ours_labels), (theirs, their_labels) in zip(rest, whole[skip:], strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours_labels, their_labels)


def test_seeds_and_epochs_have_orders_of_their_own_and_each_image_comes_once():
    dataset = shortened(digits.load(), 40, 10)
    seen = set()
    for seed in (0, 1):
        for epoch in (1, 2):
            batches = list(stream(dataset, "scaled", seed=seed).batches(epoch))
            pixels = torch.cat([batch for batch, _ in batches]).flatten(1).sum(1)
            assert sorted(pixels.tolist()) == sorted((dataset.train_images.float() / 256).flatten(1).sum(1).tolist())
            seen.add(tuple(pixels.tolist()))
    assert len(seen) == 4
    assert epoch_generator(0, 12).initial_seed() != epoch_generator(1, 2).initial_seed()


def test_the_sequential_order_is_caffes():
    dataset = shortened(digits.load(), 40, 10)
    batches = stream(dataset, "scaled", "sequential").batches(1, 2)
    _, labels = next(batches)
    assert torch.equal(labels, dataset.train_labels[torch.arange(32, 48) % 40])
    assert stream(dataset, "scaled", "sequential").epoch_length is None


@pytest.mark.parametrize("kind", ["augmented", "mean-image"])
def test_a_sequential_stream_can_begin_at_any_batch_too(kind):
    made = stream(photographs(), kind, "sequential")
    first = [batch for _, batch in zip(range(6), made.batches(1))]  # noqa: B905
    later = [batch for _, batch in zip(range(3), made.batches(1, 3))]  # noqa: B905
    for (ours, _), (theirs, _) in zip(later, first[3:], strict=True):
        assert torch.equal(ours, theirs)


def test_tests_are_all_images_in_order():
    dataset = photographs()
    batches = list(stream(dataset, "mean-image").tests())
    assert [len(labels) for _, labels in batches] == [7, 7, 6]
    mean = dataset.train_images.double().mean(0)
    expected = dataset.test_images.double() - mean
    assert torch.allclose(torch.cat([batch for batch, _ in batches]).double(), expected, atol=1e-4)


def test_the_mean_image_is_exact():
    dataset = photographs(count=33)
    mean = dataset.train_images.numpy().astype(np.float64).mean(0)
    made = inputs.make("mean-image", dataset).test(torch.zeros((1, 3, 32, 32), dtype=torch.uint8))
    assert np.abs(made[0].numpy() + mean).max() < 1e-5


def test_augmented_inputs_are_those_of_the_recipe():
    dataset = photographs()
    made, _ = next(stream(dataset, "augmented").batches(1))
    generator = epoch_generator(0, 1)
    index = torch.randperm(50, generator=generator)[:16]
    crops = augmentation.cropped_and_mirrored(dataset.train_images[index], generator)
    expected = augmentation.normalised(crops, augmentation.CIFAR10_MEAN, augmentation.CIFAR10_STD)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("kind", "shape"), [("framed", (1, 32, 32)), ("coloured", (3, 32, 32)), ("enlarged", (3, 227, 227))]
)
def test_digits_can_stand_in_for_photographs(kind, shape):
    dataset = shortened(digits.load(), 20, 5)
    made = stream(dataset, kind)
    batch, _ = next(made.batches(1))
    assert batch.shape == (16, *shape)
    assert made.channels == shape[0]
    assert batch.isfinite().all()
    tested, _ = next(made.tests())
    assert tested.shape[1:] == shape


def test_framed_digits_are_centred_and_scaled():
    whole = functional.pad(digits.load().train_images, (2, 2, 2, 2)).double() / 255
    assert abs(float(whole.mean()) - inputs.DIGITS_MEAN[0]) < 0.01
    assert abs(float(whole.std()) - inputs.DIGITS_STD[0]) < 0.01


def test_unknown_inputs_and_data_that_do_not_suit_are_told():
    with pytest.raises(UsageError, match="inputs='raw': use one of scaled"):
        inputs.make("raw", photographs())
    with pytest.raises(UsageError, match="data='digits5k': use one of cifar10, cifar100"):
        inputs.make("augmented", digits.load())
