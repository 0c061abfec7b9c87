"""Runs that are made to be killed, and a process that forks them, so that each need not import torch again.

Read from the standard input, a line of JSON each: ``{"do": ..., "out": ..., "log": ...}`` forks a process that does it
and answers with its number; ``{"wait": number}`` answers with how it ended.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars  # noqa: F401  (imported once, before the forks; its threads begin with its first work)
import torch
from torch import nn

from layerwise import rules
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments import runner as experiment
from layerwise.lab.experiments.plan import Arm, Plan, PlannedRun, Quantity, Subject
from layerwise.lab.experiments.runner import Outcome, Settings, load_finished
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.training.engine import Training
from layerwise.lab.training.trial import Trial

UPDATES, EPOCH = 24, 8


class Small:
    """A task of a network with dropout, momentum and a schedule; every update is noted in a file.

    Args:
        log: the file; a line holds the process, the run and the number of the update.
        pause: seconds that an update sleeps.
        ends: what happens at the fifth update of a process: a key of ``ENDS``, or nothing.
    """

    def __init__(self, log: Path, pause: float = 0.0, ends: str = "") -> None:
        self.log, self.pause, self.ends, self.done = log, pause, ends, 0

    def trial(self, configuration: Configuration, device: str, copies: Path | None = None) -> Trial:
        """Make the trial of a run."""
        torch.manual_seed(configuration.seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        points, signs = torch.randn(64, 6, generator=generator), torch.arange(64) % 3
        name = configuration.name

        def batches(epoch: int, skip: int) -> Iterator[Any]:
            order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch + 100 * configuration.seed))
            return iter([(points[part], signs[part]) for part in order.split(64 // EPOCH)][skip:])

        def loss(network: nn.Module, batch: Any) -> torch.Tensor:
            note(self.log, name)
            time.sleep(self.pause)
            self.done += 1
            if self.ends and self.done == 5:
                ENDS[self.ends]()
            return nn.functional.cross_entropy(network(batch[0]), batch[1])

        def evaluate(network: nn.Module, stop: Any) -> dict[str, float]:
            network.eval()
            with torch.no_grad():
                value = nn.functional.cross_entropy(network(points), signs).item()
            network.train()
            return {"test_loss": value}

        return Trial(
            model=model,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9),
            schedule_unit="iteration",
            batches=batches,
            loss=loss,
            evaluate=evaluate,
            iterations=None,
            epochs=UPDATES // EPOCH,
            epoch_length=EPOCH,
            test_every=None,
            layers_every=4,
            factors_every=1,
        )


def _too_little_memory() -> None:
    """Take more memory than the process may have."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
    try:
        bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _fault() -> None:
    """Read where there is no memory."""
    import ctypes

    ctypes.string_at(0)


ENDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "segmentation fault": _fault,
    "abort": os.abort,
    "leave": lambda: sys.exit("enough"),
    "memory": _too_little_memory,
    "tensor memory": lambda: torch.empty(2**60),
    "error": lambda: 1 // 0,
}
"""How a run may end."""


def note(log: Path, name: str) -> None:
    """Add a line to a file in one piece."""
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(stream, f"{os.getpid()} {name}\n".encode())
    os.close(stream)


def plan_of(log: Path, pause: float = 0.0, seeds: int = 1) -> Plan:
    """Lay out a plain arm, a method and two controls, which follow their method in one chain."""
    quantity = Quantity(name="test_loss", words="test loss", unit="", difference_unit="")
    arms = (
        Arm(name="plain", words="plain"),
        Arm(name="method", words="layer-adaptive", rule={"name": "LayerAdaptive"}, against=("plain", "rate")),
        Arm(name="rate", words="mean factor", control="mean factor", of="method"),
        Arm(name="shuffled", words="shuffled layers", control="shuffled layers", of="method"),
    )
    task = Small(log, pause)
    runs = tuple(
        PlannedRun(
            subject="small",
            arm=arm,
            seed=seed,
            configuration=Configuration(trial={"model": "small", "epochs": 3}, rule=arm.rule, seed=seed),
            task=task,
        )
        for seed in range(seeds)
        for arm in arms
    )
    return Plan(
        name="small",
        title="A small task",
        source="made up",
        layout="curves",
        quantity=quantity,
        columns=(),
        step_unit="epoch",
        subjects=(Subject(name="small", words="a small network"),),
        arms=arms,
        seeds=tuple(range(seeds)),
        runs=runs,
    )


