"""The demo: is amplifying the layers that G or G′ chooses better than amplifying none, some at random, or all?

Five arms, several seeds. One job is one run; the arms of a seed begin with the same weights and see the same
batches with the same crops, so they are the same training until the first amplified epoch.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.lab import cifar_recipe, plan
from layerwise.lab.amplification import images
from layerwise.lab.amplification.results import Results
from layerwise.lab.amplification.training import ARMS, RECORD_FIELDS, Protocol, Run, train
from layerwise.lab.errors import UsageError
from layerwise.lab.jobs import do_run
from layerwise.lab.pool import Link
from layerwise.lab.store import RunStore

DEFAULT_DECAY = cifar_recipe.Recipe().weight_decay
DEFAULT_PROTOCOL = Protocol()


@dataclass(frozen=True, kw_only=True)
class Settings(plan.Settings):
    """What the demo is asked to do.

    Attributes:
        weight_decay: of the optimizer.
        protocol: network, slice of data and length of the runs.
    """

    weight_decay: float = DEFAULT_DECAY
    protocol: Protocol = DEFAULT_PROTOCOL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.weight_decay) and 0.0 <= self.weight_decay < 1.0):
            raise UsageError(
                f"weight-decay={self.weight_decay!r}: must be from 0 to below 1; the recipe's is {DEFAULT_DECAY}, and "
                "0 is the other one to report"
            )


class Outcome(plan.Outcome):
    """What came of the demo. Runs of another weight decay than the recipe's have a folder and a report of their own."""

    settings: Settings
    protocol: Protocol
    results: Results

    @property
    def _suffix(self) -> str:
        decay = self.settings.weight_decay
        return "" if decay == DEFAULT_DECAY else f"-decay{decay:g}"

    @property
    def folder(self) -> Path:
        """Folder of the runs."""
        return self.settings.out / f"amplification{self._suffix}"

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.settings.out / f"report-amplification{self._suffix}.html"

    @property
    def subject(self) -> str:
        """The network, in words."""
        return f"ResNet-{self.protocol.depth}, {self.protocol.width} channels wide,"

    @property
    def planned(self) -> int:
        """Number of runs of the whole plan."""
        return len(self.results.seeds) * len(ARMS)

    @property
    def run_length(self) -> int:
        """Iterations of one run."""
        return self.protocol.iterations

    @property
    def run_words(self) -> str:
        """The length of a run in words."""
        return f"{self.protocol.epochs} epochs"

    def result_words(self, record: dict[str, Any]) -> str:
        """Say what came of a run."""
        return f"{record['accuracy'][-1][1]:.2f} % accuracy"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        run: what to do.
        data_dir: folder that holds CIFAR-10, or None.
    """

    run: Run
    data_dir: Path | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.run.name


def do_job(job: Job, link: Link) -> None:
    """Do one run on one thread; send ``Advance`` now and then, and ``Finished``.

    Args:
        job: what to do.
        link: where messages go and a stop comes from.
    """
    torch.set_num_threads(1)
    # That no layer was chosen is in the record and in the report; a warning would break the bars.
    logging.getLogger("layerwise").setLevel(logging.ERROR)
    link.doing(job.name)
    run = job.run
    dataset = images.load(run.dataset, job.data_dir, run.protocol.train_count, run.protocol.test_count)
    do_run(run, dataset, train, link)


def _pending(outcome: Outcome, store: RunStore) -> list[Job]:
    """Load the finished runs into the outcome and give the jobs that are left, seed by seed."""
    jobs = []
    for seed in outcome.results.seeds:
        for arm in ARMS:
            run = Run(
                dataset=outcome.dataset,
                arm=arm,
                seed=seed,
                weight_decay=outcome.settings.weight_decay,
                protocol=outcome.protocol,
            )
            record: dict[str, Any] | None = store.load(run.name, run.configuration())
            if record is None:
                jobs.append(Job(run, outcome.settings.data_dir))
                continue
            outcome.results.records[run.key] = record
            outcome.found += 1
    return jobs


def run_demo(settings: Settings, display: plan.Display | None = None) -> Outcome:
    """Do the runs that are not finished yet, and write each to its file as it ends.

    Args:
        settings: what to do.
        display: told what happens.

    Returns:
        The outcome; ``results.parquet`` and the report are not written by this function.

    Raises:
        UsageError: the data are missing or damaged.
    """
    protocol = settings.protocol
    name = images.choose(settings.data_dir)
    dataset = images.load(name, settings.data_dir, protocol.train_count, protocol.test_count)
    results = Results(tuple(range(settings.seeds)), protocol.epochs, protocol.batches)
    outcome = Outcome(settings, name, dataset.title, len(dataset.test_labels), protocol, results)
    store = RunStore(outcome.folder, RECORD_FIELDS)
    plan.carry_out(outcome, store, lambda: _pending(outcome, store), do_job, display or plan.Display())
    return outcome
