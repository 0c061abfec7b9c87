"""Chains of runs on Ray, here or on a cluster, a task each.

A task that sees the folder of the runs works in it, as a local worker does, with its locks and checkpoints. Another
works in a folder of its own: finished runs travel both ways, and a stopped run starts again the next time.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.chain import Advance, Chain, Finished, Skipped, do_chain, finished_runs
from layerwise.lab.experiments.pool import POLL_SECONDS, STOP_SECONDS, Failure, Link
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import CHECKPOINTS, BusyError, Runs
from layerwise.lab.runs.store import LARGEST_TABLE, read_bytes, versions, write_whole

FILES = ("run.json", "status.json", "metrics.parquet", "record.json")  # the last one says that the run is finished
ASK_SECONDS, TELL_SECONDS = 0.5, 0.2  # how often a task asks whether it is to stop, and tells how far it is
Run = tuple[Configuration, dict[str, bytes]]  # a finished run that travels: its configuration and its files


@dataclass
class _Wire:
    """What a pipe is to a local worker: messages go through one queue, and a stop is that the other is not empty."""

    task: int
    told: Any
    stops: Any
    private: Runs | None = None
    asked: float = 0.0
    advanced: float = 0.0

    def poll(self) -> bool:
        if time.monotonic() - self.asked < ASK_SECONDS:
            return False
        self.asked = time.monotonic()
        return not self.stops.empty()

    def send(self, content: tuple[str, Any]) -> None:
        message, run = content[1], None
        if isinstance(message, Advance):
            if time.monotonic() - self.advanced < TELL_SECONDS:
                return
            self.advanced = time.monotonic()
        if isinstance(message, Finished) and self.private is not None:
            run = _leaving(self.private, message.configuration)
        self.told.put((self.task, *content, run))


def _leaving(runs: Runs, configuration: Configuration) -> Run:
    folder = runs.folder(configuration).path
    return configuration, {name: read_bytes(folder / name, LARGEST_TABLE) for name in FILES if (folder / name).exists()}


def _arrived(runs: Runs, run: Run) -> None:
    """Write a run that travelled, unless it is there."""
    folder = runs.folder(run[0])
    with folder.lock():
        if folder.record() is None:
            for name in filter(run[1].__contains__, FILES):
                write_whole(folder.path / name, run[1][name])
            for leftover in CHECKPOINTS:  # of an earlier attempt here
                (folder.path / leftover).unlink(missing_ok=True)


def _do(chain: Chain, wire: _Wire, token: str, needed: dict[str, str], found: list[Run]) -> None:
    """Do a chain in a Ray worker; the driver's folder holds the token, and its results depend on the versions."""
    host, place = socket.gethostname(), chain.data_dir
    if wire.poll():  # before it could begin
        return
    if versions() != needed:
        why = "of the machine that asks, and results depend on them: install the same there"
        raise UsageError(f"versions={versions()!r} of {host} are not the {needed!r} {why}")
    if place is not None and not place.is_dir():
        raise UsageError(f"data_dir={str(place)!r} does not exist on {host}: put the data there on every machine")
    with tempfile.TemporaryDirectory(prefix="layerwise-") as private:
        if not (chain.out / token).exists():
            chain, wire.private = replace(chain, out=Path(private)), Runs(Path(private))
            for run in found:
                _arrived(wire.private, run)
        do_chain(chain, Link(wire, 0))  # type: ignore[arg-type]


