"""How far something is that can be counted: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from layerwise.lab.progress import PLAIN_LINE_SECONDS, duration

REFRESH_SECONDS = 0.2
"""Between two drawings of a bar."""

FIRST_LINE_SECONDS = 2.0
"""What takes less needs no line."""


class Meter:
    """Shows the count, the rate and the time left; nothing is left of it in a terminal when it is done.

    The clock starts with the first count that is shown, and anew when it becomes known how much there is to do.

    Args:
        target: where; None shows nothing.
        doing: what is done, in a word or two.
        unit: what is counted, in the plural.
        scale: what numbers are divided by before they are shown.

    Example:
        >>> with Meter(None, "training", "updates") as meter:
        ...     meter.show(3, 10)
    """

    def __init__(self, target: Console | None, doing: str, unit: str, *, scale: float = 1.0) -> None:
        self._target, self._doing, self._unit, self._scale = target, doing, unit, scale
        self._bar: Progress | None = None
        self._began = self._last = 0.0
        self._first: float | None = None
        self._total: float | None = None

    def __enter__(self) -> Meter:
        if self._target is not None and self._target.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)
            note = TextColumn("{task.fields[note]}", markup=False)
            self._bar = Progress(*columns, note, console=self._target, transient=True, refresh_per_second=5)
            self._task = self._bar.add_task(self._doing, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, total: float | None) -> None:
        """Tell how much is done.

        Args:
            done: the count.
            total: how much it will be; None where that is not known.
        """
        if self._first is None or (self._total is None and total is not None):
            self._first, self._total, self._began = done, total, time.monotonic()
            self._last = max(self._last, self._began + FIRST_LINE_SECONDS - PLAIN_LINE_SECONDS)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=self.words(done, total))
            if time.monotonic() - self._last >= REFRESH_SECONDS:  # its own thread waits while compiled code is at work
                self._last = time.monotonic()
                self._bar.refresh()
        elif self._target is not None and time.monotonic() - self._last >= PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            self._target.print(f"{self._doing}: {self.words(done, total)}", markup=False)

    def words(self, done: float, total: float | None) -> str:
        """Write count, rate and time left."""
        passed, new = time.monotonic() - self._began, done - (self._first or 0.0)
        of = "" if total is None else f"/{_number(total / self._scale)}"
        words = [f"{_number(done / self._scale)}{of} {self._unit}"]
        if new > 0 and passed > 0:
            rate = new / passed
            words.append(f"{rate / self._scale:.3g}/s")
            if total is not None:
                words.append(f"{duration(max(total - done, 0) / rate)} left")
        return ", ".join(words)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
