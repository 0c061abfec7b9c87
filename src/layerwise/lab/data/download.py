"""Downloading a file from one of several servers, with resume and checksum.

What has arrived of a file is kept beside it as ``.part`` and continued by the next attempt, from whichever server: all
hold the same bytes, and the checksum of the whole decides. The library pooch checks and renames in the same way but
starts each download in a new temporary file that it deletes on failure; all that is here would have to go into a
downloader of its own.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.runs.plain_files import kind_of, parts

TIMEOUT = 30.0
"""Seconds that a server may stay silent."""

ATTEMPTS = 5
"""Connections made to one mirror for one file, as long as each brings something."""

BLOCK = 1 << 18

LARGEST = 1 << 36
"""Bytes of a file whose checksum is taken."""

Progress = Callable[[str, int, int], object]
"""Called with the name of the file, the bytes that are there and the bytes of the whole."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its publisher gives it, and where it can be had.

    Attributes:
        name: of the file.
        size: in bytes.
        md5: checksum.
        urls: the same file on several servers, in the order in which they are tried.
    """

    name: str
    size: int
    md5: str
    urls: tuple[str, ...]


class MirrorsError(UsageError):
    """No server gave the file; the text names each with its reason.

    Args:
        remote: the file.
        reasons: address -> why it did not.
    """

    def __init__(self, remote: RemoteFile, reasons: Mapping[str, str]) -> None:
        failures = ", ".join(f"{url} ({reason})" for url, reason in reasons.items())
        super().__init__(f"{remote.name} was not given by {failures}; expected MD5 {remote.md5}")
        self.summary = f"no server gave {remote.name} ({'; '.join(dict.fromkeys(reasons.values()))})"


class _NotGivenError(Exception):
    """One server did not give what was asked for."""


def _reason(error: BaseException) -> str:
    """Say in few words why a connection failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}".strip()
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def present_size(path: Path) -> int:
    """Say how much of a file is there.

    Args:
        path: of the file.

    Returns:
        Bytes; 0 where there is none.
    """
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def checksum(path: Path) -> str:
    """Give the checksum of a file.

    Args:
        path: of the file.

    Returns:
        MD5, 32 hexadecimal digits.
    """
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts(path, LARGEST, links=True):
        digest.update(part)
    return digest.hexdigest()


def keep_before(path: Path) -> None:
    """Rename a file that another one is about to replace: it may be the user's own, of the same name."""
    if os.path.lexists(path) and kind_of(path) != "a folder":
        names = (path.with_name(f"{path.name}.before{f'-{number}' if number > 1 else ''}") for number in count(1))
        os.rename(path, next(name for name in names if not os.path.lexists(name)))


def _expect(response: Any, kept: int, size: int) -> int:
    """Refuse the answer to a wrong question; give the number of bytes that are in it and already here."""
    if response.status == 206:
        given = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
        if match is None or int(match[1]) != kept or match[2] not in ("*", str(size)):
            raise _NotGivenError(f"Content-Range {given!r} where bytes from {kept} of {size} were asked for")
        return 0
    if response.status != 200:
        raise _NotGivenError(f"HTTP {response.status} where 200 or 206 was expected")
    # A login page of a network, or another version, is recognised before it costs what is here.
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != size:
        raise _NotGivenError(f"{length} bytes where {size} were expected")
    # A server without ranges begins at the beginning: what is here is skipped and not written again, so that a
    # connection that breaks earlier than the last one loses nothing.
    return kept


def _blocks(url: str, kept: int, size: int, opener: Callable[..., Any]) -> Iterator[bytes]:
    """Give what is missing of a file, at most one byte more than that."""
    request = urllib.request.Request(url, headers={"User-Agent": "layerwise"})
    if kept:
        request.add_header("Range", f"bytes={kept}-")
    try:
        with opener(request, timeout=TIMEOUT) as response:
            skipped = _expect(response, kept, size)
            missing = size - kept
            while missing >= 0:
                block = response.read(min(BLOCK, skipped or missing + 1))
                if not block:
                    break
                if skipped:
                    skipped -= len(block)
                    continue
                missing -= len(block)
                yield block
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _NotGivenError(_reason(error)) from error


def _continue(remote: RemoteFile, url: str, part: Path, progress: Progress | None, opener: Callable[..., Any]) -> None:
    """Add to a partial file what one connection gives."""
    done = present_size(part)
    try:
        with part.open("ab", buffering=0) as stream:
            for block in _blocks(url, done, remote.size, opener):
                view = memoryview(block)
                while view:  # without a buffer a write may take less than all, and what it took is on the disk
                    view = view[stream.write(view) :]
                done += len(block)
                if progress is not None:
                    progress(remote.name, min(done, remote.size), remote.size)
    except OSError as error:
        room = f"; {remote.size - done} bytes are missing: make room" if error.errno == errno.ENOSPC else ""
        reason = error.strerror or str(error)
        raise UsageError(f"{part}: cannot be written: {reason}{room}; what arrived is kept, run it again") from error
    if done < remote.size:
        raise _NotGivenError(f"the connection ended after {done} of {remote.size} bytes")


def _try(remote: RemoteFile, url: str, part: Path, progress: Progress | None, opener: Callable[..., Any]) -> str | None:
    """Complete a partial file from one server; give the reason if that failed, and the file is then kept or gone."""
    reason = ""
    for _ in range(ATTEMPTS):
        kept = present_size(part)
        try:
            if kept < remote.size:
                _continue(remote, url, part, progress, opener)
        except _NotGivenError as error:
            reason = str(error)
            if present_size(part) <= kept:
                return reason
            continue
        size, found = present_size(part), checksum(part)
        if size == remote.size and found == remote.md5:
            return None
        part.unlink()
        reason = f"MD5 is {found} ({size} bytes)" if size <= remote.size else f"gives more than {remote.size} bytes"
        # What was here before may have been at fault: the same server gets one chance to give all of it.
        if kept == 0:
            return reason
    return reason


def fetch_file(
    remote: RemoteFile, folder: Path, *, progress: Progress | None = None, opener: Callable[..., Any] | None = None
) -> Path:
    """Fetch one file into a folder, continuing what an earlier attempt left.

    Args:
        remote: what to fetch.
        folder: an existing folder.
        progress: called as the file grows.
        opener: called with a ``urllib.request.Request`` and ``timeout`` in seconds; None for
            ``urllib.request.urlopen``, which heeds the usual environment variables for proxies.

    Returns:
        The file, whose checksum is right.

    Raises:
        MirrorsError: no server gave it; what arrived is kept.
        UsageError: it cannot be written, or what an earlier attempt left is no plain file.
    """
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    reasons = {}
    kind = kind_of(part)
    if kind is not None:
        raise UsageError(f"{part}: is {kind}, into which nothing is written; remove it")
    try:
        for url in remote.urls:
            reason = _try(remote, url, part, progress, opener or urllib.request.urlopen)
            if reason is None:
                keep_before(target)
                os.replace(part, target)
                return target
            reasons[url] = reason
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror or error}: give a folder that can be written") from error
    raise MirrorsError(remote, reasons)
