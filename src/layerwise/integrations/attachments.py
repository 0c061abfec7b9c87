"""What the callbacks have in common: adapters on the optimizers that a trainer makes, its epochs, logs and state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..adapter import Decay, LayerwiseLR
from ..layers import Exclusion, LayerSpecification
from ..optimizers import PlaceName
from ..rules.base import check_rule
from ..rules.selection import check_whole
from ..rules.state import is_state
from ..sinks.record import ROOT, distinct
from ..statistics import OnNonfinite

logger = logging.getLogger("layerwise")


class Attachments:
    """The adapters of one training, one for each optimizer, in the optimizers' order.

    A trainer loads checkpoints before or after it makes its optimizers. A state that is loaded while nothing is
    attached waits for the next `attach`.
    """

    def __init__(self, rule: Any, log_every: int | None, **arguments: Any) -> None:
        self.rule = check_rule(rule)
        if log_every is not None:
            check_whole("log_every", log_every, 1)
        self.adapters: list[LayerwiseLR] = []
        self._arguments, self._log_every = arguments, log_every
        self._attached = False
        self._first_epoch = self._step = 0
        self._waiting: Mapping[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the adapters out: a copy attaches its own when its training begins."""
        return {**self.__dict__, "adapters": [], "_attached": False}

    def attach(self, optimizers: Sequence[Any], model: nn.Module, *, epoch: int, step: int) -> bool:
        """Attach to each optimizer, and load the state that waits, or that of the previous adapters.

        The trainer has ended so many epochs and taken so many steps. After an error nothing is attached, and the state
        waits. Returns whether training goes on without the state that the rule keeps.
        """
        if not optimizers:
            raise ValueError(f"there is no optimizer to attach {self.rule!r} to: take the callback out of the trainer")
        state = self._waiting = self.state_dict()
        self.detach()
        self.adapters, self._first_epoch, self._step = [], epoch, step
        try:
            for optimizer in optimizers:
                self.adapters.append(LayerwiseLR(optimizer, self.rule, model, **self._arguments))
            self._attached = True
            if state:
                self.load_state_dict(state)
        except BaseException:
            self.detach()
            self.adapters = []
            raise
        self._waiting = {}
        self.end_epochs(epoch)
        return step > 0 and not state and self.keep_state

    def detach(self) -> None:
        """Take the hooks off; the adapters can still be read and saved."""
        for adapter in self.adapters:
            adapter.detach()
        self._attached = False

    def forget(self) -> None:
        """Detach, and drop all state."""
        self.detach()
        self.adapters, self._waiting = [], {}

    def end_epochs(self, epoch: int) -> None:
        """End epochs until the rules have ended as many as the trainer; may wait for the device.

        If a checkpoint falls on an epoch's end, trainers call their hooks once too often or not at all, so only the
        number counts.
        """
        while self.adapters and self.ended_epochs < epoch:
            for adapter in self.adapters:
                adapter.end_epoch()

    @property
    def ended_epochs(self) -> int:
        """How many epochs have ended, in the trainer's count."""
        return self._first_epoch + self.adapters[0].epoch - 1

    @property
    def keep_state(self) -> bool:
        """Whether the rule keeps a state from step to step or epoch to epoch."""
        return any(_holds_something(adapter.state_dict()["state"]) for adapter in self.adapters)

    def is_due(self, step: int) -> bool:
        """Return whether the trainer's steps have reached a multiple of `log_every` since the last call."""
        before, self._step = self._step, step
        return self._log_every is not None and step // self._log_every > before // self._log_every

    def read(self) -> dict[str, float]:
        """Return the last step's rates and factors, as `layerwise/lr/LAYER` and `layerwise/factor/LAYER`.

        The root module's layer is called `root`. A layer that two optimizers share appears under its name and under its
        name with `_2`. Waits for the device.
        """
        names = distinct(layer or ROOT for adapter in self.adapters for layer in adapter.layers)
        rates = [rate for adapter in self.adapters for rate in adapter.get_last_lr().values()]
        factors = [factor for adapter in self.adapters for factor in adapter.get_last_factors().values()]
        values: dict[str, float] = {}
        for name, rate, factor in zip(names, rates, factors, strict=True):
            values[f"layerwise/lr/{name}"], values[f"layerwise/factor/{name}"] = rate, factor
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the adapters' states, or the one that waits; empty if there is neither."""
        if self._waiting or not self.adapters:
            return dict(self._waiting)
        return {"first_epoch": self._first_epoch, "adapters": [adapter.state_dict() for adapter in self.adapters]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, at once if attached, else at the next `attach`."""
        if not self._attached:
            self._waiting = state_dict
            return
        saved, count = state_dict["adapters"], len(self.adapters)
        if len(saved) != count:
            raise ValueError(f"the state was saved for {len(saved)} optimizers, this training has {count}")
        for adapter, one in zip(self.adapters, saved, strict=True):
            adapter.load_state_dict(one)
        self._first_epoch = state_dict["first_epoch"]

    def warn_of_new_beginning(self, step: int) -> None:
        """Log that training goes on without the rule's state."""
        logger.warning(
            f"training goes on from step {step}, and the checkpoint holds no state of {self.rule!r}: "
            "its epochs begin at 1"
        )


class Attaching:
    """The arguments of every callback; a framework's class of callbacks comes after it among the base classes."""

    def __init__(
        self,
        rule: Any,
        *,
        layers: LayerSpecification | Literal["auto"] = "auto",
        apply: PlaceName | Literal["auto"] = "auto",
        decay: Decay = "auto",
        exclude: Exclusion | Literal["auto"] = "auto",
        bounds: tuple[float, float] | None = None,
        on_nonfinite: OnNonfinite = "ignore",
        log_every: int | None = 50,
    ) -> None:
        super().__init__()
        arguments = {"layers": layers, "apply": apply, "decay": decay, "exclude": exclude, "bounds": bounds}
        self._attachments = Attachments(rule, log_every, on_nonfinite=on_nonfinite, **arguments)


def _holds_something(state: Any) -> bool:
    return any(map(_holds_something, state.values())) if is_state(state) else True
