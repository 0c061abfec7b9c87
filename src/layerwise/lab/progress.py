"""How far runs and other work are: bars in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from layerwise.lab.errors import shown
from layerwise.lab.experiments.runner import Display, Outcome

LINE_SECONDS = 10.0  # seconds between two lines where the output is not a terminal
FIRST_LINE_SECONDS = 2.0  # work that takes less has no line
LONG_RUN_SECONDS = 60.0  # after which an unfinished run has a line of its own, so that it does not look hung
REFRESH_SECONDS = 0.2  # seconds between two drawings of a bar
BAR = 10  # width of a bar
LONGEST_NOTE = 42  # letters beside a bar: as in "120/480 runs, 1,234 updates/s, 120 min left"


def duration(seconds: float) -> str:
    """Write a time: in seconds below 90 s, in minutes below 90 min, else in hours."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _bars(target: Console) -> Progress:
    """Make bars with a name and a note beside them; nothing of them stays."""
    widest = max(12, target.width - BAR - LONGEST_NOTE - 2)
    name, note = (Column(max_width=width, no_wrap=True, overflow="ellipsis") for width in (widest, None))
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=BAR),
        TextColumn("{task.fields[note]}", markup=False, table_column=note),
        console=target,
        transient=True,
        refresh_per_second=1 / REFRESH_SECONDS,
    )


class Meter:
    """Shows the count, the rate and the time left of anything that can be counted.

    The clock starts with the first count, and again when the total becomes known. Numbers are divided by ``scale``
    before they are shown; without a ``target`` nothing is.
    """

    def __init__(self, target: Console | None, doing: str, unit: str, *, scale: float = 1.0) -> None:
        self._target, self._doing, self._unit, self._scale = target, doing, unit, scale
        self._bar: Progress | None = None
        self._began, self._last = 0.0, -math.inf
        self._first: float | None = None
        self._total: float | None = None

    def __enter__(self) -> Meter:
        if self._target is not None and self._target.is_terminal:
            self._bar = _bars(self._target)
            self._task = self._bar.add_task(self._doing, total=None, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, total: float | None, doing: str | None = None) -> None:
        """Show how much is done; another word for what is done begins anew."""
        now = time.monotonic()
        if doing not in (None, self._doing):
            self._doing, self._first, self._total = str(doing), None, None
        if self._first is None or (self._total is None and total is not None):
            self._first, self._total, self._began = done, total, now
            self._last = max(self._last, now + FIRST_LINE_SECONDS - LINE_SECONDS)
        if self._bar is not None:
            note = self.words(done, total)
            self._bar.update(self._task, description=self._doing, completed=done, total=total, note=note)
            if now - self._last >= REFRESH_SECONDS:  # the bar's own thread waits while compiled code works
                self._last = now
                self._bar.refresh()
        elif self._target is not None and now - self._last >= LINE_SECONDS:
            self._last = now
            self._target.print(shown(f"{self._doing}: {self.words(done, total)}"), markup=False)

    def words(self, done: float, total: float | None) -> str:
        """Write the count, the rate a second and the time left, as far as they are known."""
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


class RunDisplay(Display):
    """Shows the runs of an experiment: finished ones, those at work, rate and time left.

    In a terminal all runs have a bar, and each worker has one; elsewhere there is a line now and then.
    """

    def __init__(self, target: Console) -> None:
        self.target = target
        self._bars: Progress | None = None

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is run, what was found and what is left; in a terminal the bars start, unless nothing is left."""
        self._clock = self._last = time.monotonic()
        self._count = self._found = outcome.found
        self._total = outcome.planned - outcome.repeated
        self._parts: dict[str, float] = {}
        self._updates: dict[str, int] = {}
        self._before: dict[str, tuple[float, int]] = {}
        titles = [words for words in (outcome.plan.title, outcome.plan.data_title) if words]
        self.say(f"{'. '.join(titles)}.".replace("..", "."))
        for path in outcome.set_aside:
            self.say(f"{path.parent.name}/{path.name} was damaged: set aside as {path.name}.broken.")
        if outcome.found:
            self.say(f"{outcome.found} of {outcome.planned} runs were finished already and are not repeated.")
        left = self._total - self._found
        if left:
            where = f"{left} run{'s' if left > 1 else ''} in {workers} process{'es' if workers > 1 else ''}"
            self.say(f"{where}; Ctrl-C keeps what is done for the next start of the command.")
        self._bars = _bars(self.target) if self.target.is_terminal and left else None
        if self._bars is not None:
            self._whole = self._bars.add_task("all runs", total=left, note="")
            self._lines = [self._bars.add_task("  starting", total=1.0, note="") for _ in range(workers)]
            self._bars.start()

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """Show how far a run is; what a checkpoint has brought is no work of this session."""
        part = done / total if total else 0.0
        if not self._before:  # the time in which workers start says nothing of their rate
            self._clock = time.monotonic()
        self._before.setdefault(run, (part, done))
        self._parts[run], self._updates[run] = part, done
        if self._bars is not None:
            self._move(worker, run, f"{done:,} updates")
        else:
            self._line(LONG_RUN_SECONDS, f"{run}: {done:,}{f' of {total:,}' if total else ''} updates")

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a finished run; one that diverged has a line in any case."""
        self._parts[run] = 1.0
        self._count += 1
        if self._bars is None:
            self._line(0.0 if self._count == self._total or diverged else LINE_SECONDS, f"{run}: {result}")
            return
        self._move(worker, run, result)
        if diverged:
            self.say(f"{run} diverged")

    def stopping(self) -> None:
        """Say that checkpoints are being written, and what another Ctrl-C does."""
        self.say("Stopping: the runs at work write their checkpoints; Ctrl-C again gives up at once.")

    def say(self, words: str) -> None:
        """Print a line, above the bars if there are any, with control characters escaped."""
        self.target.print(shown(words), markup=False)

    def end(self) -> None:
        """Take the bars away; lines that were printed stay."""
        if self._bars is not None:
            self._bars.stop()

    @property
    def rate(self) -> str:
        """Updates per second of all processes together; "" before there are any."""
        done = sum(count - self._before[run][1] for run, count in self._updates.items())
        passed = time.monotonic() - self._clock
        return f"{done / passed:,.3g} updates/s" if done and passed else ""

    @property
    def left(self) -> str:
        """Time that the rest takes at the rate so far; "" before that can be told."""
        done = sum(part - self._before.get(run, (0.0, 0))[0] for run, part in self._parts.items())
        if done < 0.02:
            return ""
        rest = self._total - self._found - sum(self._parts.values())
        return f"{duration((time.monotonic() - self._clock) / done * max(rest, 0.0))} left"

    def _pace(self) -> str:
        pace = (self.rate, self.left) if self._count < self._total else ()
        return ", ".join(filter(None, (f"{self._count}/{self._total} runs", *pace)))

    def _line(self, after: float, words: str) -> None:
        """Print a line if the last one is at least so many seconds old."""
        now = time.monotonic()
        if now - self._last >= after:
            self._last = now
            self.say(f"{self._pace()}; {words}")

    def _move(self, worker: int, run: str, note: str) -> None:
        assert self._bars is not None
        line = self._lines[worker % len(self._lines)]
        self._bars.update(line, description=f"  {shown(run)}", completed=self._parts[run], note=shown(note))
        self._bars.update(self._whole, completed=sum(self._parts.values()), note=self._pace())


def display(target: Console, *, silent: bool) -> Display:
    """Make what shows the runs of an experiment; a silent one shows nothing."""
    return Display() if silent else RunDisplay(target)
