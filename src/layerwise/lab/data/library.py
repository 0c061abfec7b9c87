"""Python's own library as a text for language models, so that nothing is downloaded: every ``.py`` file but tests.

A file belongs to training, validation or test by its name alone, whatever the version of Python. Another version has
other words, and so another digest: it is another data set.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import read_bytes

PARTS: tuple[str, ...] = ("train", "validation", "test")
SHARE = 20
"""One in so many files is for validation, and one for tests."""

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders that are not read: tests, and what other packages have put there."""

MACHINES_OWN = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""How the names of files begin that differ between machines of one version."""

LARGEST_FILE = 1 << 24
_NOT_ASCII = bytes(range(128, 256))


@dataclass(frozen=True, eq=False)
class Library:
    """Three texts, uint8, a number below 128 a character, with the number of files and the SHA-256 of each."""

    train: Tensor
    validation: Tensor
    test: Tensor
    files: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the three."""
        return hashlib.sha256(" ".join(self.digests).encode()).hexdigest()

    @property
    def title(self) -> str:
        """Say what the parts are, each with its SHA-256."""
        texts = (self.train, self.validation, self.test)
        words = (
            f"{name} {len(text):,} characters of {count} files, SHA-256 {digest}"
            for name, text, count, digest in zip(PARTS, texts, self.files, self.digests, strict=True)
        )
        return f"Python {platform.python_version()}'s own library without tests: {'; '.join(words)}."


def part_of(name: str) -> str:
    """Give the part that a file belongs to, from its path inside the library, written with "/"."""
    return {0: "test", 1: "validation"}.get(hashlib.sha256(name.encode()).digest()[0] % SHARE, "train")


def _names(folder: Path) -> Iterator[str]:
    """Name the files that are read."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith(MACHINES_OWN):
                yield (Path(place) / name).relative_to(folder).as_posix()


@lru_cache(maxsize=1)
def load(folder: Path | None = None) -> Library:
    """Read the library of the Python at work, or of a folder; characters that are not ASCII are left out."""
    place = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts, counts = {part: bytearray() for part in PARTS}, dict.fromkeys(PARTS, 0)
    for name in sorted(_names(place)):
        part = part_of(name)
        texts[part] += read_bytes(place / name, LARGEST_FILE, links=True).translate(None, _NOT_ASCII)
        counts[part] += 1
    if not all(texts.values()):
        raise UsageError(
            f"{place} holds too few .py files of Python's library to train, validate and test on: use a Python with "
            "its whole standard library"
        )
    return Library(
        *(torch.frombuffer(texts[part], dtype=torch.uint8) for part in PARTS),
        files=tuple(counts.values()),
        digests=tuple(hashlib.sha256(texts[part]).hexdigest() for part in PARTS),
    )
