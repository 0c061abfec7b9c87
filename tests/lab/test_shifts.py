"""Shifted images and labels: the numbers by hand, and images that no two parts of a run share."""

from __future__ import annotations

import pytest
import torch

from layerwise.lab.data import Dataset, shifts
from layerwise.lab.errors import UsageError
from layerwise.lab.training.streams import drawn, with_validation, without_first


def dataset(count: int = 3, channels: int = 3) -> Dataset:
    images = torch.zeros((count, channels, 1, 1), dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return Dataset("made up", "made up", images, labels, images.clone(), labels.clone())


def test_mixed_colours_are_those_computed_by_hand():
    images = torch.tensor([[200, 100, 10], [77, 77, 77], [255, 255, 255], [0, 0, 255]], dtype=torch.uint8)
    made = dataset(4)
    for name in ("train_images", "test_images"):
        getattr(made, name).copy_(images[:, :, None, None])
    found = shifts.shifted(made, "mixed-colours", 10)
    # 0.1·200 + 0.2·100 + 0.7·10 = 47; 0.6·200 + 0.1·100 + 0.3·10 = 133; 0.2·200 + 0.7·100 + 0.1·10 = 111
    # of blue alone: 178.5, rounded to the even number, 76.5 too, 25.5 too
    expected = [[47, 133, 111], [77, 77, 77], [255, 255, 255], [178, 76, 26]]
    assert found.train_images[:, :, 0, 0].tolist() == expected
    assert found.test_images[:, :, 0, 0].tolist() == expected
    assert found.train_images.dtype == torch.uint8
    assert torch.equal(found.train_labels, made.train_labels)
    assert torch.tensor(shifts.MIXING, dtype=torch.float64).sum(1).tolist() == pytest.approx([1.0] * 3)
    assert abs(float(torch.linalg.det(torch.tensor(shifts.MIXING)))) > 0.1  # no colour is lost


def test_mixing_in_chunks_is_mixing_at_once(monkeypatch):
    made = dataset(7)
    made.train_images.copy_(torch.arange(21, dtype=torch.uint8).view(7, 3, 1, 1))
    whole = shifts.shifted(made, "mixed-colours", 10).train_images
    monkeypatch.setattr(shifts, "CHUNK", 2)
    assert torch.equal(shifts.shifted(made, "mixed-colours", 10).train_images, whole)


def test_inverted_images_and_permuted_labels():
    made = dataset(12, channels=1)
    made.train_images[:2] = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    inverted = shifts.shifted(made, "inverted", 10)
    assert inverted.train_images.flatten()[:3].tolist() == [255, 55, 255]
    assert torch.equal(inverted.test_labels, made.test_labels)
    permuted = shifts.shifted(made, "permuted-labels", 10)
    assert permuted.train_labels.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8]
    assert permuted.test_labels.tolist() == permuted.train_labels.tolist()
    assert torch.equal(permuted.train_images, made.train_images)
    assert shifts.shifted(made, "permuted-labels", 100).train_labels.tolist()[:2] == [99, 98]
    assert shifts.shifted(made, None, 10) is made


def test_a_shift_that_is_not_known_or_does_not_suit_is_refused():
    with pytest.raises(UsageError, match="shift='blurred': use one of mixed-colours, inverted, permuted-labels"):
        shifts.check("blurred")
    with pytest.raises(UsageError, match="images with 1 channel: it takes 3; use 'inverted' or 'permuted-labels'"):
        shifts.shifted(dataset(channels=1), "mixed-colours", 10)
    shifts.shifted(dataset(channels=1), "inverted", 10)


def numbered(count: int) -> Dataset:
    """Give images whose labels are their places in the file."""
    made = dataset(count)
    return Dataset("made up", "made up", made.train_images, torch.arange(count), made.test_images, made.test_labels)


def test_no_image_is_trained_on_before_drawn_and_validated():
    whole = numbered(100)
    left = with_validation(whole, 20, None, measure=True)
    kept = without_first(left, 50, 0)
    found = [set(drawn(kept, 12, seed).train_labels.tolist()) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    assert all(len(each) == 12 for each in found)
    assert set.union(*found) <= set(range(50, 80))
    assert set(left.test_labels.tolist()) == set(range(80, 100))
    assert torch.equal(drawn(kept, 12, 0).train_labels, drawn(kept, 12, 0).train_labels)
    assert drawn(kept, None, 0) is kept


def test_more_images_than_there_are_cannot_be_wanted():
    with pytest.raises(UsageError, match=r"train_count=80 of pretrained leaves 20 images .* 30 are wanted: give fewer"):
        without_first(numbered(100), 80, 30)
    with pytest.raises(UsageError, match="train_count=100 of pretrained leaves 0"):
        without_first(numbered(100), 100, 0)
    assert len(without_first(numbered(100), 80, 20).train_labels) == 20
    with pytest.raises(UsageError, match="drawn_count=21 of 20 training images: draw fewer"):
        drawn(without_first(numbered(100), 80, 0), 21, 0)
