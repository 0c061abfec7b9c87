"""Training one run from its first update, or from its last checkpoint, to its record."""

from __future__ import annotations

import hashlib
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import torch

import layerwise
from layerwise.lab.errors import UsageError
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import RunFolder
from layerwise.lab.runs.record import Recorder
from layerwise.lab.training.distributed import Processes
from layerwise.lab.training.measures import LayerMeasures
from layerwise.lab.training.trial import StoppedError, Trial
from layerwise.rules.roles import roles_of
from layerwise.rules.shapes import shape_of

CHECKPOINT_SECONDS = 60.0
"""Seconds between two checkpoints: what a killed run loses at most, and the time of one update or test."""

LOSSES_EVERY = 10
"""Updates between two looks at the losses, which wait for the device; a loss that is not finite is found then."""

KEPT = ("tested_at", "diverged_at", "losses", "metric", "selections", "seconds", "test_seconds", "sessions", "counts")
"""Plain values of a training that a checkpoint holds."""


class _DivergedError(Exception):
    """A loss or a test is not finite; ``Training.diverged_at`` says since when."""


@dataclass
class Position:
    """How far a run is."""

    iteration: int = 0  # updates done
    epoch: int = 1  # the current one
    batch: int = 0  # batches of it that are done


class Training:
    """One run at work; without a rule there is no adapter, without a folder there are no checkpoints."""

    def __init__(
        self,
        trial: Trial,
        rule: Any,
        configuration: Configuration,
        *,
        folder: RunFolder | None = None,
        processes: Processes | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.trial, self.folder, self.checkpoint_seconds = trial, folder, checkpoint_seconds
        self.processes = processes or Processes()
        self.adapter = None
        if rule is not None:
            places: Any = {"apply": configuration.apply, "decay": configuration.decay}
            # A control gives its factors to the layers that its method had, parameters for LARS.
            places["layers"] = (configuration.rule or {}).get("layers_by", "auto")
            self.adapter = layerwise.LayerwiseLR(trial.optimizer, rule, trial.model, **places)
        self.measures = LayerMeasures(trial.optimizer, trial.model)
        self.network = self.processes.wrap(trial.model)
        self.recorder = Recorder()
        self.position = Position()
        self.selections: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.tested_at = -1
        self.seconds = self.test_seconds = 0.0
        self.sessions, self.counts = 1, [self.processes.count]
        self.losses: list[float] = []  # those that are here and not yet looked at
        self.metric = [0.0, 0]  # of the epoch so far: the sum of the training metric over the examples, their number
        self._pending: list[torch.Tensor] = []
        self._metrics: list[tuple[torch.Tensor, int]] = []
        self._stop: Callable[[], bool] = lambda: False
        torch.manual_seed(configuration.seed + self.processes.rank)  # dropout of another part of the batch
        random.seed(configuration.seed)

    def run(
        self, stop: Callable[[], bool] = lambda: False, progress: Callable[[int], None] = lambda iteration: None
    ) -> dict[str, Any]:
        """Train to the end and give the summary of ``runs.Record``; stopped, write a checkpoint and raise StoppedError.

        ``stop`` is asked once an update; ``progress`` is called with the number of updates done, now and then.
        """
        self._stop = stop
        self._resume()
        self._clock = self._saved = time.perf_counter()
        progress(self.position.iteration)
        if self.trial.flush_denormal:
            torch.set_flush_denormal(True)
        try:
            with suppress(_DivergedError):
                self._train(progress)
        except StoppedError:
            self._save("stopped")
            raise
        finally:
            if self.trial.flush_denormal:
                torch.set_flush_denormal(False)
        self._tick()
        return self._summary()

    def _summary(self) -> dict[str, Any]:
        factors = self.recorder.layer_means("factor")
        # What a rule leaves out, as LARS does biases, has factor 1 and no part in its mean.
        table = [] if self.adapter is None else self.adapter.layer_table()
        excluded = [layer.name for layer in table if not layer.included]
        adapted = [value for name, value in factors.items() if name not in excluded]
        return {
            "finals": {name: _number_of(value) for name, value in self.recorder.finals().items()},
            "diverged_at": self.diverged_at,
            "iterations": self.position.iteration,
            "epochs": self.position.epoch - (self.position.batch != self.trial.epoch_length),
            "parameters": sum(p.numel() for p in self.trial.model.parameters()),
            "layers": self.measures.names,
            "seconds": self.seconds,
            "test_seconds": self.test_seconds,
            "sessions": self.sessions,
            "processes": self.counts,
            "factor": {
                "mean": math.fsum(adapted) / len(adapted) if adapted else 1.0,
                "spread": self.recorder.spread("factor") or 1.0,
                "layers": factors,
                "names": [layer.name for layer in table],
                "excluded": excluded,
                "roles": roles_of(table),
                "shapes": list(map(shape_of, table)),
                "sizes": [sum(p.numel() for p in layer.parameters) for layer in table],
            },
            "place": None if self.adapter is None else self.adapter.apply,
            "decay": None if self.adapter is None else self.adapter.decay,
            "selections": self.selections,
            "weights": self._weights(),
        }

    def _train(self, progress: Callable[[int], None]) -> None:
        trial, position = self.trial, self.position
        self._test_if_due()
        (stopping,) = self.processes.agree(self._stop())
        if stopping:
            raise StoppedError
        while not self._ended():
            for batch in trial.batches(position.epoch, position.batch):
                self._update(batch)
                if position.iteration % LOSSES_EVERY == 0:
                    progress(position.iteration)
                    self._read_losses()
                if trial.test_every is not None:
                    self._test_if_due()
                if self._ended():
                    break
                overdue = time.perf_counter() - self._saved > self.checkpoint_seconds
                stopping, overdue = self.processes.agree(self._stop(), overdue)
                if stopping:  # before the next batch is drawn, which may change the random state
                    raise StoppedError
                if overdue:
                    self._save("running")
            else:
                self._end_epoch()
                self._test_if_due()
        self._read_losses()

    def _ended(self) -> bool:
        if self.trial.iterations is not None:
            return self.position.iteration >= self.trial.iterations
        return self.position.epoch > (self.trial.epochs or 0)

    def _update(self, batch: Any) -> None:
        trial, position = self.trial, self.position
        optimizer = trial.optimizer
        step = position.iteration + 1
        measured = step % trial.layers_every == 0 or step == 1
        optimizer.zero_grad()
        batch, whole = trial.prepare(batch), trial.whole(position.batch)
        loss = trial.loss(self.network, self.processes.share(batch, begins=position.batch == 0, whole=whole))
        if trial.training_metric:
            loss, metric = loss
            self._metrics.append((metric.detach(), whole or len(batch[1])))
        loss.backward()
        if measured:
            self.measures.before()
        optimizer.step()
        self._pending.append(loss.detach())
        if measured or step % trial.factors_every == 0:
            self._record_layers(step, measured)
        if trial.scheduler is not None and trial.schedule_unit == "iteration":
            trial.scheduler.step()
        position.iteration, position.batch = step, position.batch + 1

    def _record_layers(self, step: int, measured: bool) -> None:
        epoch = self.position.epoch
        if self.adapter is not None:
            self.recorder.add_layers("factor", step, epoch, self.adapter.get_last_factors())
        if not measured:
            return
        rates = self.measures.rates() if self.adapter is None else self.adapter.get_last_lr()
        self.recorder.add_layers("rate", step, epoch, rates)
        for quantity, values in self.measures.after().items():
            self.recorder.add_layers(quantity, step, epoch, values)

    def fetch_losses(self) -> None:
        """Bring the losses since the last time from the device."""
        if self._pending:
            self.losses += self.processes.mean(torch.stack(self._pending).double()).tolist()
            self._pending.clear()
        if self._metrics:
            values = self.processes.mean(torch.stack([value for value, _ in self._metrics]).double()).tolist()
            for value, (_, size) in zip(values, self._metrics, strict=True):
                self.metric = [self.metric[0] + value * size, self.metric[1] + size]
            self._metrics.clear()

    def _read_losses(self) -> None:
        """Bring the losses since the last time to the recorder, up to the first one that is not finite."""
        self.fetch_losses()
        values, self.losses = self.losses, []
        first = self.position.iteration - len(values) + 1
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                self.diverged_at = step - 1
                raise _DivergedError
            self.recorder.add("training_loss", step, self.position.epoch, value)

    def _end_epoch(self) -> None:
        """Count an epoch: the adapter's, the policy's and ours."""
        trial, position = self.trial, self.position
        self._read_losses()
        if position.batch == 0:
            raise ValueError(f"epoch {position.epoch} has no batch: batches must give at least one")
        if trial.training_metric:
            self.recorder.add(
                trial.training_metric, position.iteration, position.epoch, self.metric[0] / self.metric[1]
            )
            self.metric = [0.0, 0]
        if trial.scheduler is not None and trial.schedule_unit == "epoch":
            with warnings.catch_warnings():
                # The optimizer has stepped, though after a checkpoint at the end of the epoch not in this process.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                trial.scheduler.step()
        if self.adapter is not None:
            before = _selection_of(self.adapter)
            self.adapter.end_epoch()
            after = _selection_of(self.adapter)
            if after is not None and after != before:
                self.selections.append({"epoch": position.epoch, "layers": after})
        position.epoch, position.batch = position.epoch + 1, 0

    def _test_if_due(self) -> None:
        """Test the network where the plan asks for it and it is not done yet."""
        trial, position = self.trial, self.position
        if trial.test_every is not None:
            due = position.iteration % trial.test_every == 0 or self._ended()
        else:
            due = position.batch == 0 and position.epoch > 1
        if not due or self.tested_at == position.iteration:
            return
        self._read_losses()
        began = time.perf_counter()
        epoch = position.epoch - (position.batch == 0 and position.iteration > 0)
        # All processes hear of it, so that none trains on alone after a divergence.
        values = self.processes.from_first(lambda: trial.evaluate(trial.model, self._stop))
        self.tested_at = position.iteration
        self.test_seconds += time.perf_counter() - began
        for quantity, value in values.items():
            if not math.isfinite(value):
                self.diverged_at = position.iteration
                raise _DivergedError
            self.recorder.add(quantity, position.iteration, epoch if position.iteration else 0, float(value))

    def _tick(self) -> None:
        """Count the time since the last look at the clock."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def _parts(self) -> dict[str, Any]:
        """Give what has a state of its own, by name."""
        parts = {"model": self.trial.model, "optimizer": self.trial.optimizer, "scheduler": self.trial.scheduler}
        parts |= {"adapter": self.adapter, "recorder": self.recorder}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Give everything that the rest of the training depends on; of several processes all must ask."""
        # Only fetched: were they looked at, after which update a divergence ends the run would depend on checkpoints.
        self.fetch_losses()
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            **{name: getattr(self, name) for name in KEPT},
            "position": list(astuple(self.position)),
            "random": self.processes.gather(random_state()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, newly made, from what ``state_dict`` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name in KEPT:
            setattr(self, name, state[name])
        self.position = Position(*state["position"])
        self.sessions += 1
        self.counts = list(dict.fromkeys([*self.counts, self.processes.count]))
        rank = self.processes.rank
        if rank < len(state["random"]):  # more processes than before begin with numbers of their own
            set_random_state(state["random"][rank])

    def _resume(self) -> None:
        # Read by one alone: it may be the only one that sees the folder, and writes the next checkpoint into it.
        state = self.processes.from_first(lambda: self.folder.load_checkpoint() if self.folder is not None else None)
        if state is None:
            return
        place = self.folder.path if self.folder is not None else "the run's folder"
        try:
            self.load_state_dict(state)
        except KeyError as error:
            raise UsageError(
                f"{place}: the checkpoint is of an earlier version of layerwise (it has no {error}); remove the "
                "folder, and the run begins anew"
            ) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UsageError(
                f"{place}: the checkpoint is not of this run ({reason}); remove the folder, and the run begins anew"
            ) from error

    def _save(self, status: str) -> None:
        """Write a checkpoint; the processes beside the first one only give their part."""
        self._tick()
        state = self.state_dict()
        if self.processes.count > 1:
            self._weights()  # reports a difference before it is written, not at the end of a long run
        if self.folder is not None and self.processes.first:
            self.folder.save_checkpoint(state)
            self.folder.say(status, self.position.iteration, self.trial.total, seconds=round(self.seconds, 1))
        self._saved = time.perf_counter()

    def _weights(self) -> str:
        """Give the SHA-256 of the weights, which all processes must share."""
        digest = hashlib.sha256()
        for tensor in self.trial.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digests = self.processes.gather(digest.hexdigest())
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"after {self.position.iteration} updates the weights of {len(digests)} processes differ: use machines "
                "of one kind, and a loss that calls the network itself; delete the run's folder and start again"
            )
        return digests[0]


def skipping(batches: Callable[[int], Any]) -> Callable[[int, int], Any]:
    """Make batches that can begin anywhere out of ones that begin at the first: those before are made and dropped."""
    return lambda epoch, skip: islice(iter(batches(epoch)), skip, None)


def _selection_of(adapter: layerwise.LayerwiseLR) -> dict[str, list[Any]] | None:
    """Give what a rule that amplifies chosen layers has chosen: layer -> value, z, chosen; None for other rules."""
    if not isinstance(adapter.rule, layerwise.rules.GradientAmplification):
        return None
    rows = adapter.get_last_selection()
    return {name: [_number_of(row.value), _number_of(row.z), bool(row.selected)] for name, row in rows.items()}


def _number_of(value: float) -> float | None:
    """Write what was not measured as None, as JSON has no NaN."""
    return value if math.isfinite(value) else None


def random_state() -> dict[str, Any]:
    """Give the state of torch, Python and NumPy, in plain values and tensors."""
    import numpy

    state_of_numpy: Any = numpy.random.get_state()  # typed as either of two forms
    name, keys, *rest = state_of_numpy
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
        state["gpu"] = torch.cuda.current_device()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take over what ``random_state`` gave."""
    import numpy

    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        torch.cuda.set_rng_state(state["cuda"][state["gpu"]])  # a run may go on on another GPU
