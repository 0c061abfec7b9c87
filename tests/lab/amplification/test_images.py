from pathlib import Path

import pytest
import torch

from layerwise.lab import data
from layerwise.lab.amplification import images
from layerwise.lab.errors import UsageError


def test_digits_are_padded_to_32_pixels_and_not_augmented():
    dataset, whole = images.load("digits5k", None, 30, 10), data.load("digits5k")
    assert dataset.train_images.shape == (30, 1, 32, 32)
    assert dataset.test_images.shape == (10, 1, 32, 32)
    assert torch.equal(dataset.train_images[:, :, 2:-2, 2:-2], whole.train_images[:30])
    assert dataset.train_images[:, :, :2].sum() == dataset.train_images[:, :, :, -2:].sum() == 0
    index = torch.tensor([3, 1])
    first, second = (images.to_train(dataset, index, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first, images.to_test(dataset, dataset.train_images[index]))


def test_the_digits_are_normalised():
    inputs = images.to_test(dataset := images.load("digits5k", None, 4000, 10), dataset.train_images)
    assert inputs.mean().item() == pytest.approx(0.0, abs=0.02)
    assert inputs.std().item() == pytest.approx(1.0, abs=0.02)


def test_without_cifar_the_digits_are_chosen(tmp_path):
    assert images.choose(None) == "digits5k"
    assert images.choose(tmp_path) == "digits5k"
    with pytest.raises(UsageError, match="is not a folder"):
        images.choose(Path("/nowhere/at/all"))


def test_photographs_are_the_first_of_the_file_and_cropped(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    whole = data.Dataset(
        name="cifar10",
        title="",
        train_images=torch.randint(0, 256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8),
        train_labels=torch.arange(9),
        test_images=torch.zeros((5, 3, 32, 32), dtype=torch.uint8),
        test_labels=torch.arange(5),
    )
    found = lambda name, folder: whole  # noqa: E731
    found.cache_clear = lambda: None
    monkeypatch.setattr(images.cifar, "load", found)
    dataset = images.load("cifar10", tmp_path, 6, 4)
    assert torch.equal(dataset.train_images, whole.train_images[:6])
    assert torch.equal(dataset.test_labels, whole.test_labels[:4])
    assert "first 6 photographs" in dataset.title
    index = torch.arange(6)
    first, again, other = (images.to_train(dataset, index, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
