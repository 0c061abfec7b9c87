"""Chains of runs on Ray: on the processors of this machine, or of a cluster.

Every chain is one Ray task. A task whose machine sees the folder of the runs works in it, as a local worker does, with
its locks and checkpoints. Another works in a folder of its own; what is finished travels to the driver, which writes it
into the folder, and the finished runs that controls need travel to the task. A run that is stopped there begins anew
the next time. The numbers are the same everywhere: what is done is ``chains.do_chain``.

A small actor, the board, holds what tasks have said until the driver takes it, and whether they are to stop.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.chain import Chain, Finished, Skipped, complete
from layerwise.lab.experiments.pool import POLL_SECONDS, STOP_SECONDS, Failure
from layerwise.lab.experiments.ray_task import Board, Delivery, Files, Parcel, do_parcel, files_of, write_files
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import CHECKPOINTS, Runs
from layerwise.lab.runs.locks import BusyError
from layerwise.lab.runs.store import versions, write_whole

OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray that is started here: what travels is a few megabytes."""


def run_chains(
    chains: Sequence[Chain],
    jobs: int,
    *,
    address: str | None,
    on_message: Callable[[int, Any], None],
    on_failure: Callable[[Failure], None] = lambda failure: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Failure]:
    """Do chains side by side on Ray.

    Args:
        chains: what to do, in order.
        jobs: at most so many at once where Ray is started here; a cluster takes as many as it has processors for.
        address: of the cluster, as ``ray.init`` takes it; None starts Ray on this machine and ends it again.
        on_message: called with a number from 0, which no two running chains share, and a message of ``work``.
        on_failure: called with each chain that failed, as soon as it has.
        stop: asked about ten times a second; True lets the running chains write checkpoints and end.

    Returns:
        The chains that failed. Chains that were stopped or never begun are not failures.

    Raises:
        UsageError: Ray is not installed, no cluster at the address, or no machine of it has the processors.
    """
    if not chains:
        return []
    ray = _imported()
    with _connected(ray, jobs, chains[0], address), _token(chains[0].out) as token:
        return _Driver(ray, jobs if address is None else None, token, on_message, on_failure).carry_out(chains, stop)


DIED = "its process died"
"""How the reason begins where a task did not end by itself."""


@dataclass
class _Running:
    """The driver's view of a task."""

    name: str
    chain: Chain
    number: int
    doing: str