def run_chains(
    chains: Sequence[Chain],
    jobs: int,
    *,
    address: str | None,
    on_message: Callable[[int, Any], None],
    on_failure: Callable[[Failure], None] = lambda failure: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Failure]:
    """Do chains side by side on Ray, as ``pool.run_jobs`` does jobs in processes; ``jobs`` limits no cluster."""
    if not chains:
        return []
    if find_spec("ray") is None:
        missing = "engine='ray' needs the module 'ray', which is not installed"
        raise UsageError(f"{missing}: run  pip install -e '.[ray]'  in the clone")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported
    import ray.exceptions
    from ray.util.queue import Queue

    waiting, running, failures = deque(chains), dict[int, Any](), list[Failure]()
    out, threads = chains[0].out, chains[0].threads
    runs = Runs(out)
    out.mkdir(parents=True, exist_ok=True)

    def give(chain: Chain) -> None:
        card, data_dir = chain.device.startswith("cuda"), chain.data_dir and chain.data_dir.resolve()
        # Ray shows a task its own card only, under the number 0.
        sent = replace(chain, out=out.resolve(), data_dir=data_dir, device="cuda" if card else chain.device)
        found = [_leaving(runs, record.configuration) for record in finished_runs(chain.runs, runs).values()]
        number = min(set(range(len(running) + 1)) - running.keys())
        task = ray.remote(num_cpus=threads, num_gpus=int(card), max_retries=1)(_do)
        reference = task.remote(sent, _Wire(number, told, stops), Path(token.name).name, versions(), found)
        running[number] = SimpleNamespace(reference=reference, chain=chain, doing=chain.name)

    def collect() -> None:
        references = [task.reference for task in running.values()]
        ended, _ = ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS)
        for number, kind, message, run in told.get_nowait_batch(told.qsize()):
            if number in running and kind == "doing":
                running[number].doing = message
            elif number in running:  # else it is a late word of a process that died
                try:
                    if run is not None:
                        _arrived(runs, run)
                    on_message(number, message)
                except BusyError as error:
                    on_message(number, Skipped(message.key, str(error)))
        for number, task in [(number, task) for number, task in running.items() if task.reference in ended]:
            del running[number]
            try:
                ray.get(task.reference)
                continue
            except ray.exceptions.RayTaskError as error:
                reason, details = f"{type(error.cause).__name__}: {error.cause}", str(error)
            except ray.exceptions.RayError as error:
                reason, details = f"its process died: {type(error).__name__}: {error}", ""
                waiting.extendleft(filter(None, [task.chain.rest(task.doing)]))
            failures.append(Failure(task.chain.name, task.doing, reason.partition("\n")[0], details))
            on_failure(failures[-1])

    # The program that calls may have started Ray.
    connection = nullcontext() if ray.is_initialized() else _connected(ray, jobs, threads, address)
    with connection, tempfile.NamedTemporaryFile(prefix=".shared-", dir=out) as token:
        # One more than a cluster runs, so that no processor waits for the driver.
        places = jobs if address is None else 1 + int(ray.cluster_resources().get("CPU", 0)) // threads
        told, stops = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
        try:
            while (waiting or running) and not stop():
                while waiting and len(running) < places:
                    give(waiting.popleft())
                collect()
            stops.put(True)  # those that have not begun end as they begin
            deadline = time.monotonic() + STOP_SECONDS
            while running and time.monotonic() < deadline:
                collect()
        finally:
            for task in running.values():
                ray.cancel(task.reference, force=True)
            told.shutdown()
            stops.shutdown()
    return failures


@contextmanager
def _connected(ray: Any, jobs: int, threads: int, address: str | None) -> Iterator[None]:
    """Join a cluster, or start Ray here; leave as it was found."""
    where = "/tmp" if os.path.isdir("/tmp") else None  # sockets lie in it, whose paths may have about a hundred letters
    with tempfile.TemporaryDirectory(prefix="lw", dir=where, ignore_cleanup_errors=True) as place:
        own = {"num_cpus": jobs * threads, "include_dashboard": False, "object_store_memory": 2**27, "_temp_dir": place}
        how: dict[str, Any] = own if address is None else {"address": address}
        try:
            ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"address={address!r}: {reason}; give the address that  ray start --head  told") from error
        try:
            largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            if largest < threads:
                most = f"the largest machine of the cluster has {largest:g} processors"
                raise UsageError(f"threads={threads!r} of a run: {most}; use as many threads at most")
            yield
        finally:
            ray.shutdown()
