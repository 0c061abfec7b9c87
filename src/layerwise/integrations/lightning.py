"""A callback for Lightning's Trainer; Fabric needs none."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..adapter import LayerwiseLR
from .attachments import Attaching

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def _callback_class() -> Any:
    """Return Lightning's class, from whichever of its two packages is installed; an imported one comes first."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    for package in sorted(packages, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ModuleNotFoundError as error:
            if error.name != package.partition(".")[0]:
                raise
    raise ModuleNotFoundError(
        "layerwise.integrations.lightning needs Lightning, which is not installed: "
        "pip install -e '.[lightning]' in the clone",
        name="lightning",
    )


if not TYPE_CHECKING:
    Callback = _callback_class()


class LayerwiseCallback(Attaching, Callback):
    """Attaches a rule to every optimizer of a Lightning Trainer.

    It attaches when training begins, ends the rule's epochs with the Trainer's, logs, keeps the rule's state in the
    Trainer's checkpoints, and detaches when `fit` is over, also by an exception. Automatic and manual optimization,
    accumulation, clipping, mixed precision and schedulers work as without it. The gradients are those that the
    optimizer gets: accumulated, unscaled, clipped.

    Every `log_every` steps the Trainer's loggers get `layerwise/lr/LAYER` and `layerwise/factor/LAYER`. Their
    values are read from the device.

    All optimizers get the same rule and arguments. For different ones, attach a `LayerwiseLR` to each in
    `configure_optimizers`, and save its state in `on_save_checkpoint`. Give one callback to a Trainer; several rules
    are a `layerwise.rules.chain`.

    Args:
        rule: Computes the factors; one of `layerwise.rules`, or a `Rule` of your own.
        layers: As for `layerwise.LayerwiseLR`, as are the next five.
        apply: Where the factor acts.
        decay: Whether the factor multiplies coupled weight decay too.
        exclude: Layers left at factor 1.
        bounds: Clamp of the factors.
        on_nonfinite: What a non-finite gradient does.
        log_every: Optimizer steps from one log to the next; None for none.

    Raises:
        TypeError: `rule` is no rule. Other arguments are checked when training begins.
        ValueError: `log_every` is out of its range.

    Example:
        >>> from layerwise.rules import LayerAdaptive
        >>> callback = LayerwiseCallback(LayerAdaptive(), bounds=(0.5, 5), log_every=10)
        >>> callback.adapters  # one for each optimizer, once training has begun
        []
    """

    _trainer: weakref.ref[Trainer] | None = None
    _stage = "fit"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out: a copy has none yet."""
        return {**self.__dict__, "_trainer": None}

    @property
    def adapters(self) -> list[LayerwiseLR]:
        """The adapters, one for each optimizer of the Trainer; they can be read after training too."""
        return list(self._attachments.adapters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the training of another Trainer; one that fits again goes on."""
        self._stage = stage
        if stage == "fit":
            if self._trainer is not None and self._trainer() is not trainer:
                self._attachments.forget()
            self._trainer = weakref.ref(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; the optimizers are set up by now, and checkpoints loaded."""
        epoch, step = trainer.current_epoch, trainer.global_step
        if self._attachments.attach(trainer.optimizers, pl_module, epoch=epoch, step=step):
            self._attachments.warn_of_new_beginning(step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, every `log_every` steps."""
        if self._attachments.is_due(trainer.global_step) and trainer.loggers and trainer.is_global_zero:
            values = self._attachments.read()
            # The step that LightningModule.log writes, so that the curves share an axis.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the rules' epoch, unless `max_steps` has cut it short: a resumed training goes on in it."""
        if trainer.is_last_batch:
            self._attachments.end_epochs(trainer.current_epoch + 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach."""
        self._stage = "fit"
        self._attachments.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; `teardown` is not called then."""
        self.teardown(trainer, pl_module, self._stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the adapters' states, which Lightning saves."""
        return self._attachments.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the adapters' states, at once or when training begins.

        Lightning also calls this when it validates or tests a checkpoint; the states are ignored then.
        """
        if self._stage == "fit":
            self._attachments.load_state_dict(state_dict)
