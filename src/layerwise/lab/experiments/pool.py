"""Jobs side by side in worker processes of one machine.

The master hands out one job at a time over a pipe to each worker and gets messages back. The same pipe is the
stop event: nothing but "stop" (or the end of the pipe, when the master was killed) can arrive while a job
runs, so a worker that finds something to read stops. Unlike a shared lock, a pipe cannot be left locked by a
process that was killed.

An interrupt from the keyboard reaches the whole process group. Workers are born with it blocked and then
ignore it: only the master decides, and it asks them to stop.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

STOP_SECONDS = 30.0  # how long workers may take to write their checkpoints, from the last one on, before a kill
DEATH_SECONDS = 20.0  # how long a worker whose pipe has ended may take to end itself, on a machine with much else to do
POLL_SECONDS = 0.1  # how often the master looks whether it was asked to stop
SAME_PRESS_SECONDS = 0.5  # two interrupts within this time are one press of a key


@dataclass(frozen=True)
class Failure:
    """A job that ended without finishing."""

    job: str
    doing: str  # what it last said that it was doing, or its name
    reason: str  # one line
    details: str = ""  # the traceback, or "" if the process died

    @property
    def kind(self) -> str:
        """What failures of one cause have in common: the reason but for its numbers, and the last line of code."""
        place = re.findall(r'^ *File ".*$', self.details, re.MULTILINE)[-1:]
        return "\n".join([re.sub(r"0x[0-9a-f]+|\d+", "#", self.reason), *place])


class Link:
    """A worker's end of the pipe, given to the function that does the job; ``number`` is the worker's, from 0."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self.number = connection, number
        self._stopped = False

    def stopped(self) -> bool:
        """Tell whether the worker is to stop, as it is when the master has died; once true, it stays true."""
        if not self._stopped and self._connection.poll():
            self._stopped = True
        return self._stopped

    def doing(self, name: str) -> None:
        """Say what is worked on, so that a crash can be named."""
        self._connection.send(("doing", name))

    def send(self, message: object) -> None:
        """Send something that can be pickled to the master, whose ``on_message`` gets it."""
        self._connection.send(("message", message))


