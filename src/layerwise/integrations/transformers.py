"""A callback for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter import LayerwiseLR
from .attachments import Attaching

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "layerwise.integrations.transformers needs Transformers, which is not installed: "
        "pip install -e '.[transformers]' in the clone",
        name="transformers",
    ) from None

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

STATE_FILE = "layerwise.pt"
"""Where the rule's state is kept in the folder of a checkpoint."""


class LayerwiseCallback(Attaching, TrainerCallback):
    """Attaches a rule to the optimizer of a Hugging Face Trainer.

    It attaches when training begins, ends the rule's epochs with the Trainer's, adds to its logs, keeps the rule's
    state as `layerwise.pt` in the folder of each checkpoint, and detaches when training has ended. The gradients are
    those that the optimizer gets: accumulated and clipped.

    Resuming: callbacks do not get the folder that the Trainer resumes from. This one looks for it in
    `TrainingArguments.resume_from_checkpoint`, else in `output_dir`. To resume from elsewhere, set that argument too.
    Otherwise a rule that keeps a state raises an error.

    Every `log_every` steps `layerwise/lr/LAYER` and `layerwise/factor/LAYER` join the Trainer's next log and its
    `state.log_history`. Their values are read from the device. Callbacks before this one, such as TensorBoard's, get
    the log without them. To change that, put this one in front with
    `trainer.callback_handler.callbacks.insert(0, callback)`.

    Args:
        rule: Computes the factors; one of `layerwise.rules`, or a `Rule` of your own.
        layers: As for `layerwise.LayerwiseLR`, as are the next five.
        apply: Where the factor acts.
        decay: Whether the factor multiplies coupled weight decay too.
        exclude: Layers left at factor 1.
        bounds: Clamp of the factors.
        on_nonfinite: What a non-finite gradient does.
        log_every: Optimizer steps from one log to the next; None for none. Not more often than the Trainer logs.

    Raises:
        TypeError: `rule` is no rule. Other arguments are checked when training begins.
        ValueError: `log_every` is out of its range.

    Example:
        >>> from layerwise.rules import LayerAdaptive
        >>> callback = LayerwiseCallback(LayerAdaptive(), exclude=["*.embeddings.*"], log_every=None)
        >>> callback.adapter is None  # until training begins
        True
    """

    _epoch = 0

    @property
    def adapter(self) -> LayerwiseLR | None:
        """The adapter, which can be read after training too; None before."""
        return next(iter(self._attachments.adapters), None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach; the optimizer is there by now, and its checkpoint loaded."""
        attachments, step, epoch = self._attachments, state.global_step, int(state.epoch or 0)
        attachments.forget()  # a Trainer that trains again begins anew
        folder = _resumed_folder(args, state) if step > 0 else None
        if folder is not None and (folder / STATE_FILE).is_file():
            attachments.load_state_dict(torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True))
        if attachments.attach([kwargs["optimizer"]], kwargs["model"], epoch=epoch, step=step):
            if folder is None:
                attachments.forget()
                raise ValueError(
                    f"training goes on from step {step}, and not from a checkpoint in output_dir={args.output_dir!r}, "
                    f"so the state of {attachments.rule!r} is not found: give the folder that train() resumes from as "
                    "TrainingArguments(resume_from_checkpoint=…) too"
                )
            attachments.warn_of_new_beginning(step)
        self._epoch = epoch

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the rule's epoch, unless `max_steps` has cut it short: a resumed training goes on in it."""
        if control.should_training_stop and not float(state.epoch or 0).is_integer():
            return
        self._epoch += 1
        self._attachments.end_epochs(self._epoch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the rule's state beside the optimizer's."""
        folder = _folder(args, state)
        if not args.should_save or args.save_only_model or not folder.is_dir():
            return
        unfinished = folder / f"{STATE_FILE}.tmp"
        torch.save(self._attachments.state_dict(), unfinished)
        os.replace(unfinished, folder / STATE_FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add rates and factors to the log of a training step, every `log_every` steps."""
        if logs is None or "loss" not in logs or not self._attachments.is_due(state.global_step):
            return
        if state.is_world_process_zero:
            values = self._attachments.read()
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Detach."""
        self._attachments.detach()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _resumed_folder(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Return the folder of the checkpoint that the Trainer has resumed from: the one whose log is the Trainer's."""
    folders = [_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    log = json.dumps(state.log_history)
    for folder in folders:
        file = folder / "trainer_state.json"
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["global_step"] == state.global_step and json.dumps(saved["log_history"]) == log:
                return folder
    return None
