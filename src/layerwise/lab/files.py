"""Files of the lab: read by one function, removed and overwritten only where the lab has written them itself.

A folder of the lab's holds ``files.json``, which names each of its files with its checksum. What is not named there is
somebody else's: it is neither removed nor overwritten. Below the folder that ``--out`` names no link is followed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.store import digest_of, read_signed, signed, write_whole
from layerwise.plain_files import kind_of, parts

FILES = "files.json"
"""Names what the lab has written into a folder."""

BEFORE = (
    *("report.html", "table.md", "plan.json", "runs.json"),
    *("tables/table.parquet", "tables/metrics.parquet", "tables/comparisons.parquet"),
)
"""What a folder of a version that wrote no ``files.json`` holds, beside figures."""

GENERATOR = b'<meta name="generator" content="layerwise">'
GENERATOR_BEFORE = (b"style-src 'unsafe-inline'; img-src data:", "· layerwise".encode())
"""By which a page is known again: one of this version, and one of an earlier version."""

LEFTOVER_SECONDS = 3600.0
"""Age of a half-written file that no process writes any more."""

HEAD, LARGEST_PAGE = 1 << 12, 1 << 32


def refuse_links(folder: Path, above: Path, option: str = "--out") -> None:
    """Refuse a folder that is reached through a link.

    Args:
        folder: below ``above``; need not exist.
        above: what the user has named, and may be a link.
        option: by which it was named.

    Raises:
        UsageError: a folder on the way is a link, or something that is no folder.
    """
    for place in (folder, *folder.parents):
        if place == above:
            return
        kind = kind_of(place)
        if kind != "a folder" and os.path.lexists(place):
            raise UsageError(
                f"{place}: is {kind or 'a file'}, where the lab writes a folder of its own; remove it, or give another "
                f"folder with {option}"
            )


def is_page(path: Path) -> bool:
    """Tell whether a file is a page that the lab has written."""
    try:
        head = next(parts(path, LARGEST_PAGE), b"")[:HEAD]
    except (OSError, ValueError):
        return False
    return GENERATOR in head or all(words in head for words in GENERATOR_BEFORE)


def check_page(path: Path, above: Path) -> None:
    """Refuse to overwrite a file that is not a page of the lab's.

    Args:
        path: where a page is to be written.
        above: the folder that ``--out`` names.

    Raises:
        UsageError: something else lies there, or a folder on the way is a link.
    """
    refuse_links(path.parent, above)
    if os.path.lexists(path) and not is_page(path):
        raise UsageError(
            f"{path}: is {kind_of(path) or 'a file'} that layerwise has not written; move it away, or give another "
            "folder with --out"
        )


class OwnFolder:
    """A folder of the lab's own.

    Args:
        path: the folder; need not exist.
        above: the folder that ``--out`` names.

    Raises:
        UsageError: the folder is a link, or holds files and no list of the lab's.
    """

    def __init__(self, path: Path, above: Path) -> None:
        refuse_links(path, above)
        self.path = path
        self.names = self._listed()

    def _listed(self) -> dict[str, str]:
        """Read which files are the lab's: name -> checksum."""
        other = UsageError(
            f"{self.path}: holds files that layerwise has not written (it has no valid {FILES}); give another folder "
            f"with --out, or move {self.path.name} away"
        )
        try:
            held = [name for name in os.listdir(self.path) if not re.fullmatch(r"\..+\.\d+\.tmp", name)]
        except FileNotFoundError:
            return {}
        if not held:
            return {}
        if FILES not in held:
            try:  # as a version before wrote it
                if "configurations" in read_signed(self.path / "plan.json"):
                    return {name: "" for name in (*BEFORE, *self._figures()) if _is_inside(name)}
            except (OSError, ValueError):
                pass
            raise other
        try:
            names = read_signed(self.path / FILES)["files"]
        except (OSError, ValueError, KeyError):
            raise other from None
        good = isinstance(names, dict) and all(_is_inside(name) and isinstance(names[name], str) for name in names)
        if not good:
            raise other
        return names

    def _figures(self) -> Iterator[str]:
        """Give the figures of a version before: overwritten where a page has one of the same name, never removed."""
        with suppress(OSError):
            yield from (f"figures/{name}" for name in os.listdir(self.path / "figures"))

    def check(self, names: Iterable[str]) -> None:
        """Refuse names at which somebody else's files lie, before anything is written.

        Raises:
            UsageError: one does, or a folder on the way is a link.
        """
        for name in names:
            path = self.path / name
            refuse_links(path.parent, self.path)
            kind = kind_of(path)
            if kind is not None or (name not in self.names and os.path.lexists(path)):
                raise UsageError(
                    f"{path}: is {kind or 'a file'} that layerwise has not written; move it away, or give another "
                    "folder with --out"
                )

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write files in their order, and remove what the list of the last time names and this one does not.

        Args:
            contents: name -> content. A name may hold one folder, as ``"figures/a.png"``.

        Raises:
            OSError: one cannot be written.
            UsageError: as of ``check``.
        """
        self.check(contents)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        self._list({**self.names, **digests})  # first, so that a killed process leaves no file that is not listed
        self._remove_leftovers()
        for name, content in contents.items():
            # Figures can be made again: a page and its tables are waited for alone.
            write_whole(self.path / name, content, flush=not name.startswith("figures/"))
        for name in self.names.keys() - digests.keys():
            self._remove(name)
        self._list(digests)

    def _list(self, names: Mapping[str, str]) -> None:
        write_whole(self.path / FILES, signed({"files": names}, indent=0))
        self.names = {**self.names, **names}

    def _remove(self, name: str) -> None:
        """Remove a file, if it is still what was written."""
        path = self.path / name
        if kind_of(path.parent) != "a folder" or kind_of(path) is not None:
            return
        with suppress(OSError, UsageError):
            if digest_of(path) == self.names[name]:
                path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove what killed processes had begun to write, long ago: another process may be at work now."""
        names = [FILES, *self.names]
        for folder in {self.path / PurePosixPath(name).parent for name in names}:
            if kind_of(folder) == "a folder":
                remove_leftovers(folder, [PurePosixPath(name).name for name in names])


def remove_leftovers(folder: Path, names: Iterable[str], seconds: float = LEFTOVER_SECONDS) -> None:
    """Remove half-written files of given names, and no other file.

    Args:
        folder: need not exist.
        names: of the files that were to be written.
        seconds: age from which no process writes them any more.
    """
    ours, known = re.compile(r"\.(.+)\.\d+\.tmp"), set(names)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = ours.fullmatch(entry.name)
            if found is None or found[1] not in known:
                continue
            with suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and time.time() - about.st_mtime >= seconds:
                    os.unlink(entry.path)


def _is_inside(name: Any) -> bool:
    """Tell whether a name is one of a file in the folder, or in a folder in it: no path leads out."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", name):
        return False
    return not any(part.startswith(".") for part in name.split("/"))
