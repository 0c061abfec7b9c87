"""What a worker does: the runs of a chain one after another, each from its last checkpoint to its record."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layerwise import rules
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import controls
from layerwise.lab.experiments import rules as rule_making
from layerwise.lab.experiments.chain import Advance, Chain, Finished, Memory, Skipped, complete
from layerwise.lab.experiments.plan import PlannedRun
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import FACTORS, RunFolder, Runs
from layerwise.lab.runs.locks import BusyError
from layerwise.lab.runs.records import Record
from layerwise.lab.runs.store import LARGEST_TABLE, read_bytes
from layerwise.lab.training import trial
from layerwise.lab.training.devices import begin_memory, card_count, device_of_worker, peak_memory, whole_memory
from layerwise.lab.training.engine import Training
from layerwise.lab.training.processes import Processes
from layerwise.lab.training.trial import StoppedError, Trial
from layerwise.layers import DOUBTS

COPIES = "tasks"
"""Folder of the copies of tasks' files, beside that of the runs."""


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
def do_chain(
    chain: Chain, link: Any, do: Callable[..., Record] | None = None, survives: Callable[[], bool] = lambda: True
) -> None:
    """Do the runs of a chain; send ``Advance`` now and then, ``Finished``, ``Skipped`` or a ``Failure`` for each.

    Args:
        chain: what to do.
        link: where messages go and a stop comes from, as ``pool.Link``.
        do: what does one run; None for ``do_run``.
        survives: asked after an error whether the next run can be tried; the error is raised if not.
    """
    torch.set_num_threads(chain.threads)
    runs, method = Runs(chain.out), None
    for planned in chain.runs:
        link.doing(planned.label)
        configuration = complete(planned, method)
        if configuration is None:
            link.send(Skipped(planned.key, "the run whose factors it repeats is not finished"))
            continue
        record = runs.find(configuration)
        if record is None:
            try:
                record = (do or do_run)(planned, configuration, chain, link, method=method)
            except BusyError as error:
                link.send(Skipped(planned.key, str(error)))
                continue
            except StoppedError:
                return
            except Exception as error:
                if not survives():
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
    """Do one run from its last checkpoint, or from the beginning.

    Args:
        planned: the run.
        configuration: its whole configuration.
        chain: that it belongs to.
        link: where messages go and a stop comes from.
        method: the finished run that a control repeats.
        processes: of a run that several share.

    Returns:
        Its record.

    Raises:
        BusyError: another process works on it.
        StoppedError: it was told to stop; a checkpoint holds what is done.
    """
    folder = Runs(chain.out).folder(configuration)
    processes = processes or Processes()
    with ExitStack() as held:
        finished = processes.from_first(lambda: _begin(planned, chain, folder, held))
        if finished is not None:
            return finished
        rule = _shared_rule(configuration, folder, method, processes, held)
        training = Training(
            processes.together(lambda: make_trial(planned, configuration, chain, (processes.rank, processes.count))),
            rule,
            configuration,
            folder=folder if processes.first else None,
            processes=processes,
            checkpoint_seconds=chain.checkpoint_seconds,
        )
        return _train(training, planned, folder, link, chain.device, processes)


def _begin(planned: PlannedRun, chain: Chain, folder: RunFolder, held: ExitStack) -> Record | None:
    """Take a run's folder; give its record if it is finished, else None."""
    held.enter_context(folder.lock())
    finished = folder.record()
    if finished is not None:
        folder.tidy(finished.summary)
        return finished
    folder.begin({**chain.labels, "subject": planned.subject, "arm": planned.arm.name, "arm_words": planned.arm.words})
    return None


def _shared_rule(
    configuration: Configuration, folder: RunFolder, method: Record | None, processes: Processes, held: ExitStack
) -> Any:
    """Make the rule in every process; recorded factors are sent to those that may not see the run's folder."""
    if processes.count == 1:
        return make_rule(configuration, folder, method)

    def written() -> bytes | None:
        make_rule(configuration, folder, method)
        path = folder.path / FACTORS
        return read_bytes(path, LARGEST_TABLE) if path.exists() else None

    factors = processes.from_first(written)
    private = RunFolder(Path(held.enter_context(TemporaryDirectory(prefix="layerwise-"))), configuration)
    if factors is not None:
        (private.path / FACTORS).write_bytes(factors)
    return make_rule(configuration, private, None)


def _train(
    training: Training,
    planned: PlannedRun,
    folder: RunFolder,
    link: Any,
    device: str,
    processes: Processes,
) -> Record:
    """Train a run to its record; in the processes beside the first one nothing is written or sent."""
    if not processes.first:
        training.run(link.stopped)
        return processes.from_first(lambda: _expected(folder))
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
        about = {"threads": folder.configuration.threads, "peak_memory": peak_memory(device)}
        folder.finish(training.recorder, {**summary, **about})
        return _expected(folder)

    return processes.from_first(finish)


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
        """Nobody needs to be told."""
