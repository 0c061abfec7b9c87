"""What was published of CIFAR-10 and CIFAR-100: archives, files and their checksums."""

from __future__ import annotations

from dataclasses import dataclass, field

CHANNELS = 3
SIDE = 32
PIXELS = CHANNELS * SIDE * SIDE


@dataclass(frozen=True)
class Form:
    """One of the published forms of a data set.

    Attributes:
        archive: name of the archive.
        md5: of the archive, as published.
        folder: name of the folder in the archive.
        train_files: file -> number of images, in the order of the data set.
        test_files: the same of the test images.
        label_bytes: bytes before the pixels of a record, the class in the last of them; 0 in the python version.
        label_key: key of the classes in the python version.
        file_md5s: file -> its MD5, in the python version: a pickle is a program, and no other one is run.
    """

    archive: str
    md5: str
    folder: str
    train_files: dict[str, int]
    test_files: dict[str, int]
    label_bytes: int = 0
    label_key: bytes = b""
    file_md5s: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """All files that are read, with their numbers of images."""
        return self.train_files | self.test_files


FORMS = {
    "cifar10": (
        Form(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            {f"data_batch_{number}": 10_000 for number in range(1, 6)},
            {"test_batch": 10_000},
            label_key=b"labels",
            file_md5s={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
        ),
        Form(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
            {"test_batch.bin": 10_000},
            label_bytes=1,
        ),
    ),
    "cifar100": (
        Form(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            {"train": 50_000},
            {"test": 10_000},
            label_key=b"fine_labels",
            file_md5s={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
        Form(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            {"train.bin": 50_000},
            {"test.bin": 10_000},
            label_bytes=2,
        ),
    ),
}
"""Data set -> its forms, the one looked for first before the other. MD5 of the archives as published by Krizhevsky, of
the files as in torchvision/datasets/cifar.py."""

CONTENTS = {
    "cifar10": {
        "training": "1e91790dbaf241617ca1f29a9aba08eb9a62df84cc90676b47edd05ad2ab3c94",
        "test": "9a4c74f5c8b6f2c4e13d3a1dfb43a5a8cda8a9da515e99fd620d2013a1a6287a",
    },
}
"""Data set -> SHA-256 of the pixels of its images, then of their classes, a byte each, in file order: the same in every
form. Computed from the python version, whose files had the MD5s of torchvision/datasets/cifar.py."""

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
