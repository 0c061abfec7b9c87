"""What the person at the terminal sees while the runs are done."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from layerwise.lab.plan import Display, Outcome

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two progress lines where the output is not a terminal."""


def opening(outcome: Outcome, workers: int) -> list[str]:
    """Say what is about to be done.

    Args:
        outcome: the plan and the runs found.
        workers: number of processes.

    Returns:
        Lines of text.
    """
    left = outcome.planned - outcome.found
    lines = [f"{outcome.subject} on {outcome.title}."]
    lines += [
        f"{path.name} was damaged: set aside as {path.name}.broken, and its run is repeated."
        for path in outcome.set_aside
    ]
    if outcome.found:
        lines.append(
            f"{outcome.found} of {outcome.planned} runs were finished already and are not repeated; "
            f"to repeat them delete {outcome.folder}"
        )
    if left:
        lines.append(
            f"{left} runs of {outcome.run_words} in {workers} "
            f"process{'es' if workers > 1 else ''}; Ctrl-C keeps the finished ones."
        )
    return lines


class _Counted(Display):
    """Counts iterations and finished runs."""

    def __init__(self, target: Console) -> None:
        self.target = target
        self.clock = time.monotonic()
        self.done: dict[str, int] = {}
        self.count = self.total = self.iterations = 0

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done."""
        self.clock = time.monotonic()
        self.count, self.total = outcome.found, outcome.planned
        self.iterations = outcome.run_length
        for line in opening(outcome, workers):
            self.target.print(line, markup=False)

    def advance(self, worker: int, run: str, done: int) -> None:
        """Count the iterations of a run."""
        self.done[run] = done

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a finished run."""
        self.done[run] = self.iterations
        self.count += 1

    @property
    def rate(self) -> float:
        """Iterations in a second, over all workers."""
        return sum(self.done.values()) / max(time.monotonic() - self.clock, 1e-9)

    @property
    def left(self) -> str:
        """How long the rest takes at this rate."""
        rest = (self.total - self.count) * self.iterations / max(self.rate, 1e-9)
        return f"{rest / 60:.0f} min left" if rest >= 90 else f"{rest:.0f} s left"


class LineDisplay(_Counted):
    """A plain line now and then, for logs and pipes."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done."""
        super().begin(outcome, workers)
        self._last = time.monotonic()

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Say how far it is, unless that was said a moment ago."""
        super().finished(worker, run, result, diverged)
        now = time.monotonic()
        if now - self._last >= PLAIN_LINE_SECONDS or self.count == self.total or diverged:
            self._last = now
            words = "diverged" if diverged else result
            self.target.print(
                f"{self.count}/{self.total} runs, {self.rate:.0f} iterations/s, {self.left}; {run}: {words}",
                markup=False,
            )


class BarDisplay(_Counted):
    """A bar of the whole and a line for each worker, for a terminal."""

    def begin(self, outcome: Outcome, workers: int) -> None:
        """Say what is about to be done and draw the bars."""
        super().begin(outcome, workers)
        left = outcome.planned - outcome.found
        if not left:
            self._progress = None
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=self.target,
            transient=True,
            refresh_per_second=5,
        )
        self._whole = self._progress.add_task("iterations", total=left * self.iterations, note="")
        self._lines = [self._progress.add_task("  starting", total=self.iterations, note="") for _ in range(workers)]
        self._progress.start()

    def advance(self, worker: int, run: str, done: int) -> None:
        """Move the bars."""
        super().advance(worker, run, done)
        if self._progress is None:
            return
        self._progress.update(self._lines[worker], description=f"  {run}", completed=done)
        self._progress.update(
            self._whole,
            completed=sum(self.done.values()),
            note=f"{self.count}/{self.total} runs, {self.rate:.0f} it/s",
        )

    def finished(self, worker: int, run: str, result: str, diverged: bool) -> None:
        """Count a run, and say so if it diverged."""
        super().finished(worker, run, result, diverged)
        self.advance(worker, run, self.iterations)
        if diverged:
            self.target.print(f"{run} diverged", markup=False)

    def end(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()


def display(target: Console, silent: bool) -> Display:
    """Choose how progress is shown.

    Args:
        target: where.
        silent: show none.

    Returns:
        Bars on a terminal, else lines.
    """
    if silent:
        return Display()
    return BarDisplay(target) if target.is_terminal else LineDisplay(target)
