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
from itertools import cycle
from pathlib import Path
from typing import Any

from layerwise.lab.runs.store import usable_cores

MOST_PROCESSES = 4
"""That turn SVG into pixels side by side; a page has some hundred figures of 20 milliseconds."""

SCALE = 2.0
"""Pixels for one of the SVG, across and down."""

HEAD = struct.Struct(">cQ")
"""Before every message: what it is, and its length in bytes."""

CHART, PIXELS, DONE, REFUSED = b"c", b"p", b"d", b"r"

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
    "from layerwise.lab.report.renderer import serve; serve()"
)

OWN_LETTERS = re.compile(
    r"[ -~\n\t\u00a0-\u00ac\u00ae-\u024f"  # Latin
    r"\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03ce\u0400-\u0482\u048a-\u04ff"  # Greek, Cyrillic
    r"\u2013\u2014\u2016\u2018\u2019\u201c\u201d\u2020-\u2022\u2026\u2032\u2033\u2190-\u2193"
    r"\u2202\u2206\u2211\u2212\u221a\u221e\u2248\u2260\u2264\u2265]*"  # signs of mathematics
)
"""Texts of letters that the renderer's own font has; a few more of its letters are in no figure."""

FONTS = Path(__file__).with_name("fonts.conf")
"""Names no font of the machine."""


class Process:
    """A process that draws for one caller at a time; it is started when it is first asked.

    Args:
        own_font: with the renderer's own font alone; else with those of the machine first.
    """

    def __init__(self, *, own_font: bool = True) -> None:
        self.environment = {**os.environ, "FONTCONFIG_FILE": str(FONTS)} if own_font else None
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()
        self._ended = False

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
        with self._asking:
            if self._ended:
                raise ChildProcessError(errno.ECHILD, "the renderer of figures was ended")
            if self._process is not None and self._process.poll() is not None:
                _stopped(self._process)  # while nobody asked it, as in days of training
                self._process = None
            process = self._process = self._process or _started(self.environment)
            try:
                _send(process, what, body)
                kind, drawn = _received(process)
            except (OSError, EOFError):
                self._process = None
                raise ChildProcessError(
                    errno.ECHILD, f"the process that draws figures ended (exit code {_stopped(process)}): try again"
                ) from None
            except BaseException:  # an interrupt: the next one to ask would be given this figure
                self._process = None
                _stopped(process)
                raise
        if kind == REFUSED:
            raise ValueError(drawn.decode())
        return drawn

    def kill(self) -> None:
        """End the process, if there is one, for good; it need not be waited for."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    def wait(self) -> None:
        """Wait until a process that was killed is gone, and nobody asks it any more."""
        with self._asking:
            process, self._process = self._process, None
            if process is not None:
                _stopped(process)

    def forget(self) -> None:
        """Leave the process to another one, of which this one is a fork."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()


def _started(environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    if find_spec("vl_convert") is None:
        raise ModuleNotFoundError("No module named 'vl_convert'", name="vl_convert")
    process = subprocess.Popen(
        [sys.executable, "-I", *(["-B"] if sys.dont_write_bytecode else []), "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        bufsize=0,  # a fork would have a copy of what is in a buffer
        # Of a group of its own: Ctrl-C is for this process, which ends the other one.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    with suppress(OSError):  # it has ended, as whoever asks it will find
        _write(process, json.dumps([entry for entry in sys.path if isinstance(entry, str)]).encode() + b"\n")
    return process


def _stopped(process: subprocess.Popen[bytes]) -> int:
    """End a process, if it has not ended, and give its exit code."""
    with process:  # closes its pipes and waits for it
        if process.poll() is None:
            process.kill()
    return process.returncode


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    left = memoryview(data)
    while left:
        left = left[process.stdin.write(left) :]


def _send(process: subprocess.Popen[bytes], what: bytes, body: bytes) -> None:
    _write(process, HEAD.pack(what, len(body)) + body)


def _received(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Read an answer: of which kind it is, and the rest; raises EOFError where it ends before."""
    kind, length = HEAD.unpack(_read(process, HEAD.size))
    return kind, _read(process, length)


def _read(process: subprocess.Popen[bytes], length: int) -> bytes:
    assert process.stdout is not None
    parts = []
    while length:
        part = process.stdout.read(length)
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class Renderer:
    """A process for charts, whose library takes a while to start, some for pixels, and one with the machine's fonts."""

    def __init__(self) -> None:
        self.chart_process = Process()
        self.pixel_processes = [Process() for _ in range(min(usable_cores(), MOST_PROCESSES))]
        self.other_process = Process(own_font=False)
        self._turns = cycle(self.pixel_processes)

    @property
    def processes(self) -> list[Process]:
        """All of them, begun or not."""
        return [self.chart_process, *self.pixel_processes, self.other_process]

    def chart(self, specification: dict[str, Any]) -> str:
        """Draw a chart in Vega-Lite as SVG; raises what ``Process.ask`` does."""
        text = json.dumps(specification, ensure_ascii=False)
        process = self.chart_process if OWN_LETTERS.fullmatch(text) else self.other_process
        return process.ask(CHART, text.encode()).decode()

    def pixels(self, svg: str) -> bytes:
        """Turn an SVG into a PNG; raises what ``Process.ask`` does."""
        process = next(self._turns) if OWN_LETTERS.fullmatch(svg) else self.other_process
        return process.ask(PIXELS, svg.encode())

    def end(self) -> None:
        """End every process, for good; whoever still waits for a figure gets an error."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


_renderer: Renderer | None = None
_making = threading.Lock()


def renderer() -> Renderer:
    """Give the renderer of this process."""
    global _renderer
    with _making:
        if _renderer is None:
            _renderer = Renderer()
            atexit.register(_end_at_exit)
        return _renderer


def _end_at_exit() -> None:
    """End the processes; Ctrl-C in that moment, when all is done, would be told as an error."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _renderer is not None:
        _renderer.end()


def _forget() -> None:
    """Leave the processes of the parent of a fork alone, and their pipes, whose end is theirs."""
    global _renderer, _making
    if _renderer is not None:
        for process in _renderer.processes:
            process.forget()
        atexit.unregister(_end_at_exit)
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