class Interrupt:
    """Turns the first interrupt from the keyboard into a flag; a later one raises ``KeyboardInterrupt``.

    Other signals may mean the same, such as SIGTERM, by which a machine is shut down.
    """

    def __init__(self, *more: int) -> None:
        self.requested = False
        self._since = 0.0
        self._signals = (signal.SIGINT, *more)
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: object) -> None:
        # One press can arrive twice, at the process and at its group.
        if self.requested and time.monotonic() - self._since > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, time.monotonic()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # signals belong to the main thread
            self._previous = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Hold interrupts back, so that a process started here is born with them blocked."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, work: Callable[[Any, Link], None], method: str | None, number: int) -> None:
    """Be a worker: do one job after another until told to stop."""
    # It was spawned, and would spawn the workers of a loader too, whatever the master's default is.
    multiprocessing.set_start_method(method, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(connection, number)
    try:
        connection.send(("ready", None))
        while (job := connection.recv()) is not None:
            ending: tuple[str, object] = ("done", None)
            try:
                work(job, link)
            except (BrokenPipeError, EOFError):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                ending = ("failed", (reason, traceback.format_exc()))
            stopped = link.stopped()  # asked before the end is reported: what arrives after that is the next job
            connection.send(ending)
            if stopped:
                return
    except (BrokenPipeError, EOFError, ConnectionResetError):
        return  # the master is gone


class _Worker:
    """The master's view of one process."""

    def __init__(self, work: Callable[[Any, Link], None], number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # No daemon: daemons may not start processes, as a task's loader does. Without its master it ends by its pipe.
        given = (theirs, work, multiprocessing.get_start_method(allow_none=True), number)
        self.process = context.Process(target=_serve, args=given, daemon=False)
        resource_tracker.ensure_running()  # begun by start(), it would let interrupts through again
        with _interrupt_blocked():
            self.process.start()
        theirs.close()
        self.ready = False
        self.job: Any = None  # a Chain, or whatever can be pickled and has a name
        self.doing = ""
        self.left: float | None = None  # when its pipe ended

    @property
    def ended(self) -> bool:
        """Whether its process has ended after its pipe has, or goes on for too long."""
        gone = self.process.exitcode is not None
        return self.left is not None and (gone or time.monotonic() - self.left > DEATH_SECONDS)

    def give(self, job: Any) -> None:
        """Hand over a job; None sends the worker home."""
        self.job, self.doing = job, job.name if job else ""
        with suppress(OSError):  # it died; its end of the pipe says so
            self.connection.send(job)

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def run_jobs(
    work: Callable[[Any, Link], None],
    jobs: Sequence[Any],
    count: int,
    *,
    on_message: Callable[[int, Any], None],
    stop: Callable[[], bool] = lambda: False,
    rest: Callable[[Any, str], Any] = lambda job, doing: None,
    on_failure: Callable[[Failure], None] = lambda failure: None,
) -> list[Failure]:
    """Do jobs side by side, and give those that failed; one that was stopped or never begun has not failed.

    A job can be pickled and has a name. ``work`` is importable: an exception fails that job only. ``on_message`` gets
    the number of the worker, from 0, and what it sent. ``stop`` is asked about ten times a second, and the workers stop
    within about ``STOP_SECONDS``. ``rest`` gives what is left to be done of a job whose process died.
    """
    waiting = deque(jobs)
    failures: list[Failure] = []

    def fail(failure: Failure) -> None:
        failures.append(failure)
        on_failure(failure)

    workers: list[_Worker | None] = []
    try:
        workers += [_Worker(work, number) for number in range(min(count, len(waiting)))]
        while any(workers):
            if stop():
                _stop([worker for worker in workers if worker], workers, on_message)
                break
            ready = wait([worker.connection for worker in workers if worker and worker.left is None], POLL_SECONDS)
            for number, worker in enumerate(workers):
                if worker is None or not (worker.connection in ready or worker.ended):
                    continue
                if worker.left is not None:
                    if worker.job is not None or not worker.ready:
                        fail(_death(worker))
                    left = rest(worker.job, worker.doing) if worker.job is not None else None
                    if left is not None:
                        waiting.appendleft(left)
                    worker.close()
                    # One that died before its first job would die again; one that died in a job is replaced.
                    workers[number] = _Worker(work, number) if waiting and worker.ready else None
                    continue
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    worker.left = time.monotonic()  # its process soon ends
                    continue
                if kind == "message":
                    on_message(number, content)
                elif kind == "doing":
                    worker.doing = content
                else:
                    if kind == "failed":
                        fail(Failure(worker.job.name, worker.doing, *content))
                    worker.ready = True
                    worker.give(waiting.popleft() if waiting else None)
    finally:
        for worker in workers:
            if worker is not None:
                worker.close()
    return failures


def _death(worker: _Worker) -> Failure:
    code = worker.process.exitcode
    if code is None:
        how = f"left its work, and had not ended {DEATH_SECONDS:g} s later"
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    job = worker.job.name if worker.job else "start of a worker"
    return Failure(job, worker.doing or job, f"its process {how}")


def _stop(alive: list[_Worker], numbered: list[_Worker | None], on_message: Callable[[int, Any], None]) -> None:
    """Ask the workers to stop, and take what they had finished; those still starting have nothing to lose."""
    for worker in alive:
        if worker.ready:
            worker.give(None)
        else:
            worker.process.kill()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in alive:
        while worker.connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                kind, content = worker.connection.recv()
            except (EOFError, OSError):
                break
            if kind == "message":
                on_message(numbered.index(worker), content)
            elif kind in ("done", "failed"):
                break  # it has nothing more to say, and holds nothing that a kill could harm
