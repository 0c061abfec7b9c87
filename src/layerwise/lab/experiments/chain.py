"""What a worker is given, does and tells: the runs of a chain, each from its last checkpoint to its record."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import controls
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.plan import PlannedRun
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import FACTORS, BusyError, RunFolder, Runs
from layerwise.lab.runs.record import Record
from layerwise.lab.training import pretraining, trial
from layerwise.lab.training.devices import begin_memory, card_count, device_of_worker, peak_memory, whole_memory
from layerwise.lab.training.distributed import Processes
from layerwise.lab.training.engine import CHECKPOINT_SECONDS, Training
from layerwise.lab.training.trial import StoppedError, Trial
from layerwise.layers import DOUBTS


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Runs that one worker does in order: controls come after the method's run that they need."""

    runs: tuple[PlannedRun, ...]  # those that are finished are only read
    out: Path
    data_dir: Path | None = None
    device: str = "cpu"
    loaders: int = 0  # processes beside this one that decode photographs ahead
    checkpoint_seconds: float = CHECKPOINT_SECONDS  # between two checkpoints
    labels: Mapping[str, Any] = field(default_factory=dict)  # what run.json says of the experiment

    @property
    def name(self) -> str:
        """Label of the first run, by which the master calls the chain until a run is begun."""
        return self.runs[0].label

    @property
    def threads(self) -> int:
        """Threads of the process that does it: part of what its runs are, as another number rounds otherwise."""
        return self.runs[0].configuration.threads

    def rest(self, doing: str) -> Chain | None:
        """Give what can still be done when the process has died in the run of this name; None if nothing is left."""
        left = tuple(run for run in self.runs if run.label != doing)
        # Controls need the method's run, which is the first.
        return replace(self, runs=left) if left[:1] == self.runs[:1] and 1 < len(left) < len(self.runs) else None


@dataclass(frozen=True)
class Advance:
    """A run has done so many of its updates; the whole number is None where it is not known beforehand."""

    run: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Memory:
    """A run has done its first updates with so many bytes of a device that has so many."""

    used: int
    whole: int


@dataclass(frozen=True)
class Finished:
    """A run is finished; its record is found by its configuration."""

    key: tuple[str, str, int]
    configuration: Configuration


@dataclass(frozen=True)
class Skipped:
    """A run was not done, and why: another process works on it."""

    key: tuple[str, str, int]
    reason: str


def complete(planned: PlannedRun, method: Record | None) -> Configuration | None:
    """Give the configuration of a run; of a control only if its method's run is finished, else None."""
    if planned.arm.control is None:
        return planned.configuration
    if method is None:
        return None
    return controls.configuration_of_control(planned.configuration, planned.arm.control, method)


def finished_runs(chain: Sequence[PlannedRun], runs: Runs) -> dict[tuple[str, str, int], Record]:
    """Find the finished runs of a chain: key -> record; controls only if their method's run is finished."""
    found: dict[tuple[str, str, int], Record] = {}
    method = None
    for planned in chain:
        configuration = complete(planned, method)
        record = runs.find(configuration) if configuration is not None else None
        if record is not None:
            found[planned.key] = record
        if planned.arm.control is None:
            method = record
    return found


COPIES = "tasks"  # folder of the copies of tasks' files, beside that of the runs


