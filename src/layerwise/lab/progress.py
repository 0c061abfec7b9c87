"""What the person at the terminal sees while the runs are done."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from layerwise.lab.experiments.runner import Display, Outcome
from layerwise.lab.printing import shown

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two progress lines where the output is not a terminal."""

LONG_RUN_SECONDS = 60.0
"""Seconds after which a run at work has a line of its own there, so that long runs do not look hung."""

BAR = 10
"""Width of a bar."""

LONGEST_NOTE = 42
"""Letters beside a bar: as in "120/480 runs, 1,234 updates/s, 120 min left"."""


def opening(outcome: Outcome, workers: int) -> list[str]:
    """Say what is about to be done.

    Args:
        outcome: the plan and the runs found.
        workers: number of processes.

    Returns:
        Lines of text.
    """
    left = outcome.planned - outcome.found
    told = [words for words in (outcome.plan.title, outcome.plan.data_title) if words]
    lines = [f"{'. '.join(told)}.".replace("..", ".")]
    lines += [
        f"{path.parent.name}/{path.name} was damaged: set aside as {path.name}.broken." for path in outcome.set_aside
    ]
    if outcome.found:
        lines.append(f"{outcome.found} of {outcome.planned} runs were finished already and are not repeated.")
    if left:
        runs = "1 run" if left == 1 else f"{left} runs"
        lines.append(
            f"{runs} in {workers} process{'es' if workers > 1 else ''}; Ctrl-C keeps what is done "
            "for the next start of the command."
        )
    return lines


def duration(seconds: float) -> str:
    """Write a time roughly."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class _Counted(Display):
    """Counts finished runs and the parts of running ones, from which the remaining time is estimated."""

    def __init__(self, target: Console) -> None:
        self.target = target
        self.clock = time.monotonic()
        self.parts: dict[str, float] = {}
        self.updates: dict[str, int] = {}
        self.count = self.total = self.found = 0

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done."""
        self.clock = time.monotonic()
        self.count = self.found = outcome.found
        self.total = outcome.planned
        self._first: dict[str, float] = {}
        self._updates_before: dict[str, int] = {}
        for line in opening(outcome, workers):
            self.say(line)

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """Count the part of a run; what a checkpoint had done before is no work of this time."""
        part = done / total if total else 0.0
        if not self._first:  # the time that the workers took to start is no measure of their work
            self.clock = time.monotonic()
        self._first.setdefault(run, part)
        self._updates_before.setdefault(run, done)
        self.parts[run], self.updates[run] = part, done

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a finished run."""
        self.parts[run] = 1.0
        self.count += 1

    def stopping(self) -> None:
        """Say what the wait is for."""
        self.say("Stopping: the runs at work write their checkpoints; Ctrl-C again gives up at once.")

    def say(self, words: str) -> None:
        """Print a line."""
        self.target.print(shown(words), markup=False)

    @property
    def rate(self) -> str:
        """How many updates a second are done, in all processes together; "" before there are any."""
        done = sum(count - self._updates_before[run] for run, count in self.updates.items())
        passed = time.monotonic() - self.clock
        return f"{done / passed:,.3g} updates/s" if done and passed else ""

    @property
    def pace(self) -> str:
        """Rate and time left."""
        return ", ".join(filter(None, (self.rate, self.left)))

    @property
    def left(self) -> str:
        """How long the rest takes, going by the time so far."""
        done = sum(part - self._first.get(run, 0.0) for run, part in self.parts.items())
        if done < 0.02:
            return ""
        rest = self.total - self.found - sum(self.parts.values())
        return f"{duration((time.monotonic() - self.clock) / done * max(rest, 0.0))} left"


class LineDisplay(_Counted):
    """A plain line now and then, for logs and pipes."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done."""
        super().begin(outcome, workers)
        self._last = time.monotonic()

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """Say how far a run is, where nothing else was said for long."""
        super().advance(worker, run, done, total)
        self._say(LONG_RUN_SECONDS, f"{run}: {done:,}{f' of {total:,}' if total else ''} updates")

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Say how far it is, unless that was said a moment ago."""
        super().finished(worker, run, result, diverged)
        now = self.count == self.total or diverged
        self._say(0.0 if now else PLAIN_LINE_SECONDS, f"{run}: {result}")

    def _say(self, after: float, words: str) -> None:
        """Print a line, if the last one is so many seconds ago."""
        now = time.monotonic()
        if now - self._last >= after:
            self._last = now
            pace = f"{self.pace}; " if self.pace and self.count < self.total else ""
            self.say(f"{self.count}/{self.total} runs, {pace}{words}")


class BarDisplay(_Counted):
    """A bar of the whole and a line for each worker, for a terminal."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done and draw the bars."""
        super().begin(outcome, workers)
        left = outcome.planned - outcome.found
        self._progress = None
        if not left:
            return
        widest = max(12, self.target.width - BAR - LONGEST_NOTE - 2)
        name = Column(max_width=widest, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(bar_width=BAR),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.target,
            transient=True,
            refresh_per_second=5,
        )
        self._whole = self._progress.add_task("all runs", total=left, note="")
        self._lines = [self._progress.add_task("  starting", total=1.0, note="") for _ in range(workers)]
        self._progress.start()

    def advance(self, worker: int, run: str, done: int, total: int | None) -> None:
        """Move the bars."""
        super().advance(worker, run, done, total)
        self._move(worker, run, f"{done:,} updates")

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a run, and say so if it diverged."""
        super().finished(worker, run, result, diverged)
        self._move(worker, run, result)
        if diverged:
            self.say(f"{run} diverged")

    def _move(self, worker: int, run: str, note: str) -> None:
        if self._progress is None:
            return
        part = self.parts[run]
        line = self._lines[worker % len(self._lines)]
        self._progress.update(line, description=f"  {shown(run)}", completed=part, note=shown(note))
        whole = ", ".join(filter(None, (f"{self.count}/{self.total} runs", self.pace)))
        self._progress.update(self._whole, completed=sum(self.parts.values()), note=whole)

    def end(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()


def display(target: Console, *, silent: bool) -> Display:
    """Choose what is shown.

    Args:
        target: the console.
        silent: show nothing.

    Returns:
        Bars in a terminal, lines elsewhere.
    """
    if silent:
        return Display()
    return BarDisplay(target) if target.is_terminal else LineDisplay(target)
