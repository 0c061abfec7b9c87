"""CIFAR-10 and CIFAR-100 from their publisher's files.

Layout: ``<folder>`` or ``<folder>/cifar10`` (``cifar100``) holds one of the published archives, or the folder that
comes out of it, or the files of that folder. There are two versions. In the binary one a file is a row of records:
one byte for the class (CIFAR-100: two, the coarse class before the fine one), then the red, the green and the blue
plane of 32 x 32 bytes. In the python one a file is a pickled dictionary. Archives are read in memory; nothing is
unpacked to the disk.

What is read is what was published: an archive by its MD5; a file of the python version by its MD5, before it is
unpickled; CIFAR-10, in whatever form, by the SHA-256 of its pixels and classes. Unpacked files of CIFAR-100's binary
version have no known checksum and are not read.
"""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.lab.data import Dataset
from layerwise.lab.data.cifar_forms import CHANNELS, CONTENTS, FORMS, PIXELS, SIDE, TITLES, Form
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes

LARGEST = 1 << 28
"""Bytes of a file."""


def _remedy(form: Form) -> str:
    """Say what to do about a file that cannot be used."""
    return f"fetch {form.archive} (MD5 {form.md5}) again from www.cs.toronto.edu/~kriz/cifar.html"


def _search(name: str, folder: Path) -> tuple[Form, Path] | None:
    """Look for a form of a data set: the archive, or the folder with at least one of the files that have checksums."""
    if name not in FORMS:
        raise UsageError(f"name={name!r}: use one of {', '.join(map(repr, FORMS))}")
    if not folder.is_dir():
        first, second = FORMS[name]
        raise UsageError(
            f"data-dir={str(folder)!r} is not a folder: give an existing one that holds {first.archive} or "
            f"{second.archive}, or what comes out of it"
        )
    for place in (folder / name, folder):
        for form in FORMS[name]:
            for candidate in (place / form.folder, place) if name in CONTENTS or form.file_md5s else ():
                if any((candidate / file).is_file() for file in form.files):
                    return form, candidate
            if (place / form.archive).is_file():
                return form, place / form.archive
    return None


def find(name: str, folder: Path) -> Path | None:
    """Look for CIFAR-10 or CIFAR-100 in a folder.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        folder: where to look; its subfolder called as the data set is looked at first.

    Returns:
        The folder with at least one of the published files, or the archive, or None. What is unpacked comes
        before the archive, and the python version before the binary one.

    Raises:
        UsageError: unknown name, or the folder does not exist.
    """
    found = _search(name, folder)
    return found[1] if found else None


def _check_file(form: Form, name: str, source: str, content: bytes) -> None:
    """Refuse a file that is not the published one: by its MD5, or by its size where ``_check_content`` follows."""
    expected = form.file_md5s.get(name)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest() if expected else None
    if found != expected:
        raise UsageError(f"{source}: damaged: MD5 is {found}, expected {expected}; {_remedy(form)}")
    size = form.files[name] * (form.label_bytes + PIXELS)
    if not expected and len(content) != size:
        raise UsageError(
            f"{source}: damaged or incomplete: {len(content)} bytes, expected {size} for {form.files[name]} images; "
            f"{_remedy(form)}"
        )


def _check_content(name: str, form: Form, place: Path, part: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse pixels and classes that were not published, where their checksum is known."""
    expected = CONTENTS.get(name, {}).get(part)
    if expected is None:
        return
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().astype(np.uint8).data)
    if digest.hexdigest() != expected:
        raise UsageError(
            f"{place}: the {part} images are not those of {TITLES[name]}: SHA-256 of pixels and classes is "
            f"{digest.hexdigest()}, expected {expected}; {_remedy(form)}"
        )


def _from_folder(form: Form, folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Read the files of a folder, one at a time: name, where it is, content."""
    for name, count in form.files.items():
        path = folder / name
        try:
            yield name, str(path), read_bytes(path, LARGEST, links=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"{path}: {reason}; expected a file of {count} images; {_remedy(form)}") from error


def _from_archive(form: Form, path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Check the archive, then read its files, one at a time: name, where it is, content."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.md5(usedforsecurity=False)
            while block := stream.read(1 << 20):
                digest.update(block)
            if digest.hexdigest() != form.md5:
                raise UsageError(
                    f"{path}: damaged: MD5 is {digest.hexdigest()} ({stream.tell()} bytes), expected {form.md5}; "
                    f"{_remedy(form)}"
                )
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:gz") as archive:
                for member in archive:
                    name = member.name.removeprefix(f"{form.folder}/")
                    if member.isfile() and name in form.files and (content := archive.extractfile(member)):
                        yield name, f"{path}:{member.name}", content.read()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); {_remedy(form)}") from error


def _decode(form: Form, content: bytes) -> tuple[np.ndarray, Any]:
    """Give the pixels of a file, shape (n, 3072), and its classes, from 0."""
    if form.label_bytes:
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, form.label_bytes + PIXELS)
        return records[:, form.label_bytes :], records[:, form.label_bytes - 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how NumPy's types were described when the files were written
        table = pickle.loads(content, encoding="bytes")
    return table[b"data"], table[form.label_key]


@lru_cache(maxsize=1)
def load(name: str, folder: Path) -> Dataset:
    """Read CIFAR-10 or CIFAR-100.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``, the latter with its 100 fine classes.
        folder: the folder of the files or of the archive, or the one above.

    Returns:
        50,000 training and 10,000 test images of 3 x 32 x 32 pixels (red, green, blue), uint8, in file order.

    Raises:
        UsageError: unknown name; nothing found; or a file is missing, or is not what was published.
    """
    found = _search(name, folder)
    if found is None:
        first, second = FORMS[name]
        raise UsageError(
            f"data-dir={str(folder)!r} holds no {TITLES[name]} file: expected {first.archive} or {first.folder}/, or "
            f"{second.archive}{f' or {second.folder}/' if name in CONTENTS else ', not unpacked'}; fetch it with  "
            f"layerwise data {name}"
        )
    form, place = found
    counts = list(form.files.values())
    images = torch.empty((sum(counts), CHANNELS, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.empty(sum(counts), dtype=torch.int64)
    room = dict(zip(form.files, zip(images.split(counts), labels.split(counts), strict=True), strict=True))
    for file, source, content in (_from_folder if place.is_dir() else _from_archive)(form, place):
        _check_file(form, file, source, content)
        image_room, label_room = room[file]
        image_room.flatten(1).numpy()[...], label_room.numpy()[...] = _decode(form, content)
    train_count = sum(form.train_files.values())
    _check_content(name, form, place, "training", images[:train_count], labels[:train_count])
    _check_content(name, form, place, "test", images[train_count:], labels[train_count:])
    return Dataset(
        name=name,
        title=f"{TITLES[name]}: {train_count:,} photographs to train, {len(labels) - train_count:,} to test",
        train_images=images[:train_count],
        train_labels=labels[:train_count],
        test_images=images[train_count:],
        test_labels=labels[train_count:],
    )
