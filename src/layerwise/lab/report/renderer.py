"""The renderer of figures, in processes beside this one.

It draws on one core and holds Python's lock meanwhile: in this process nothing else would go on. A process of its own
gets a chart or an SVG through a pipe, gives SVG or pixels back, and ends when the pipe does, as when this process is
killed.

It has a font of its own, in memory. A font of the machine it would open, map and read anew four times a letter, which
takes longer than all the rest; so such a font is used only for letters that its own does not have. Figures are then the
same on every machine, too, where the system finds its fonts by ``FONTCONFIG_FILE``, as Linux does.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import LifoQueue
from typing import Any

from layerwise.lab.store import usable_cores

MOST_PROCESSES = 4
"""That turn SVG into pixels side by side; a page has some hundred figures of 20 milliseconds."""

SCALE = 2.0
"""Pixels for one of the SVG, across and down."""

HEAD = struct.Struct(">cQ")
"""Before every message: what it is, and its length in bytes."""

CHART, PIXELS, DONE, REFUSED = b"c", b"p", b"d", b"r"

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from layerwise.lab.report.renderer import serve; serve()"


OWN_LETTERS = re.compile(
    r"[\s!-~\u00a1-\u00ac\u00ae-\u024f"  # Latin
    r"\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03ce\u0400-\u0482\u048a-\u04ff"  # Greek, Cyrillic
    r"\u2013\u2014\u2016\u2018\u2019\u201c\u201d\u2020-\u2022\u2026\u2032\u2033\u2190-\u2193"
    r"\u2202\u2206\u2211\u2212\u221a\u221e\u2248\u2260\u2264\u2265]*"  # signs of mathematics
)
"""Texts of letters that the renderer's own font has; a few more of its letters are in no figure."""

FONTS = Path(__file__).with_name("fonts.conf")
"""Names no font of the machine."""


class Process:
    """A process that draws; it is started when it is first asked.

    Args:
        own_font: with the renderer's own font alone; else with those of the machine first.
    """

    def __init__(self, *, own_font: bool = True) -> None:
        self.environment = {**os.environ, "FONTCONFIG_FILE": str(FONTS)} if own_font else None
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, what: bytes, body: bytes) -> bytes:
        """Have something drawn.

        Args:
            what: ``CHART`` or ``PIXELS``.
            body: a Vega-Lite specification in JSON, or an SVG.

        Returns:
            An SVG, or a PNG.

        Raises:
            ValueError: the renderer refuses it.
            ChildProcessError: the process was ended while it drew; the next figure gets a new one.
            ModuleNotFoundError: the renderer is not installed.
        """
        if self._process is None:
            self._process = _started(self.environment)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(HEAD.pack(what, len(body)) + body)
            stdin.flush()
            kind, length = HEAD.unpack(stdout.read(HEAD.size))
            drawn = stdout.read(length)
        except (OSError, ValueError, struct.error):
            kind, length, drawn = DONE, -1, b""
        except BaseException:  # an interrupt: the next one to ask would be given this figure
            self.end()
            raise
        if len(drawn) != length:
            how = self.end()
            raise ChildProcessError(errno.ECHILD, f"the process that draws figures ended ({how}): try again")
        if kind == REFUSED:
            raise ValueError(drawn.decode())
        return drawn

    def end(self) -> str:
        """End the process, if there is one, and say how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "it was not begun"
        with suppress(BrokenPipeError), process:  # closes its pipes, where something may be left, and waits for it
            if process.poll() is None:
                process.kill()
        return f"exit code {process.returncode}"


def _started(environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    if find_spec("vl_convert") is None:
        raise ModuleNotFoundError("No module named 'vl_convert'", name="vl_convert")
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        # Of a group of its own: Ctrl-C is for this process, which ends the other one.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


class Renderer:
    """A process for charts, whose library takes a while to start, some for pixels, and one with the machine's fonts."""

    def __init__(self) -> None:
        self._charts: LifoQueue[Process] = LifoQueue()
        self._pixels: LifoQueue[Process] = LifoQueue()
        self._others: LifoQueue[Process] = LifoQueue()
        self._charts.put(Process())
        for _ in range(min(usable_cores(), MOST_PROCESSES)):
            self._pixels.put(Process())
        self._others.put(Process(own_font=False))
        self._all = [*self._charts.queue, *self._pixels.queue, *self._others.queue]

    def chart(self, specification: dict[str, Any]) -> str:
        """Draw a chart in Vega-Lite as SVG; raises what ``Process.ask`` does."""
        return self._ask(self._charts, CHART, json.dumps(specification, ensure_ascii=False)).decode()

    def pixels(self, svg: str) -> bytes:
        """Turn an SVG into a PNG; raises what ``Process.ask`` does."""
        return self._ask(self._pixels, PIXELS, svg)

    def _ask(self, processes: LifoQueue[Process], what: bytes, text: str) -> bytes:
        """Have something drawn by a process that is free, or by the one for texts of other letters."""
        free = processes if OWN_LETTERS.fullmatch(text) else self._others
        process = free.get()
        try:
            return process.ask(what, text.encode())
        finally:
            free.put(process)

    def end(self) -> None:
        """End every process; whoever still waits for a figure gets an error."""
        for process in self._all:
            process.end()


_renderer: Renderer | None = None
_making = threading.Lock()


def renderer() -> Renderer:
    """Give the renderer of this process."""
    global _renderer
    with _making:
        if _renderer is None:
            _renderer = Renderer()
            atexit.register(_renderer.end)
        return _renderer


def _forget() -> None:
    """Leave the processes of the parent of a fork alone."""
    global _renderer, _making
    if _renderer is not None:
        atexit.unregister(_renderer.end)
    _renderer, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def serve() -> None:
    """Draw what comes through the standard input until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no figure
    draw: dict[bytes, Callable[[bytes], bytes]] = {CHART: _draw_chart, PIXELS: _draw_pixels}
    while len(head := sys.stdin.buffer.read(HEAD.size)) == HEAD.size:
        what, length = HEAD.unpack(head)
        body = sys.stdin.buffer.read(length)
        if len(body) < length:
            break
        try:
            kind, drawn = DONE, draw[what](body)
        except BaseException as error:  # the renderer's panics are no Exception
            kind, drawn = REFUSED, str(error).partition("\n\nStack backtrace")[0].encode()
        try:
            answers.write(HEAD.pack(kind, len(drawn)) + drawn)
            answers.flush()
        except BrokenPipeError:  # nobody wants it any more
            os._exit(1)


def _draw_chart(body: bytes) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_svg(json.loads(body)).encode()


def _draw_pixels(body: bytes) -> bytes:
    import vl_convert

    return vl_convert.svg_to_png(body.decode(), scale=SCALE)
