import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.lab import data
from layerwise.lab.data import folder, photographs
from layerwise.lab.data.folder import ImageFolder
from layerwise.lab.errors import UsageError

TREE = {
    "train": {"b": ["3.PNG", "1.JPEG", "2.jpg"], "a": ["x.JPEG", "w.png"], "c": ["z.jpeg"]},
    "val": {"b": ["5.JPEG"], "a": ["5.png"], "c": ["7.png", "6.JPG"]},
}
ORDER = ["a/w.png", "a/x.JPEG", "b/1.JPEG", "b/2.jpg", "b/3.PNG", "c/z.jpeg"]
TEST_ORDER = ["a/5.png", "b/5.JPEG", "c/6.JPG", "c/7.png"]


def photograph(number, width, height):
    """Make an image of colours that change slowly, with some noise."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b) / 9) for a, b in generator.uniform(0.3, 1, (3, 2))]
    pixels = 127 + 90 * np.stack(waves, axis=2) + generator.normal(0, 9, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def root(tmp_path):
    """Write real JPEG and PNG files of several sizes in ImageNet's layout."""
    number = 0
    for part, classes in TREE.items():
        for name, files in classes.items():
            place = tmp_path / "photos" / part / name
            place.mkdir(parents=True)
            for file in files:
                number += 1
                photograph(number, 20 + 3 * number, 31 - number).save(place / file)
    return tmp_path / "photos"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def opened(root, cache):
    """Return a function that opens the folder."""
    return lambda **options: ImageFolder(root, **{"side": 16, "crop": 13, "cache": cache, **options})


def train_batch(folder, index, generator):
    return folder.decoded(folder.drawn(index, generator))


def batches_to_test(folder, size):
    return map(folder.decoded, folder.test_jobs(size))


