"""The runs of a plan, each shared by several processes.

``torchrun --nproc-per-node 2 -m layerwise run NAME`` starts the processes and ``run_shared`` is what each of them does:
the runs of a plan one after another, every one on all processes. The first process leads: it alone reads and writes the
store, tests the network and says which run is next, so that the others need not see its disk, only the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments.chain import Chain
from layerwise.lab.experiments.outcome import Display, Outcome, Settings
from layerwise.lab.experiments.plan import Plan, PlannedRun
from layerwise.lab.experiments.pool import Failure, Interrupt
from layerwise.lab.experiments.runner import carry_out
from layerwise.lab.experiments.work import Alone, do_chain, do_run
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.records import Record
from layerwise.lab.training.distributed import DistributedProcesses, indivisible, joined


def run_shared(plan: Plan, settings: Settings, display: Display | None = None) -> Outcome | None:
    """Do the runs of a plan one after another, each shared by all processes that ``torchrun`` started.

    Args:
        plan: the experiment; only the first process's counts.
        settings: how; jobs, engine and address have no meaning here.
        display: told what happens, in the first process.

    Returns:
        The outcome in the first process, as ``experiment.carry_out`` gives it; None in the others.

    Raises:
        UsageError: not started by ``torchrun``, a batch size that cannot be divided, or what ``carry_out`` raises.
    """
    processes = joined(settings.device)
    if processes is None:
        raise UsageError("RANK is not set: start with  torchrun --nproc-per-node 2 -m layerwise run NAME")
    try:
        if not processes.first:
            with Interrupt() as interrupt:
                follow(processes, lambda: interrupt.requested)
            return None
        try:
            _check_batches(plan, processes.count)
            shared = replace(settings, jobs=1)
            return carry_out(places.ready(plan, settings.data_dir), shared, display, engine=partial(lead, processes))
        finally:
            if processes.in_step:
                processes.from_first(lambda: None)
    finally:
        processes.leave()


def _check_batches(plan: Plan, count: int) -> None:
    """Refuse batches that cannot be divided, before anything is trained; a task's are seen when they come."""
    for run in plan.runs:
        size = None if run.task is not None else run.configuration.constants.batch_size
        if size is not None and size % count:
            raise indivisible(size, count)


@dataclass(frozen=True)
class _Order:
    """A run that all processes do next."""

    planned: PlannedRun
    configuration: Configuration
    chain: Chain


class _Link(Alone):
    """Remembers what is worked on, so that a failure can be named."""

    current = ""

    def doing(self, name: str) -> None:
        self.current = name


def lead(
    processes: DistributedProcesses,
    chains: Sequence[Chain],
    jobs: int,
    *,
    on_message: Callable[[int, Any], None],
    on_failure: Callable[[Failure], None],
    stop: Callable[[], bool],
) -> list[Failure]:
    """Be the first process: do chains one after another, with the others at every run.

    Args:
        processes: of which this is the first.
        chains: what to do, in order.
        jobs: has no meaning here.
        on_message: called with 0 and a message of ``work``.
        on_failure: has no meaning here.
        stop: asked once an update.

    Returns:
        Nothing: runs that fail, in every process alike, are told of by messages.
    """
    link = _Link(stop, partial(on_message, 0))

    def do(planned: PlannedRun, configuration: Configuration, chain: Chain, link: Any, *, method: Any = None) -> Record:
        processes.from_first(lambda: _Order(planned, configuration, chain))
        with processes.step():
            return do_run(planned, configuration, chain, link, method=method, processes=processes)

    for chain in chains:
        if stop():
            break
        do_chain(replace(chain, device=processes.device), link, do, survives=lambda: processes.in_step)
    return []


def follow(processes: DistributedProcesses, stop: Callable[[], bool] = lambda: False) -> None:
    """Be a process beside the first one: do what it orders until it orders nothing.

    Args:
        processes: of which this is not the first.
        stop: asked once an update; True stops the run in all processes.
    """
    while True:
        order: _Order | None = processes.from_first(lambda: None)
        if order is None:
            return
        chain = replace(order.chain, device=processes.device)
        link = Alone(stop)
        try:
            with processes.step():
                do_run(order.planned, order.configuration, chain, link, processes=processes)
        except Exception:
            if not processes.in_step:
                raise