def failure_of(job: str, doing: str, error: Exception) -> Failure:
    """Describe the error that ended a run; one that can be corrected says all in its own words."""
    first, _, more = str(error).partition("\n")
    details = more if isinstance(error, UsageError) else "".join(traceback.format_exception(error))
    return Failure(job, doing, f"{type(error).__name__}: {first}", details)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence warnings: that no layer was chosen is in the record and on the page, and a line would break the bars."""
    logger = logging.getLogger("layerwise")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of the layers: before the first run, whoever planned it has seen them
            warnings.filterwarnings("ignore", DOUBTS, UserWarning)
            yield
    finally:
        logger.setLevel(level)


def do_placed(chain: Chain, link: Any) -> None:
    """Do the runs of a chain on the device of this worker; see ``do_chain``."""
    device = device_of_worker(chain.device, link.number, card_count())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # else some memory is taken on the first GPU too
    do_chain(replace(chain, device=device), link)


@_errors_only()
def do_chain(chain: Chain, link: Any, processes: Processes | None = None) -> None:
    """Do the runs of a chain; send ``Advance`` now and then, ``Finished``, ``Skipped`` or a ``Failure`` for each.

    ``link`` is a ``pool.Link`` or its like; ``processes`` share each run, and this is the first of them.
    """
    torch.set_num_threads(chain.threads)
    processes = processes or Processes()
    runs, method = Runs(chain.out), None
    for planned in chain.runs:
        link.doing(planned.label)
        configuration = complete(planned, method)
        if configuration is None:
            link.send(Skipped(planned.key, "the run whose factors it repeats is not finished"))
            continue
        record = runs.find(configuration)
        if record is None:
            # The processes beside this one wait for it in torchrun.follow.
            processes.from_first(partial(tuple, (planned, configuration, chain)))
            try:
                record = do_run(planned, configuration, chain, link, method=method, processes=processes)
            except BusyError as error:
                link.send(Skipped(planned.key, str(error)))
                continue
            except StoppedError:
                return
            except Exception as error:
                if not processes.in_step:
                    raise
                link.send(failure_of(chain.name, planned.label, error))
                continue
        else:
            runs.tidy(record)
        # Also of a run that was found: which one it is was not known before its method's run was finished.
        link.send(Finished(planned.key, configuration))
        if planned.arm.control is None:
            method = record


def do_run(
    planned: PlannedRun,
    configuration: Configuration,
    chain: Chain,
    link: Any,
    *,
    method: Record | None = None,
    processes: Processes | None = None,
) -> Record:
    """Do one run from its last checkpoint, or from the beginning; a control repeats the finished run of a method.

    Raises BusyError where another process works on it, and StoppedError where it was stopped after a checkpoint.
    """
    folder = Runs(chain.out).folder(configuration)
    processes = processes or Processes()
    with ExitStack() as held, processes.step():
        finished = processes.from_first(lambda: _begin(planned, chain, folder, held))
        if finished is not None:
            return finished
        rule = processes.from_first(lambda: make_rule(configuration, folder, method))
        if isinstance(rule, rules.Replay):
            factors = processes.from_first((folder.path / FACTORS).read_bytes)
            if not processes.first:  # it may not see the run's folder
                own = Path(held.enter_context(TemporaryDirectory(prefix="layerwise-"))) / FACTORS
                own.write_bytes(factors)
                rule = replace(rule, file=own)
        made = make_trial(planned, configuration, chain, (processes.rank, processes.count))
        before = None if planned.task is not None else configuration.pretraining
        if before is not None:
            made.model.load_state_dict(processes.from_first(lambda: _weights(planned, before, chain, link)))
        training = Training(
            made,
            rule,
            configuration,
            folder=folder if processes.first else None,
            processes=processes,
            checkpoint_seconds=chain.checkpoint_seconds,
        )
        if processes.first:
            return _train(training, planned, folder, link, chain.device)
        # Beside the first process nothing is written or sent.
        training.run(link.stopped)
        return processes.from_first(lambda: _expected(folder))


def _begin(planned: PlannedRun, chain: Chain, folder: RunFolder, held: ExitStack) -> Record | None:
    """Take a run's folder; give its record if it is finished, else None."""
    held.enter_context(folder.lock())
    finished = folder.record()
    if finished is not None:
        folder.tidy(finished.summary)
        return finished
    folder.begin({**chain.labels, "subject": planned.subject, "arm": planned.arm.name, "arm_words": planned.arm.words})
    return None


def _weights(planned: PlannedRun, before: Configuration, chain: Chain, link: Any) -> dict[str, Any]:
    """Give the weights that a run begins from; while it trains them, its updates count without a total."""
    return pretraining.weights(
        before,
        chain.out,
        chain.data_dir,
        stop=link.stopped,
        progress=lambda done: link.send(Advance(planned.label, done, None)),
        checkpoint_seconds=chain.checkpoint_seconds,
    )


def _train(training: Training, planned: PlannedRun, folder: RunFolder, link: Any, device: str) -> Record:
    begin_memory(device)
    total, reports = training.trial.total, 0
    folder.say("running", training.position.iteration, total)

    def advance(done: int) -> None:
        nonlocal reports
        reports += 1
        link.send(Advance(planned.label, done, total))
        if reports == 2:  # the first one comes before any update of this process
            link.send(Memory(peak_memory(device), whole_memory(device)))

    try:
        summary = training.run(link.stopped, advance)
    except StoppedError:
        raise
    except BaseException as error:
        with suppress(OSError):  # a full disk may be the very reason
            folder.say("failed", training.position.iteration, total, reason=f"{type(error).__name__}: {error}")
        raise

    def finish() -> Record:
        threads = folder.configuration.threads
        folder.finish(training.recorder, {**summary, "threads": threads, "peak_memory": peak_memory(device)})
        return _expected(folder)

    return training.processes.from_first(finish)


def make_trial(
    planned: PlannedRun, configuration: Configuration, chain: Chain, share: tuple[int, int] = (0, 1)
) -> Trial:
    """Make what a run trains: a recipe's trial, or a user's own task."""
    if planned.task is not None:
        return planned.task.trial(configuration, chain.device, chain.out / COPIES)
    return trial.build(configuration, chain.data_dir, chain.device, loaders=chain.loaders, share=share)


def make_rule(configuration: Configuration, folder: RunFolder, method: Record | None) -> Any:
    """Make the rule of a run; recorded factors are written into its folder first."""
    specification = configuration.rule
    if specification is None or specification["name"] != "Replay":
        return rule_making.make_rule(specification, configuration.seed)
    path = folder.path / FACTORS
    if method is not None:
        folder.path.mkdir(parents=True, exist_ok=True)
        rules.save_factors(path, controls.recorded_factors(method, specification["layers"]))
    return rule_making.make_rule(specification, configuration.seed, replay=path)


def _expected(folder: RunFolder) -> Record:
    record = folder.record()
    if record is None:
        raise RuntimeError(f"{folder.path}: the record just written cannot be read; is the disk full or failing?")
    return record


class Alone:
    """The link of a run that is done in this process."""

    def __init__(
        self, stop: Callable[[], bool] = lambda: False, message: Callable[[Any], None] = lambda message: None
    ) -> None:
        self.stopped, self.send = stop, message

    def doing(self, name: str) -> None:
        """Do nothing: a crash here needs no name."""