def slowly_resized(pixels, side):
    """Interpolate in float64, pixel by pixel."""
    height, width, _ = pixels.shape
    result = np.empty((side, side, 3))
    for i in range(side):
        for j in range(side):
            y = min(max((i + 0.5) * height / side - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / side - 0.5, 0), width - 1)
            value = np.zeros(3)
            for row in range(int(y), min(int(y) + 2, height)):
                for column in range(int(x), min(int(x) + 2, width)):
                    value += pixels[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
            result[i, j] = value
    return result


def read(path, side=16):
    """Read an image by the slow way, as float64 of shape (3, side, side) of whole numbers."""
    with Image.open(path) as image:
        return np.floor(slowly_resized(np.asarray(image.convert("RGB"), dtype=float), side) + 0.5).transpose(2, 0, 1)


def slow_mean(root):
    return sum(read(root / "train" / file) for file in ORDER) / len(ORDER)


@pytest.mark.parametrize(("height", "width"), [(31, 20), (9, 33), (16, 40), (7, 5), (1, 1), (16, 16), (200, 150)])
def test_resizing_interpolates_between_the_nearest_four_pixels(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = photographs.resized(pixels, 16)
    assert found.shape == (16, 16, 3)
    assert found.dtype == np.uint8
    assert abs(found - slowly_resized(pixels, 16)).max() <= 0.5 + 1e-4
    # Torch's own, which agrees with OpenCV's on where the pixels are.
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)[0]
    assert abs(found - expected.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-4


def test_a_folder_is_listed_by_class_and_name(opened):
    opened = opened()
    assert (opened.name, opened.classes, opened.class_names) == ("photos", 3, ("a", "b", "c"))
    assert opened.title == "an image folder: 3 classes, 6 photographs to train, 4 to test"
    assert (opened.train_count, opened.test_count) == (6, 4)
    assert opened.train_labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert opened.test_labels.tolist() == [0, 1, 2, 2]
    assert opened.train_labels.dtype == torch.int64


def test_only_images_count(root, opened):
    for name in ("notes.txt", ".hidden.JPEG", "train/readme.md", "train/a/list.csv", "train/a/._w.png"):
        (root / name).write_bytes(b"")
    (root / "train" / ".thumbnails").mkdir()
    (root / "train" / "a" / "folder.png").mkdir()
    assert opened().train_count == 6
    assert opened().classes == 3


def test_the_mean_image_is_that_of_all_training_images(opened, root):
    mean = opened().mean
    assert mean.dtype == np.float32
    assert mean.shape == (3, 16, 16)
    np.testing.assert_allclose(mean, slow_mean(root), rtol=1e-6)


def test_a_training_batch_is_a_crop_of_image_minus_mean_perhaps_mirrored(opened, root):
    mean, opened = slow_mean(root), opened(crop=14)
    generator, seen = torch.Generator().manual_seed(1), []
    whole = {number: read(root / "train" / ORDER[number]) - mean for number in (4, 0, 5)}
    for _ in range(200):
        images, labels = train_batch(opened, torch.tensor([4, 0, 5, 0]), generator)
        assert images.shape == (4, 3, 14, 14)
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert labels.tolist() == [1, 0, 2, 0]
        for image, number in zip(images.numpy(), (4, 0, 5, 0), strict=True):
            places = [
                (top, left, mirrored)
                for top in range(3)
                for left in range(3)
                for mirrored in (False, True)
                if np.allclose(
                    image[:, :, ::-1] if mirrored else image,
                    whole[number][:, top : top + 14, left : left + 14],
                    rtol=1e-5,
                    atol=1e-4,
                )
            ]
            assert len(places) == 1
            seen += places
    counts = [seen.count((top, left, m)) for top in range(3) for left in range(3) for m in (False, True)]
    # 800 draws of 18 places: 44 each, with a standard deviation of 6.5.
    assert min(counts) > 44 - 4 * 6.5
    assert max(counts) < 44 + 4 * 6.5


def test_the_test_images_are_the_middle_in_order(opened, root):
    mean, opened = slow_mean(root), opened()
    batches = list(batches_to_test(opened, 3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [2]]
    found = torch.cat([images for images, _ in batches])
    assert found.dtype == torch.float32
    # (16 - 13) / 2 rounded down, as Caffe does.
    expected = np.stack([(read(root / "val" / file) - mean)[:, 1:14, 1:14] for file in TEST_ORDER])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_a_crop_of_the_whole_side_has_one_place(opened):
    opened = opened(crop=16)
    images, _ = train_batch(opened, torch.tensor([1]), torch.Generator().manual_seed(0))
    mirrored, _ = train_batch(opened, torch.tensor([1] * 9), torch.Generator().manual_seed(1))
    assert all(torch.equal(image, images[0]) or torch.equal(image.flip(-1), images[0]) for image in mirrored)


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 7}, {"memory_bytes": 0}, {"memory_bytes": 6 * 768}])
def test_batches_do_not_depend_on_threads_or_memory(opened, options):
    index = torch.tensor([3, 1, 4, 1, 5])

    def make(reader):
        generator = torch.Generator().manual_seed(3)
        batches = [train_batch(reader, index, generator)[0] for _ in range(3)]
        return torch.cat([*batches, *(images for images, _ in batches_to_test(reader, 2))])

    assert torch.equal(make(opened(**options)), make(opened()))


