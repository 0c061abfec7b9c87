"""The runs of a plan, each shared by all processes that ``torchrun --nproc-per-node 2 -m layerwise run NAME`` starts.

The first process leads: it alone reads and writes the store, tests the network and says which run is next, so that the
others need not see its disk, only the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments.chain import Alone, Chain, do_chain, do_run
from layerwise.lab.experiments.plan import Plan
from layerwise.lab.experiments.pool import Failure, Interrupt
from layerwise.lab.experiments.runner import Display, Outcome, Settings, carry_out
from layerwise.lab.training.distributed import Processes, joined
from layerwise.lab.training.networks import WITH_BATCH_NORMALISATION


def run_shared(plan: Plan, settings: Settings, display: Display | None = None) -> Outcome | None:
    """Do the runs of the first process's plan one after another, each shared by all processes.

    Jobs, engine and address have no meaning here. The outcome is that of the first process; the others get None.
    """
    processes = joined(settings.device)
    try:
        if not processes.first:
            with Interrupt() as interrupt:
                return follow(processes, lambda: interrupt.requested)
        # Before anything is written. What a user's own task needs is seen when it comes.
        for constants in (run.configuration.constants for run in plan.runs if run.task is None):
            processes.check(constants.batch_size, normalised=constants.model.startswith(WITH_BATCH_NORMALISATION))
        shared, engine = replace(settings, jobs=1), partial(lead, processes)
        return carry_out(places.ready(plan, settings.data_dir), shared, display, engine=engine)
    finally:
        if processes.first and processes.in_step:
            processes.from_first(lambda: None)
        dist.destroy_process_group()


def lead(
    processes: Processes, chains: Sequence[Chain], jobs: int, *, on_message: Any, stop: Callable[[], bool], **told: Any
) -> list[Failure]:
    """Be the first process: do chains one after another, with the others at every run; failures come as messages."""
    for chain in chains:
        if not stop():
            do_chain(replace(chain, device=processes.device), Alone(stop, partial(on_message, 0)), processes)
    return []


def follow(processes: Processes, stop: Callable[[], bool] = lambda: False) -> None:
    """Be a process beside the first one: do what ``do_chain`` does there; ``stop`` stops the run in all of them."""
    while order := processes.from_first(lambda: None):
        planned, configuration, chain = order
        torch.set_num_threads(chain.threads)
        try:
            do_run(planned, configuration, replace(chain, device=processes.device), Alone(stop), processes=processes)
        except Exception:
            if not processes.in_step:
                raise