def outcome_of(plan: Plan, out: Path) -> Outcome:
    """Gather what is finished."""
    return Outcome(plan, Settings(out=out), load_finished(plan, Runs(out)))


def share(out: Path, log: Path, seeds: int) -> None:
    """Do all runs that no other process does, until there is none left."""
    plan = plan_of(log, 0.002, seeds)
    while len(load_finished(plan, Runs(out)).records) < len(plan.runs):
        for chain in plan.chains():
            part = chains.Chain(runs=chain, out=out, checkpoint_seconds=0.01)
            chains.do_chain(part, chains.Alone(message=_no_error))


def _no_error(message: object) -> None:
    if isinstance(message, chains.Failure):
        raise RuntimeError(repr(message))


def train(out: Path, log: Path, *, pause: float, checkpoint_seconds: float, seeds: int) -> None:
    """Do all runs in this process."""
    plan = plan_of(log, pause, seeds)
    for chain in plan.chains():
        labels = plan.labels(chain[0].subject)
        part = chains.Chain(runs=chain, out=out, checkpoint_seconds=checkpoint_seconds, labels=labels)
        chains.do_chain(part, Alone())


class Alone(chains.Alone):
    """A link that lets a failure end the process."""

    def __init__(self) -> None:
        super().__init__(message=_no_failure)


def _no_failure(message: object) -> None:
    if isinstance(message, (chains.Failure, chains.Skipped)):
        raise RuntimeError(repr(message))


def do_report(out: Path) -> None:
    """Write the report of what is finished."""
    from layerwise.lab import report

    report.write(outcome_of(plan_of(out / "log"), out), "")


def do_sweep(out: Path, log: Path, jobs: int, engine: str = "local") -> None:
    """Carry the plan out in worker processes."""
    experiment.Chain = functools.partial(chains.Chain, checkpoint_seconds=0.02)
    plan = plan_of(log, 0.01, seeds=2)
    outcome = experiment.carry_out(plan, Settings(out=out, jobs=jobs, engine=engine))
    words = [failure.reason for failure in outcome.failures]
    (out / "said.json").write_text(json.dumps([len(outcome.results.records), words, outcome.skipped]))


def die_at(event: int) -> None:
    """Kill this process just before its n-th operation on a file, or, for odd n, within a write after it."""
    import resource

    left = event

    def watch(name: str, _: Any) -> None:
        nonlocal left
        if name not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        left -= 1
        if left == -1 and event % 2:
            # The system ends the process at the first byte of a file beyond the limit.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (37 * event % 2000, resource.RLIM_INFINITY))
        elif left < 0 and not event % 2:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _act(asked: dict[str, Any]) -> None:
    out, log = Path(asked["out"]), Path(asked["log"])
    if asked.get("event") is not None:
        die_at(asked["event"])
    if asked["do"] == "train":
        train(out, log, pause=asked["pause"], checkpoint_seconds=asked["seconds"], seeds=asked.get("seeds", 1))
    elif asked["do"] == "share":
        share(out, log, asked["seeds"])
    elif asked["do"] == "report":
        do_report(out)
    else:
        do_sweep(out, log, asked["jobs"], asked.get("engine", "local"))


def _warm_up() -> None:
    """Train once without a folder: much of torch is imported at a first step, and is there for all forks then."""
    run = plan_of(Path(os.devnull)).runs[1]
    Training(run.task.trial(run.configuration, "cpu"), rules.LayerAdaptive(), run.configuration).run()


def _serve() -> None:
    torch.set_num_threads(1)
    _warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                said = os.open(asked["log"] + ".said", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                for stream in (1, 2):
                    os.dup2(said, stream)
                code = 1
                try:
                    _act(asked)
                    code = 0
                except BaseException as error:
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
                    raise
                finally:
                    os._exit(code)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # What a run is made of must be found by workers, which import this file by its name.
    sys.path.insert(0, os.path.dirname(__file__))
    import victims

    victims._serve()
