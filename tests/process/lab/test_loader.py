"""Processes that decode photographs ahead give the same batches as the process that trains."""

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.lab.data.folder import ImageFolder
from layerwise.lab.errors import UsageError
from layerwise.lab.training.streams import FolderStream

CLASSES, EACH = ("a", "b"), 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write photographs of noise in ImageNet's layout."""
    place, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in CLASSES:
            (place / part / name).mkdir(parents=True)
            for number in range(EACH):
                pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / part / name / f"{number}.jpg")
    return place


def stream(root, loaders, **how):
    folder = ImageFolder(root, side=16, crop=13, memory_bytes=how.pop("memory_bytes", 0), cache=root / "cache")
    return FolderStream(folder=folder, batch_size=4, test_batch_size=3, seed=1, loaders=loaders, **how)


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    return all(torch.equal(a, b) for left, right in zip(ours, theirs, strict=True) for a, b in zip(left, right))  # noqa: B905


@pytest.mark.dist
@pytest.mark.full
def test_batches_decoded_ahead_are_the_same_to_the_bit(root):
    plain, ahead = stream(root, 0), stream(root, 2)
    before = torch.get_rng_state()
    assert same(ahead.batches(1), plain.batches(1))
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from it
    assert same(ahead.batches(2, 1), plain.batches(2, 1))
    left = ahead.batches(3)
    next(left)  # a run that ends within an epoch leaves batches behind
    assert same(ahead.tests(), plain.tests())
    assert same(left, plain.batches(3, 1))  # a test within an epoch takes none of its batches
    next(ahead.batches(4))
    assert same(ahead.batches(5), plain.batches(5))


@pytest.mark.dist
@pytest.mark.full
def test_a_damaged_photograph_is_named_by_one_line(root):
    ahead = stream(root, 1)
    damaged = root / "val" / "a" / "1.jpg"
    content = damaged.read_bytes()
    damaged.write_bytes(b"no photograph")
    try:
        with pytest.raises(UsageError, match=r"1\.jpg: cannot be read as an image") as caught:
            list(ahead.tests())
        assert "\n" not in str(caught.value)
    finally:
        damaged.write_bytes(content)


def test_photographs_that_stay_in_memory_need_no_other_process(root):
    assert stream(root, 2, memory_bytes=1 << 20).loaders == 0


def test_processes_that_share_a_run_decode_their_parts(root):
    whole, parts = list(stream(root, 0).batches(1)), [list(stream(root, 0, share=(k, 2)).batches(1)) for k in (0, 1)]
    for number, (batch, *shares) in enumerate(zip(whole, *parts, strict=True)):
        for place, entry in enumerate(batch):
            assert torch.equal(torch.cat([share[place] for share in shares]), entry)
            assert len(shares[0][place]) == len(entry) // 2
        assert stream(root, 0).whole(number) == len(batch[1])
    # A batch that cannot be divided comes whole to each: the last one of ten photographs in fours, among four.
    for own in (list(stream(root, 0, share=(k, 4)).batches(1)) for k in range(4)):
        assert [len(labels) for _, labels in own] == [1, 1, 2]
        assert same(own[2:], whole[2:])


def test_a_share_of_a_batch_is_drawn_as_the_whole_is_when_a_run_goes_on(root):
    assert same(stream(root, 0, share=(1, 2)).batches(1, 1), list(stream(root, 0, share=(1, 2)).batches(1))[1:])
