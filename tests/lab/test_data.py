import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import digits_file
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


def test_the_digits_are_those_of_their_file_row_by_row():
    rows = np.frombuffer(gzip.decompress(digits.FILE.read_bytes()), np.uint8).reshape(5000, 785)[digits.file_order()]
    loaded = digits.load()
    for images, labels, part in (
        (loaded.train_images, loaded.train_labels, rows[:4000]),
        (loaded.test_images, loaded.test_labels, rows[4000:]),
    ):
        assert np.array_equal(images.flatten(1).numpy(), part[:, :-1])
        assert np.array_equal(labels.numpy(), part[:, -1])


def test_the_digits_are_the_first_500_of_each_class_of_mnist(mnist_folder):
    assert gzip.decompress(digits.FILE.read_bytes()) == digits_file.table(mnist_folder)


def test_the_digits_take_less_than_a_megabyte_and_have_their_licence_beside_them():
    assert digits.FILE.stat().st_size < 1 << 20
    assert "creativecommons.org/licenses/by-sa/3.0" in digits.FILE.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"1,2,3", "Not a gzipped file"), (gzip.compress(b"123"), f"expected {digits.CONTENT}")],
    ids=["missing", "not compressed", "other content"],
)
def test_a_damaged_file_of_digits_is_named_with_the_remedy(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(digits, "FILE", tmp_path / "digits5k.gz")
    if content is not None:
        digits.FILE.write_bytes(content)
    with pytest.raises(UsageError, match=rf"digits5k\.gz: .*{reason}.*install layerwise again"):
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
    assert mnist.find(mnist_folder) is not None
    loaded = data.load("mnist", mnist_folder)
    assert loaded.train_images.shape == (60_000, 1, 28, 28)
    assert loaded.test_images.shape == (10_000, 1, 28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(loaded.train_labels).tolist() == counts
    assert loaded.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(loaded.test_labels).sum() == 10_000


def test_a_folder_without_mnist_is_told_from_one_with_it(tmp_path):
    assert mnist.find(tmp_path) is None
    assert not data.present("mnist", tmp_path)
    assert not data.present("mnist", None)


@pytest.mark.parametrize("place", ["", "mnist"], ids=["files in the folder itself", "files in mnist/"])
def test_a_damaged_file_is_named_with_what_was_expected_and_the_remedy(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not this")
    assert mnist.find(tmp_path) is not None
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
    with pytest.raises(UsageError, match=r"data-dir='.*nowhere' holds no MNIST file"):
        mnist.load(tmp_path / "nowhere")


def test_an_unknown_data_set_is_named():
    with pytest.raises(UsageError, match="name='cifar'"):
        data.load("cifar")


@pytest.fixture
def sets(monkeypatch):
    """Make both data sets small: file -> what is in it, of each, with the checksums in the place of the real ones."""
    generator = np.random.default_rng(0)
    contents = {}
    for name, files in mnist.FILES.items():
        contents[name] = {}
        for file in files:
            count = 12 if file.startswith("train") else 5
            sizes = (count, 3, 3) if "images" in file else (count,)
            header = np.array([0x801 + 2 * ("images" in file), *sizes], dtype=">i4").tobytes()
            contents[name][file] = header + generator.integers(0, 10, sizes, dtype=np.uint8).tobytes()
    files = {
        name: {file: mnist.Published(0, "of the gz", hashlib.md5(content).hexdigest()) for file, content in of.items()}
        for name, of in contents.items()
    }
    monkeypatch.setattr(mnist, "FILES", files)
    monkeypatch.setattr(mnist, "CONTENT_SIZES", {file: len(content) for file, content in contents["mnist"].items()})
    mnist.load.cache_clear()
    yield contents
    mnist.load.cache_clear()


def put(folder, contents, compressed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        name = file if compressed else file.removesuffix(".gz")
        (folder / name).write_bytes(gzip.compress(content, 1) if compressed else content)


def is_read(name, folder, contents):
    loaded = data.load(name, folder)
    expected = contents[name]["train-images-idx3-ubyte.gz"][16:]
    same = loaded.train_images.numpy().tobytes() == expected and loaded.train_images.shape == (12, 1, 3, 3)
    labels = bytes(loaded.test_labels.tolist()) == contents[name]["t10k-labels-idx1-ubyte.gz"][8:]
    return same and labels and loaded.name == name and data.present(name, folder)


OTHER = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}


@pytest.mark.parametrize("compressed", [True, False], ids=["compressed anew", "not compressed"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "mnist"),
        ("mnist", ""),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "fashion_mnist"),
        ("fashion-mnist", ""),
    ],
)
def test_a_set_is_read_from_its_folder_and_is_not_the_other(tmp_path, sets, name, place, compressed):
    put(tmp_path / place, sets[name], compressed)
    assert is_read(name, tmp_path, sets)
    assert mnist.find(tmp_path, OTHER[name]) is None
    assert not data.present(OTHER[name], tmp_path)
    with pytest.raises(UsageError, match=f"holds no .*MNIST file.*{OTHER[name]}/"):
        data.load(OTHER[name], tmp_path)


def test_both_sets_may_be_in_one_folder(tmp_path, sets):
    put(tmp_path / "mnist", sets["mnist"])
    put(tmp_path / "fashion-mnist", sets["fashion-mnist"])
    assert is_read("mnist", tmp_path, sets)
    assert is_read("fashion-mnist", tmp_path, sets)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_files_in_the_folder_of_the_other_set_are_refused(tmp_path, sets, name):
    put(tmp_path / name, sets[OTHER[name]])
    assert not data.present(name, tmp_path)
    title, other = mnist.TITLES[name], mnist.TITLES[OTHER[name]]
    with pytest.raises(UsageError, match=f"train-images-idx3-ubyte.gz: is of {other}, not of {title}.*fetch it again"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("file", list(mnist.CONTENT_SIZES))
@pytest.mark.parametrize("place", ["", "mnist"])
def test_one_file_of_the_other_set_is_refused(tmp_path, sets, place, file):
    put(tmp_path / place, sets["mnist"] | {file: sets["fashion-mnist"][file]})
    with pytest.raises(UsageError, match=f"{file}: is of Fashion-MNIST, not of MNIST"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_labels_of_the_test_images_are_not_those_of_the_training_images(tmp_path, sets, name):
    file, other = "t10k-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte.gz"
    put(tmp_path, sets[name] | {file: sets[name][other]})
    with pytest.raises(UsageError, match=f"{file}: damaged"):
        data.load(name, tmp_path)


def test_a_set_without_one_of_its_files_is_not_complete(tmp_path, sets):
    put(tmp_path, sets["fashion-mnist"])
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    assert mnist.find(tmp_path, "fashion-mnist") == tmp_path
    assert not data.present("fashion-mnist", tmp_path)


def damage(kind, content):
    packed = gzip.compress(content)
    return {
        "cut off": packed[:-9],
        "longer": gzip.compress(content + b"x"),
        "shorter": gzip.compress(content[:-1]),
        "changed": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
        "wrong sum": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        "empty": b"",
        "not compressed": content,
    }[kind]


KINDS = ["cut off", "longer", "shorter", "changed", "wrong sum", "empty", "not compressed"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_a_file_must_be_what_was_published(tmp_path, sets, kind):
    file = "t10k-images-idx3-ubyte.gz"
    put(tmp_path, sets["fashion-mnist"])
    (tmp_path / file).write_bytes(damage(kind, sets["fashion-mnist"][file]))
    with pytest.raises(UsageError, match=f"{file}: damaged: MD5 is .*expected of the gz .*fetch it again") as caught:
        data.load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_would_fill_the_memory_is_not_unpacked(tmp_path, sets):
    put(tmp_path, sets["mnist"])
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(10**8)))
    with pytest.raises(UsageError, match=r"t10k-images-idx3-ubyte\.gz: damaged"):
        data.load("mnist", tmp_path)


def test_other_files_belong_to_no_set(tmp_path):
    (tmp_path / "digits.gz").write_bytes(b"")
    assert mnist.recognise(tmp_path / "digits.gz") is None
    assert mnist.recognise(tmp_path / "train-labels-idx1-ubyte.gz") is None


@pytest.fixture
def fashion_folder():
    """Give the folder of Fashion-MNIST, the reader's or that of Debian's package, or skip."""
    for place in (os.environ.get("LAYERWISE_DATA"), "/usr/share/datasets"):
        if place and Path(place).is_dir() and mnist.find(Path(place), "fashion-mnist"):
            return Path(place)
    pytest.skip("neither LAYERWISE_DATA nor Debian's dataset-fashion-mnist holds Fashion-MNIST: it is not tested")


def test_the_full_fashion_mnist_is_read(fashion_folder):
    assert data.present("fashion-mnist", fashion_folder)
    loaded = data.load("fashion-mnist", fashion_folder)
    assert loaded.title == "Fashion-MNIST: 60,000 pictures of clothes to train, 10,000 to test"
    assert loaded.train_images.shape == (60_000, 1, 28, 28)
    assert loaded.test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(loaded.train_labels).tolist() == [6000] * 10
    assert torch.bincount(loaded.test_labels).tolist() == [1000] * 10
    assert loaded.train_labels[:5].tolist() == [9, 0, 0, 3, 0]


def test_all_sets_are_listed_with_their_sizes():
    assert {entry.name: entry.size for entry in data.names()} == {
        "digits5k": 0,
        "mnist": 11_594_722,
        "fashion-mnist": 30_878_645,
        "cifar10": 170_498_071,
        "cifar100": 169_001_437,
        "imagenet": 0,
        "python-library": 0,
    }
    assert all(entry.title for entry in data.names())


def test_a_text_is_not_loaded_as_images():
    with pytest.raises(UsageError, match=r"'python-library' has no images: use library\.load"):
        data.load("python-library")


def test_only_what_is_there_is_present(tmp_path):
    found = [entry.name for entry in data.names() if data.present(entry.name, tmp_path)]
    assert found == ["digits5k", "python-library"]
    assert not data.present("mnist", None)
    assert not data.present("mnist", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="name='svhn': use one of 'digits5k', 'mnist'"):
        data.present("svhn", tmp_path)


def test_cifar_is_present_with_its_archive_or_all_its_files(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"")
    assert data.present("cifar10", tmp_path)
    place = tmp_path / "cifar100" / "cifar-100-python"
    place.mkdir(parents=True)
    (place / "train").write_bytes(b"")
    assert not data.present("cifar100", tmp_path)
    (place / "test").write_bytes(b"")
    assert data.present("cifar100", tmp_path)


def test_the_full_imagenet_is_not_loaded_but_opened(tmp_path):
    with pytest.raises(UsageError, match=r"name='imagenet'.*use open_folder"):
        data.load("imagenet", tmp_path)
    with pytest.raises(UsageError, match=r"holds no image folder: give one with train/<class>/\*\.JPEG"):
        data.open_folder(tmp_path)
    with pytest.raises(UsageError, match="data-dir=None holds no image folder"):
        data.open_folder(None)
