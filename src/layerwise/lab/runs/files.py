"""Folders of the lab, in which only files that the lab has written are removed or overwritten.

Such a folder holds ``files.json``, which lists each of its files with a checksum. A file that is not listed is never
removed or overwritten. Below the folder that ``--out`` names, no link is followed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import digest_of, kind_of, parts, read_signed, signed, write_whole

FILES = "files.json"
"""Lists the files that the lab has written into a folder."""

GENERATOR = b'<meta name="generator" content="layerwise">'
"""Text that identifies a page of the lab."""

LEFTOVER_SECONDS = 3600.0
"""Age from which a half-written file counts as abandoned."""

HEAD, LARGEST_PAGE = 1 << 12, 1 << 32

_LEFTOVER = re.compile(r"\.(.+)\.\d+\.tmp")


def refuse_links(folder: Path, above: Path, option: str = "--out") -> None:
    """Refuse a folder that is reached through a link below ``above``, which an option names and which may be a link."""
    for place in (folder, *folder.parents):
        if place == above:
            return
        kind = kind_of(place)
        if kind != "a folder" and os.path.lexists(place):
            raise UsageError(
                f"{place}: is {kind or 'a file'}, where the lab creates a folder; remove it, or give another "
                f"folder with {option}"
            )


def check_page(path: Path, above: Path) -> None:
    """Refuse to overwrite a file that is not a page of the lab, or to follow a link below the folder of ``--out``."""
    refuse_links(path.parent, above)
    if os.path.lexists(path):
        with suppress(OSError, ValueError):
            if GENERATOR in next(parts(path, LARGEST_PAGE), b"")[:HEAD]:
                return
        raise _foreign(path)


def _foreign(path: Path) -> UsageError:
    return UsageError(
        f"{path}: is {kind_of(path) or 'a file'} that layerwise has not written; move it away, or give another "
        "folder with --out"
    )


class OwnFolder:
    """A folder that only the lab writes into; one that holds files but no valid list of them is refused."""

    def __init__(self, path: Path, above: Path) -> None:
        refuse_links(path, above)
        self.path = path
        self.names = self._listed()

    def _listed(self) -> dict[str, str]:
        """Read the list of the lab's files: name -> checksum."""
        try:
            if all(_LEFTOVER.fullmatch(name) for name in os.listdir(self.path)):
                return {}
        except FileNotFoundError:
            return {}
        with suppress(OSError, ValueError, KeyError):
            names = read_signed(self.path / FILES)["files"]
            if isinstance(names, dict) and all(_is_inside(name) and isinstance(names[name], str) for name in names):
                return names
        raise UsageError(
            f"{self.path}: holds files that layerwise has not written (it has no valid {FILES}); give another folder "
            f"with --out, or move {self.path.name} away"
        )

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of files that the lab has not written, before anything is written."""
        for name in names:
            path = self.path / name
            refuse_links(path.parent, self.path)
            if kind_of(path) is not None or (name not in self.names and os.path.lexists(path)):
                raise _foreign(path)

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write files in order, and remove those of the previous list that are not among them.

        A name may hold one folder, as ``"figures/a.png"``.
        """
        self.check(contents)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        self._list({**self.names, **digests})  # first, so that a killed process leaves no file that is not listed
        self._remove_leftovers()
        for name, content in contents.items():
            # Figures can be drawn again, so only a page and its tables are flushed to the disk.
            write_whole(self.path / name, content, flush=not name.startswith("figures/"))
        for name in self.names.keys() - digests.keys():
            path = self.path / name
            if kind_of(path.parent) == "a folder" and kind_of(path) is None:
                with suppress(OSError, UsageError):
                    if digest_of(path) == self.names[name]:  # the content is still what the lab wrote
                        path.unlink()
        self._list(digests)

    def _list(self, names: Mapping[str, str]) -> None:
        write_whole(self.path / FILES, signed({"files": names}, indent=0))
        self.names = {**self.names, **names}

    def _remove_leftovers(self) -> None:
        """Remove old half-written files of killed processes; young ones may belong to a running process."""
        names = [FILES, *self.names]
        for folder in {self.path / PurePosixPath(name).parent for name in names}:
            if kind_of(folder) == "a folder":
                remove_leftovers(folder, [PurePosixPath(name).name for name in names])


def remove_leftovers(folder: Path, names: Iterable[str], seconds: float = LEFTOVER_SECONDS) -> None:
    """Remove half-written files of given names that are so many seconds old."""
    known = set(names)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _LEFTOVER.fullmatch(entry.name)
            if found is None or found[1] not in known:
                continue
            with suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and time.time() - about.st_mtime >= seconds:
                    os.unlink(entry.path)


def _is_inside(name: Any) -> bool:
    """Tell whether a name is that of a file in the folder or in a subfolder, so that no path leads out."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", name):
        return False
    return not any(part.startswith(".") for part in name.split("/"))
