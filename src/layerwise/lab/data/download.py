"""Downloading a file from the first of several servers that gives it as it was published.

pooch brings a file whole or not at all. A download that breaks starts again at the next server.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.store import kind_of

TIMEOUT = 30.0  # seconds that a server may stay silent
BLOCK = 1 << 18

Progress = Callable[[str, int, int], object]
"""Called with the name of the file, the bytes that are there and the bytes of the whole."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its publisher gives it, and its addresses on several servers, in the order in which they are tried."""

    name: str
    size: int
    md5: str
    urls: tuple[str, ...]


class MirrorsError(UsageError):
    """No server gave the file; ``reasons`` says why: address -> reason."""

    def __init__(self, remote: RemoteFile, reasons: Mapping[str, str]) -> None:
        failures = ", ".join(f"{url} ({reason})" for url, reason in reasons.items())
        super().__init__(f"{remote.name} was not given by {failures}; expected MD5 {remote.md5}")
        self.summary = f"no server gave {remote.name} ({'; '.join(dict.fromkeys(reasons.values()))})"


class _Bar:
    """Shows how much of a download has arrived; stops a download whose size is not the published one."""

    def __init__(self, remote: RemoteFile, progress: Progress | None) -> None:
        self._remote, self._progress, self._done = remote, progress, 0

    @property
    def total(self) -> int:
        return self._remote.size

    @total.setter
    def total(self, announced: int) -> None:
        # A network's login page is recognised here; 0 stands for a server that does not say.
        if announced not in (0, self.total):
            raise ValueError(f"{announced} bytes where {self.total} were expected")

    def update(self, count: int) -> None:
        self._done += count
        if self._done >= self.total + BLOCK:  # the last block counts whole
            raise ValueError(f"gives more than {self.total} bytes")
        if self._progress is not None:
            self._progress(self._remote.name, min(self._done, self.total), self.total)

    def reset(self) -> None:
        self._done, self._progress = 0, None  # pooch fills its bar once more at the end

    def close(self) -> None:
        pass


def _reason(error: BaseException) -> str:
    """Say in few words why a server did not give a file."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}"
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error).partition(". Deleted")[0] or type(error).__name__


def _keep_before(path: Path) -> None:
    """Rename a file that another one is about to replace: it may be the user's own, of the same name."""
    if os.path.lexists(path) and kind_of(path) != "a folder":
        names = (path.with_name(f"{path.name}.before{f'-{number}' if number > 1 else ''}") for number in count(1))
        os.rename(path, next(name for name in names if not os.path.lexists(name)))


def fetch_file(remote: RemoteFile, folder: Path, *, progress: Progress | None = None) -> Path:
    """Fetch one file into an existing folder; the usual environment variables for proxies count."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    # The name of a compressed file is no reason to decompress it on the way.
    headers = {"User-Agent": "layerwise", "Accept-Encoding": "identity"}
    target, reasons = folder / remote.name, {}
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as passing:
            for url in remote.urls:
                bar: Any = _Bar(remote, progress)
                get: Any = pooch.HTTPDownloader(progressbar=bar, chunk_size=BLOCK, timeout=TIMEOUT, headers=headers)
                try:
                    whole = pooch.retrieve(url, f"md5:{remote.md5}", remote.name, passing, downloader=get)
                except (requests.RequestException, ValueError) as error:
                    reasons[url] = _reason(error)
                else:
                    _keep_before(target)
                    os.chmod(whole, os.stat(folder).st_mode & 0o666)  # pooch's files are for their owner alone
                    os.replace(whole, target)
                    return target
    except OSError as error:
        raise UsageError(
            f"{target}: cannot be written: {error.strerror or error}; make room for {remote.size} bytes, or give a "
            "folder that can be written"
        ) from error
    raise MirrorsError(remote, reasons)