def test_other_random_numbers_and_those_of_torch_are_not_touched(opened):
    before = torch.get_rng_state()
    train_batch(opened(), torch.tensor([0]), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


SIZE = 3 * 16 * 16


@pytest.mark.parametrize(
    ("memory", "train_kept", "test_kept"),
    [(10 * SIZE, True, True), (10 * SIZE - 1, True, False), (6 * SIZE - 1, False, False), (0, False, False)],
)
def test_images_stay_in_memory_if_they_fit(opened, root, memory, train_kept, test_kept):
    opened = opened(memory_bytes=memory)
    _ = opened.mean
    list(batches_to_test(opened, 3))
    (root / "train" / ORDER[0]).unlink()
    (root / "val" / TEST_ORDER[0]).unlink()
    generator = torch.Generator()
    for kept, make in (
        (train_kept, lambda: train_batch(opened, torch.tensor([0]), generator)),
        (test_kept, lambda: list(batches_to_test(opened, 3))),
    ):
        if kept:
            make()
        else:
            with pytest.raises(UsageError, match=r"(w|5)\.png: cannot be read as an image \(.*No such file"):
                make()


def test_the_mean_image_is_kept_outside_the_data(opened, root, cache, monkeypatch):
    before = sorted(root.rglob("*"))
    first = opened().mean
    assert len(list(cache.glob("mean-*.npy"))) == 1
    monkeypatch.setattr(photographs, "decoded", None)  # it is read, and not computed
    assert np.array_equal(opened().mean, first)
    assert sorted(root.rglob("*")) == before


def test_another_side_another_file_and_another_size_have_a_mean_of_their_own(opened, root, cache):
    _ = opened().mean
    _ = opened(side=15).mean
    assert len(list(cache.glob("mean-*.npy"))) == 2
    photograph(99, 40, 40).save(root / "train" / "a" / "x.JPEG")
    changed = opened().mean
    assert len(list(cache.glob("mean-*.npy"))) == 3
    np.testing.assert_allclose(changed, slow_mean(root), rtol=1e-6)
    photograph(98, 40, 40).save(root / "train" / "a" / "y.JPEG")
    _ = opened().mean
    assert len(list(cache.glob("mean-*.npy"))) == 4


def test_a_digest_is_that_of_classes_names_and_sizes_in_both_parts(root, tmp_path, opened):
    lines = {}
    for part, order in (("train", ORDER), ("val", TEST_ORDER)):
        lines[part] = "".join(f"{file}\0{(root / part / file).stat().st_size}\n" for file in order)
    text = "image folder 1\nto train\n" + lines["train"] + "to test\n" + lines["val"]
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert opened().digest == expected
    assert opened(side=15, crop=12, memory_bytes=0).digest == expected
    shutil.copytree(root, tmp_path / "a copy")
    assert ImageFolder(tmp_path / "a copy").digest == expected


def _longer(root):
    with (root / "val" / "b" / "5.JPEG").open("ab") as stream:
        stream.write(b"x")


@pytest.mark.parametrize(
    "change",
    [
        _longer,
        lambda root: (root / "train" / "a" / "x.JPEG").rename(root / "train" / "a" / "y.JPEG"),
        lambda root: (root / "train" / "a" / "x.JPEG").rename(root / "train" / "b" / "x.JPEG"),
        lambda root: (root / "train" / "a" / "x.JPEG").unlink(),
        lambda root: (root / "train" / "a" / "x.JPEG").rename(root / "val" / "a" / "x.JPEG"),
        lambda root: [(root / part / "c").rename(root / part / "d") for part in ("train", "val")],
    ],
    ids=["another size", "another name", "another class", "one less", "another part", "another class's name"],
)
def test_another_folder_has_another_digest(root, opened, change):
    before = opened().digest
    change(root)
    assert opened().digest != before


def test_what_is_no_image_changes_no_digest(root, opened):
    before = opened().digest
    (root / "train" / "a" / "list.csv").write_bytes(b"1")
    assert opened().digest == before


@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"PK\x03\x04junk", None], ids=["empty", "junk", "an archive", "another shape"]
)
def test_a_damaged_mean_is_computed_again(opened, cache, junk):
    expected = opened().mean
    (kept,) = cache.glob("mean-*.npy")
    if junk is None:
        np.save(kept, np.zeros((3, 4, 4), dtype=np.float32))
    else:
        kept.write_bytes(junk)
    assert np.array_equal(opened().mean, expected)
    assert np.array_equal(np.load(kept), expected)


