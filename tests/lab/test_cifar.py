import dataclasses
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from layerwise.lab import data
from layerwise.lab.data import cifar
from layerwise.lab.errors import UsageError

SMALL = {"cifar10": (dict.fromkeys(range(5), 3), 4), "cifar100": ({0: 7}, 2)}
"""Images of each training file, and of the test file, in the archives that these tests write."""

CLASSES = {"cifar10": 10, "cifar100": 100}

VERSIONS = {"python": 0, "binary": 1}


def text(value):
    """Write a string as Python 2 pickles it."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def number(value):
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def python_file(pixels, classes, label_key, coarse=None, extra=b""):
    """Write a batch as its publisher's Python 2 did: protocol 2, strings as bytes, NumPy's own state of an array."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        + b"(K\x01"
        + (number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86")
        + b"cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89"
        + text(pixels.tobytes())
        + b"tb"
    )
    entries = text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03"
    entries += text(label_key) + b"q\x04" + b"]q\x05(" + b"".join(map(number, classes)) + b"e"
    if coarse is not None:
        entries += text(b"coarse_labels") + b"](" + b"".join(map(number, coarse)) + b"e"
    entries += text(b"data") + b"q\x06" + array
    entries += text(b"filenames") + b"q\x0c](" + b"".join(text(b"cur_s_%06d.png" % n) for n in classes) + b"e"
    return b"\x80\x02}q\x01(" + entries + extra + b"u."


def binary_file(pixels, classes, coarse=None):
    """Write a batch of the binary version, record by record."""
    content = b""
    for row in range(len(pixels)):
        content += (bytes([coarse[row]]) if coarse is not None else b"") + bytes([classes[row]]) + pixels[row].tobytes()
    return content


def checksum(batches):
    """Compute the SHA-256 of pixels, then of classes, from the definition."""
    content = b"".join(pixels.tobytes() for pixels, _ in batches) + bytes(n for _, classes in batches for n in classes)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def publish(monkeypatch):
    """Return a function that writes a small data set in a published form, and gives what must be read from it.

    Sizes and checksums are those of the small files before they are altered, but for the MD5 of the archive, which is
    that of the altered one; everything else is as published.
    """

    def write(folder, name, version, packed=False, alter=None):
        published = cifar.FORMS[name]
        train, test = SMALL[name]
        forms = [
            dataclasses.replace(
                form,
                train_files=dict(zip(form.train_files, train.values(), strict=True)),
                test_files=dict.fromkeys(form.test_files, test),
            )
            for form in published
        ]
        form = forms[VERSIONS[version]]
        source = np.random.default_rng(7)
        expected, files = [], {}
        for file, count in form.files.items():
            pixels = source.integers(0, 256, (count, 3072), dtype=np.uint8)
            classes = source.integers(0, CLASSES[name], count).tolist()
            coarse = source.integers(0, 20, count).tolist() if name == "cifar100" else None
            expected.append((pixels.reshape(count, 3, 32, 32), classes))
            if version == "python":
                files[file] = python_file(pixels, classes, form.label_key, coarse)
            else:
                files[file] = binary_file(pixels, classes, coarse)
        if name in cifar.CONTENTS:
            checksums = {"training": checksum(expected[:-1]), "test": checksum(expected[-1:])}
            monkeypatch.setitem(cifar.CONTENTS, name, checksums)
        if form.file_md5s:
            md5s = {file: hashlib.md5(content, usedforsecurity=False).hexdigest() for file, content in files.items()}
            form = forms[VERSIONS[version]] = dataclasses.replace(form, file_md5s=md5s)
        if alter:
            alter(files)
        folder.mkdir(parents=True, exist_ok=True)
        if packed:
            with tarfile.open(folder / form.archive, "w:gz") as archive:
                # The order of the members is not that of the data set.
                for file, content in reversed([*files.items(), ("readme.html", b"read me")]):
                    member = tarfile.TarInfo(f"{form.folder}/{file}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
            digest = hashlib.md5((folder / form.archive).read_bytes(), usedforsecurity=False).hexdigest()
            forms[VERSIONS[version]] = dataclasses.replace(form, md5=digest)
        else:
            (folder / form.folder).mkdir()
            for file, content in files.items():
                (folder / form.folder / file).write_bytes(content)
        monkeypatch.setitem(cifar.FORMS, name, tuple(forms))
        return expected

    return write


def everything_below(folder):
    return sorted(path for path in folder.rglob("*"))


def assert_read(loaded, expected):
    *train, test = expected
    assert loaded.train_images.dtype == loaded.test_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == torch.int64
    assert np.array_equal(loaded.train_images.numpy(), np.concatenate([pixels for pixels, _ in train]))
    assert loaded.train_labels.tolist() == [label for _, classes in train for label in classes]
    assert np.array_equal(loaded.test_images.numpy(), test[0])
    assert loaded.test_labels.tolist() == test[1]


@pytest.mark.parametrize(
    ("name", "version", "packed"),
    [
        ("cifar10", "python", False),
        ("cifar10", "python", True),
        ("cifar10", "binary", False),
        ("cifar10", "binary", True),
        ("cifar100", "python", False),
        ("cifar100", "python", True),
        ("cifar100", "binary", True),
    ],
)
def test_every_form_that_can_be_checked_is_read_in_file_order(tmp_path, publish, name, version, packed):
    expected = publish(tmp_path, name, version, packed)
    before = everything_below(tmp_path)
    assert_read(cifar.load(name, tmp_path), expected)
    assert everything_below(tmp_path) == before  # nothing was unpacked to the disk


def test_a_colour_is_a_plane_and_a_plane_is_row_by_row(tmp_path, publish):
    publish(tmp_path, "cifar10", "binary")
    content = (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    images = cifar.load("cifar10", tmp_path).test_images
    for number, colour, row, column in ((0, 2, 5, 9), (0, 0, 31, 0), (3, 1, 7, 30)):
        place = number * 3073 + 1 + colour * 1024 + row * 32 + column
        assert images[number, colour, row, column] == content[place]


def test_the_published_files_are_known_by_their_checksums():
    assert cifar.CONTENTS == {
        "cifar10": {
            "training": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
            "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
        }
    }
    assert {form.folder: form.file_md5s for forms in cifar.FORMS.values() for form in forms if form.file_md5s} == {
        "cifar-10-batches-py": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        "cifar-100-python": {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    }


def changed(content, place):
    """Change the lowest bit of one byte: a class, or a pixel, stays one."""
    altered = bytearray(content)
    altered[place] ^= 1
    return bytes(altered)


@pytest.mark.parametrize("place", [0, 1, -1], ids=["a class", "the first pixel", "the last pixel"])
@pytest.mark.parametrize(("file", "part"), [("data_batch_3.bin", "training"), ("test_batch.bin", "test")])
def test_one_wrong_bit_of_unpacked_cifar_10_is_refused(tmp_path, publish, file, part, place):
    def alter(files):
        files[file] = changed(files[file], place)

    publish(tmp_path, "cifar10", "binary", alter=alter)
    expected = cifar.CONTENTS["cifar10"][part]
    words = f"the {part} images are not those of CIFAR-10: SHA-256 .* expected {expected}; fetch cifar-10-binary"
    with pytest.raises(UsageError, match=words) as caught:
        cifar.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


def test_random_bytes_of_the_right_size_are_not_cifar_10(tmp_path, publish):
    def alter(files):
        source = np.random.default_rng(8)
        for file, content in files.items():
            pixels = source.integers(0, 256, (len(content) // 3073, 3072), dtype=np.uint8)
            files[file] = binary_file(pixels, source.integers(0, 10, len(pixels)).tolist())

    publish(tmp_path, "cifar10", "binary", alter=alter)
    with pytest.raises(UsageError, match="the training images are not those of CIFAR-10"):
        cifar.load("cifar10", tmp_path)


def test_files_in_another_order_are_not_cifar_10(tmp_path, publish):
    def alter(files):
        files["data_batch_1.bin"], files["data_batch_2.bin"] = files["data_batch_2.bin"], files["data_batch_1.bin"]

    publish(tmp_path, "cifar10", "binary", alter=alter)
    with pytest.raises(UsageError, match="the training images are not those of CIFAR-10"):
        cifar.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "data_batch_4"), ("cifar10", "test_batch"), ("cifar100", "train"), ("cifar100", "test")],
)
def test_one_wrong_bit_of_an_unpacked_pickle_is_refused_before_it_is_unpickled(
    tmp_path, publish, name, file, monkeypatch
):
    def alter(files):
        files[file] = changed(files[file], -2000)

    publish(tmp_path, name, "python", alter=alter)
    read, loads = [], pickle.loads
    monkeypatch.setattr(pickle, "loads", lambda content, **options: read.append(content) or loads(content, **options))
    form = cifar.FORMS[name][0]
    with pytest.raises(UsageError, match=f"{file}: damaged: MD5 is .*, expected {form.file_md5s[file]}; fetch cifar-1"):
        cifar.load(name, tmp_path)
    assert {hashlib.md5(content).hexdigest() for content in read} <= set(form.file_md5s.values())


def test_unpacked_binary_cifar_100_is_not_read_and_its_archive_beside_it_is_taken(tmp_path, publish):
    publish(tmp_path, "cifar100", "binary")
    assert cifar.find("cifar100", tmp_path) is None
    words = r"expected cifar-100-python\.tar\.gz or .*, or cifar-100-binary\.tar\.gz, not unpacked; fetch it with"
    with pytest.raises(UsageError, match=words):
        cifar.load("cifar100", tmp_path)
    (tmp_path / "below").mkdir()
    expected = publish(tmp_path / "below", "cifar100", "binary", packed=True)
    (tmp_path / "below" / "cifar-100-binary.tar.gz").rename(tmp_path / "cifar-100-binary.tar.gz")
    assert_read(cifar.load("cifar100", tmp_path), expected)


@pytest.mark.parametrize("place", ["cifar10", "", "cifar-10-batches-py"])
def test_the_files_may_lie_in_a_subfolder_in_the_folder_or_be_the_folder(tmp_path, publish, place):
    if place == "cifar-10-batches-py":
        expected = publish(tmp_path, "cifar10", "python")
        assert cifar.find("cifar10", tmp_path / place)[1] == tmp_path / place
        assert_read(cifar.load("cifar10", tmp_path / place), expected)
    else:
        expected = publish(tmp_path / place, "cifar10", "python")
        assert cifar.find("cifar10", tmp_path)[1] == tmp_path / place / "cifar-10-batches-py"
        assert_read(cifar.load("cifar10", tmp_path), expected)


def test_the_unpacked_python_version_comes_first(tmp_path):
    for form in cifar.FORMS["cifar10"]:
        (tmp_path / form.archive).touch()
    assert cifar.find("cifar10", tmp_path)[1] == tmp_path / "cifar-10-python.tar.gz"
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert cifar.find("cifar10", tmp_path)[1] == tmp_path / "cifar-10-python.tar.gz"
    (tmp_path / "cifar-10-batches-py" / "test_batch").touch()
    assert cifar.find("cifar10", tmp_path)[1] == tmp_path / "cifar-10-batches-py"
    assert cifar.find("cifar100", tmp_path) is None


def test_the_data_are_read_once_and_by_the_common_function(tmp_path, publish):
    expected = publish(tmp_path, "cifar100", "binary", packed=True)
    loaded = data.load("cifar100", tmp_path)
    assert_read(loaded, expected)
    assert data.load("cifar100", tmp_path) is loaded
    assert (loaded.name, loaded.title) == ("cifar100", "CIFAR-100: 7 photographs to train, 2 to test")
    with pytest.raises(UsageError, match="name='cifar100' with data_dir='None'"):
        data.load("cifar100")


def test_the_published_archives_are_known_by_their_md5():
    assert {form.archive: form.md5 for forms in cifar.FORMS.values() for form in forms} == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    }


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_archive_of_another_md5_is_refused_before_it_is_opened(tmp_path, name, version):
    form = cifar.FORMS[name][VERSIONS[version]]
    (tmp_path / form.archive).write_bytes(b"not this")
    with pytest.raises(UsageError) as caught:
        cifar.load(name, tmp_path)
    words = str(caught.value)
    assert form.archive in words
    assert f"expected {form.md5}" in words
    assert hashlib.md5(b"not this", usedforsecurity=False).hexdigest() in words
    assert "8 bytes" in words
    assert "fetch" in words
    assert "\n" not in words


def test_a_missing_file_is_named(tmp_path, publish):
    publish(tmp_path, "cifar10", "binary", alter=lambda files: files.pop("data_batch_4.bin"))
    with pytest.raises(UsageError, match=r"data_batch_4\.bin.*fetch cifar-10-binary\.tar\.gz"):
        cifar.load("cifar10", tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
@pytest.mark.parametrize(
    ("version", "file", "expected"),
    [("python", "data_batch_2", "MD5 is "), ("binary", "data_batch_2.bin", "5000 bytes, expected 9219 for 3 images")],
)
def test_a_truncated_file_is_named_with_what_was_expected(tmp_path, publish, version, file, expected, packed):
    def alter(files):
        files[file] = files[file][:5000]

    publish(tmp_path, "cifar10", version, packed, alter=alter)
    with pytest.raises(UsageError, match=rf"{file}: damaged.*: {expected}.*; fetch"):
        cifar.load("cifar10", tmp_path)


def test_classes_that_the_data_set_does_not_have_are_refused(tmp_path, publish):
    def alter(files):
        files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]

    publish(tmp_path, "cifar10", "binary", alter=alter)
    with pytest.raises(UsageError, match=r"the test images are not those of CIFAR-10.*; fetch"):
        cifar.load("cifar10", tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, publish, packed):
    mark = tmp_path / "was run"
    command = text(f"touch '{mark}'".encode())
    run = b"cposix\nsystem\n" + command + b"\x85R"

    def alter(files):
        files["data_batch_1"] = python_file(
            np.zeros((3, 3072), dtype=np.uint8), [1] * 3, b"labels", extra=text(b"more") + run
        )

    publish(tmp_path, "cifar10", "python", packed, alter=alter)
    with pytest.raises(UsageError, match=r"data_batch_1: damaged: MD5 is .*fetch"):
        cifar.load("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_without_the_data_is_named_with_what_was_expected(tmp_path, name):
    assert cifar.find(name, tmp_path) is None
    archive = cifar.FORMS[name][0].archive
    with pytest.raises(UsageError, match=rf"data-dir='.*' holds no CIFAR-100? file: expected {archive} or cifar-10"):
        cifar.load(name, tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"data-dir='.*nowhere' holds no CIFAR-10 file: .*cifar-10-python\.tar\.gz"):
        cifar.load("cifar10", tmp_path / "nowhere")


@pytest.fixture
def published():
    """Return a function that gives the folder of a published data set, or skips."""

    def look(name):
        place = os.environ.get("LAYERWISE_DATA")
        if not place:
            pytest.skip(f"LAYERWISE_DATA is not set: the published files of {name} are not tested")
        if cifar.find(name, Path(place)) is None:
            pytest.skip(f"LAYERWISE_DATA holds no {name}: its published files are not tested")
        return Path(place)

    return look


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_published_files_are_read(published, name, classes):
    loaded = data.load(name, published(name))
    assert loaded.train_images.shape == (50_000, 3, 32, 32)
    assert loaded.test_images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(loaded.train_labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(loaded.test_labels).tolist() == [10_000 // classes] * classes


def test_the_published_cifar_10_has_the_statistics_of_the_recipe(published):
    loaded = data.load("cifar10", published("cifar10"))
    assert loaded.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    mean = [loaded.train_images[:, n].to(torch.float32).mean().item() / 255 for n in range(3)]
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=6e-5)