@dataclass
class _Driver:
    """Gives chains to Ray and brings back what comes of them."""

    ray: Any
    jobs: int | None
    token: str
    on_message: Callable[[int, Any], None]
    on_failure: Callable[[Failure], None]
    failures: list[Failure] = field(default_factory=list)
    running: dict[Any, _Running] = field(default_factory=dict)
    given: int = 0

    def carry_out(self, chains: Sequence[Chain], stop: Callable[[], bool]) -> list[Failure]:
        """Do the chains; see ``run_chains``."""
        ray, waiting = self.ray, deque(chains)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self.board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self.task = ray.remote(max_retries=0)(do_parcel)
        try:
            while waiting or self.running:
                if stop():
                    self._stop()
                    break
                while waiting and len(self.running) < self._places(waiting[0]):
                    self._give(waiting.popleft())
                waiting.extendleft(self._collect(POLL_SECONDS))
        finally:
            for reference in self.running:
                ray.cancel(reference, force=True)
            ray.kill(self.board)
        return self.failures

    def _places(self, chain: Chain) -> int:
        """Give the number of chains that may be with Ray at once."""
        if self.jobs is not None:
            return self.jobs
        # One more than run, so that no processor waits for the driver.
        return 1 + int(self.ray.cluster_resources().get("CPU", 0)) // chain.threads

    def _give(self, chain: Chain) -> None:
        card = chain.device.startswith("cuda")
        # Ray shows a task its own card only, under the number 0.
        sent = replace(
            chain,
            out=chain.out.resolve(),
            data_dir=chain.data_dir and chain.data_dir.resolve(),
            device="cuda" if card else chain.device,
        )
        self.given += 1
        name = f"{self.given} {chain.name}"
        parcel = Parcel(name, sent, self.token, versions(), tuple(_finished(chain)))
        options = {"num_cpus": chain.threads, "num_gpus": 1 if card else 0, "name": name}
        reference = self.task.options(**options).remote(parcel, self.board)
        taken = {task.number for task in self.running.values()}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self.running[reference] = _Running(name, chain, number, chain.name)

    def _collect(self, seconds: float) -> list[Chain]:
        """Wait a moment, pass on what tasks have said, and take leave of those that have ended.

        Returns:
            What is left to be done of chains whose process died in one of their runs.
        """
        left = []
        ended, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        if ended:
            ended, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        tasks = {task.name: task for task in self.running.values()}
        for name, kind, content in self.ray.get(self.board.take.remote()):
            task = tasks.get(name)
            if task is None:  # a late word of how far a run was, which no task waits to see delivered
                continue
            if kind == "doing":
                task.doing = content
            else:
                self._pass_on(task, content)
        for reference in ended:
            task = self.running.pop(reference)
            failure = self._failure(reference)
            if failure is None:
                continue
            self.failures.append(Failure(task.chain.name, task.doing, *failure))
            self.on_failure(self.failures[-1])
            rest = task.chain.rest(task.doing) if failure[0].startswith(DIED) else None
            if rest is not None:
                left.append(rest)
        return left

    def _pass_on(self, task: _Running, message: object) -> None:
        """Give a message to the person who asked; a run that travelled is written first."""
        if isinstance(message, Delivery):
            message = _received(task.chain, message)
        self.on_message(task.number, message)

    def _failure(self, reference: Any) -> tuple[str, str] | None:
        """Say why a task that has ended failed, or None."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # as where layerwise is not installed
            return f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0], str(error)
        except self.ray.exceptions.RayError as error:
            return f"{DIED}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", ""

    def _stop(self) -> None:
        """Ask the tasks to stop, and take what they still say; those that have not begun end as they begin."""
        self.ray.get(self.board.stop.remote())
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < deadline:
            self._collect(POLL_SECONDS)


def _received(chain: Chain, delivery: Delivery) -> Finished | Skipped:
    """Write a run that travelled into the driver's folder, unless it is there or another process works on it."""
    folder = Runs(chain.out).folder(delivery.finished.configuration)
    try:
        with folder.lock():
            if folder.record() is None:
                write_files(folder.path, delivery.files)
                for leftover in CHECKPOINTS:  # of an earlier attempt here
                    (folder.path / leftover).unlink(missing_ok=True)
    except BusyError as error:
        return Skipped(delivery.finished.key, str(error))
    return delivery.finished


def _finished(chain: Chain) -> Iterator[tuple[Configuration, Files]]:
    """Give the finished runs of a chain, whose controls may need them and which are not to be done again."""
    runs, method = Runs(chain.out), None
    for planned in chain.runs:
        configuration = complete(planned, method)
        record = runs.find(configuration) if configuration is not None else None
        if record is not None:
            yield record.configuration, files_of(record.folder)
        if planned.arm.control is None:
            method = record


def _imported() -> Any:
    """Import Ray, or say how to install it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported
    try:
        import ray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise UsageError(
            "engine='ray' needs the module 'ray', which is not installed: run  pip install -e '.[ray]'  in the clone"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, jobs: int, chain: Chain, address: str | None) -> Iterator[None]:
    """Join a cluster, or start Ray here; leave as it was found."""
    if ray.is_initialized():  # by the person's own program
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"address={address!r}: {reason}; give the address that  ray start --head  told") from error
        try:
            largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            if largest < chain.threads:
                raise UsageError(
                    f"threads={chain.threads!r} of a run: the largest machine of the cluster has {largest:g} "
                    "processors; use as many threads at most"
                )
            yield
        finally:
            ray.shutdown()
        return
    # Sockets lie in it, whose paths may have about a hundred letters.
    place = tempfile.mkdtemp(prefix="lw", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        ray.init(
            num_cpus=jobs * chain.threads,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=place,
            **quiet,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _token(out: Path) -> Iterator[str]:
    """Put a file into the folder of the runs, by which a task knows the folder again."""
    token = f".shared-{uuid.uuid4().hex}"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / token, token.encode())
    try:
        yield token
    finally:
        with suppress(OSError):
            (out / token).unlink()
