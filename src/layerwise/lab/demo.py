"""The demo: does the layer-adaptive rule lower LeNet's error, and by more than a larger global rate would?

Three solvers, three arms, several seeds. One job is one solver and one seed; it runs its arms in order,
because the control (``plain at the mean factor``) multiplies the base rate by the mean factor, over layers
and iterations, that the layer-adaptive run of the same solver and seed had. All arms of a seed begin with the
same weights and see the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layerwise.lab import data, plan
from layerwise.lab.jobs import Job, do_job
from layerwise.lab.results import Results
from layerwise.lab.solvers import SOLVERS
from layerwise.lab.store import RunStore
from layerwise.lab.training import ARMS, RECORD_FIELDS, Run


@dataclass(frozen=True)
class Protocol:
    """How long a run is and what is recorded.

    Attributes:
        iterations: updates in all.
        record_at: numbers of updates after which the test error is measured; the last one is judged.
        loss_every: iterations between two records of the training loss.
        rate_every: iterations between two records of factors and rates.
    """

    iterations: int
    record_at: tuple[int, ...]
    loss_every: int = 10
    rate_every: int = 5


PROTOCOLS = {
    # 300 batches of 64 are 4.8 passes over 4,000 digits.
    "digits5k": Protocol(300, (50, 100, 200, 300)),
    # The rows of Singh et al. 2015, Table I.
    "mnist": Protocol(1800, (600, 1000, 1400, 1800), rate_every=10),
}
"""Data set -> protocol."""


@dataclass(frozen=True, kw_only=True)
class Settings(plan.Settings):
    """What the demo is asked to do.

    Attributes:
        solvers: keys of ``solvers.SOLVERS``.
        protocol: None for that of the data set.
    """

    solvers: tuple[str, ...] = tuple(SOLVERS)
    protocol: Protocol | None = None


class Outcome(plan.Outcome):
    """What came of the demo."""

    settings: Settings
    protocol: Protocol
    results: Results
    subject = "Caffe's LeNet"

    @property
    def planned(self) -> int:
        """Number of runs of the whole plan."""
        return len(self.results.solvers) * len(self.results.seeds) * len(ARMS)

    @property
    def run_length(self) -> int:
        """Iterations of one run."""
        return self.protocol.iterations

    def result_words(self, record: dict[str, Any]) -> str:
        """Say what came of a run."""
        return f"{record['test_error'][-1][1]:.2f} % error"


def _pending(outcome: Outcome, store: RunStore) -> list[Job]:
    """Load the finished runs into the outcome and give the jobs that are left."""
    protocol, results = outcome.protocol, outcome.results
    jobs = []
    for seed in results.seeds:
        for solver in results.solvers:
            left, factor = [], None
            for arm in ARMS:
                run = Run(
                    dataset=outcome.dataset,
                    solver=solver,
                    arm=arm,
                    seed=seed,
                    iterations=protocol.iterations,
                    record_at=protocol.record_at,
                    loss_every=protocol.loss_every,
                    rate_every=protocol.rate_every,
                )
                record: dict[str, Any] | None = None
                if arm != "control":
                    record = store.load(run.name, run.configuration())
                elif factor is not None:
                    record = store.load(run.name, replace(run, rate_factor=factor).configuration())
                if record is None:
                    left.append(run)
                    continue
                results.records[run.key] = record
                outcome.found += 1
                if arm == "layer-adaptive":
                    factor = record["factor"]["mean"]
            if left:
                jobs.append(Job(tuple(left), outcome.settings.data_dir, factor))
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
    name = data.choose(settings.data_dir)
    dataset = data.load(name, settings.data_dir)
    protocol = settings.protocol or PROTOCOLS[name]
    results = Results(settings.solvers, tuple(range(settings.seeds)), protocol.record_at)
    outcome = Outcome(settings, name, dataset.title, len(dataset.test_labels), protocol, results)
    store = RunStore(outcome.folder, RECORD_FIELDS)
    plan.carry_out(outcome, store, lambda: _pending(outcome, store), do_job, display or plan.Display())
    return outcome