def test_a_cache_that_cannot_be_written_is_told_and_harmless(opened, cache):
    cache.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"mean image cannot be kept in .*cache=\.\.\."):
        mean = opened().mean
    assert mean.shape == (3, 16, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder has another name on this system")
def test_without_a_cache_folder_the_users_own_is_taken(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    _ = ImageFolder(root, side=16, crop=13).mean
    assert {path.suffix for path in (tmp_path / "user" / "layerwise").iterdir()} == {".npy"}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_kind_of_png_becomes_red_green_blue(tmp_path, mode):
    path = tmp_path / "image.png"
    image = photograph(1, 30, 20)
    image = Image.fromarray(np.full((20, 30), 300, dtype=np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(path)
    assert photographs.decoded(path, 8).shape == (3, 8, 8)


def test_a_jpeg_of_four_inks_becomes_red_green_blue(tmp_path):
    photograph(1, 30, 20).convert("CMYK").save(tmp_path / "image.JPEG")
    assert photographs.decoded(tmp_path / "image.JPEG", 8).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["empty", "text", "cut off"])
@pytest.mark.parametrize("file", ["x.JPEG", "w.png"])
def test_a_damaged_image_is_named(opened, root, kind, file):
    path = root / "train" / "a" / file
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not an image", "cut off": content[: len(content) // 2]}[kind])
    with pytest.raises(UsageError, match=f"a.{file}: cannot be read as an image .*replace it, or remove it") as caught:
        _ = opened().mean
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=file):
        train_batch(opened(), torch.tensor([0, 1]), torch.Generator())


def test_an_image_that_is_gone_is_named(opened, root):
    opened = opened()
    (root / "train" / ORDER[2]).unlink()
    with pytest.raises(UsageError, match=r"1\.JPEG: No such file"):
        _ = opened.mean


@pytest.mark.parametrize(("part", "other"), [("train", "val"), ("val", "train")])
def test_a_class_of_one_part_only_is_named(opened, root, part, other):
    (root / part / "d").mkdir()
    photograph(0, 9, 9).save(root / part / "d" / "1.png")
    with pytest.raises(UsageError, match=f"the class 'd' is in {part}/ and not in {other}/ \\(1 such classes\\)"):
        opened()


def test_an_empty_class_is_named(opened, root):
    (root / "val" / "b" / "5.JPEG").unlink()
    with pytest.raises(UsageError, match=r"val/b holds no image.*put \.jpeg, \.jpg, \.png files"):
        opened()


def test_validation_images_that_are_not_sorted_into_classes_are_told(opened, root):
    for path in list((root / "val").iterdir()):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    photograph(0, 9, 9).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match=r"val holds no folder of a class: sort the images into val/<class>/"):
        opened()


def test_a_missing_part_is_named(opened, root):
    (root / "val").rename(root / "test")
    with pytest.raises(UsageError, match=r"val: No such file.*expected folders of images"):
        opened()


@pytest.mark.parametrize("place", ["", "imagenet"])
def test_an_image_folder_is_found_by_its_parts(root, tmp_path, place):
    if place:
        root.rename(tmp_path / place)
        root = tmp_path
    assert folder.find(root) == (root / place if place else root)
    assert data.present("imagenet", root)
    assert data.open_folder(root, side=16, crop=13).classes == 3
    assert folder.find(root / "nowhere") is None


@pytest.fixture
def slice_of_imagenet():
    """Give the folder of the real photographs, or skip."""
    place = os.environ.get("LAYERWISE_DATA")
    if not place or not (Path(place) / "imagenette-slice" / "train").is_dir():
        pytest.skip("LAYERWISE_DATA holds no imagenette-slice: real photographs are not tested")
    return Path(place) / "imagenette-slice"


def test_real_photographs_are_read_as_torch_resizes_them(slice_of_imagenet, cache):
    opened = data.open_folder(slice_of_imagenet, cache=cache)
    assert (opened.classes, opened.train_count, opened.test_count) == (10, 400, 100)
    assert torch.bincount(opened.train_labels).tolist() == [40] * 10
    mean = torch.from_numpy(opened.mean)
    # ImageNet's mean is 123, 117, 104; this slice holds fish and parachutes in the same light.
    assert mean.mean((1, 2)).tolist() == pytest.approx([123, 117, 104], abs=12)
    images, labels = train_batch(opened, torch.arange(0, 400, 80), torch.Generator().manual_seed(0))
    assert images.shape == (5, 3, 227, 227)
    assert labels.tolist() == [0, 2, 4, 6, 8]
    first, _ = next(batches_to_test(opened, 1))
    path = min((slice_of_imagenet / "val" / opened.class_names[0]).iterdir())
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(pixels, size=(256, 256), mode="bilinear", align_corners=False)[0]
    assert (first[0] - (resized - mean)[:, 14:241, 14:241]).abs().max() <= 0.5 + 1e-3
