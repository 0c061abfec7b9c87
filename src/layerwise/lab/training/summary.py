"""What is kept of a finished run beside its numbers."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch

import layerwise

if TYPE_CHECKING:
    from layerwise.lab.training.engine import Training


def summary_of(training: Training, weights: str) -> dict[str, Any]:
    """Make the record of a finished run.

    Args:
        training: at its end.
        weights: digest of its weights.

    Returns:
        The summary of ``runs.Record``.
    """
    factors = training.recorder.layer_means("factor")
    # What a rule leaves out, as LARS does biases, has factor 1 and no part in its mean.
    table = [] if training.adapter is None else training.adapter.layer_table()
    excluded = [layer.name for layer in table if not layer.included]
    adapted = [value for name, value in factors.items() if name not in excluded]
    lasts = {quantity: training.recorder.last(quantity) for quantity in training.recorder.whole_quantities()}
    return {
        "finals": {name: number_of(last[1]) for name, last in lasts.items() if last is not None},
        "diverged_at": training.diverged_at,
        "iterations": training.position.iteration,
        "epochs": training.position.epoch - (training.position.batch != training.trial.epoch_length),
        "parameters": sum(p.numel() for p in training.trial.model.parameters()),
        "layers": training.measures.names,
        "seconds": training.seconds,
        "test_seconds": training.test_seconds,
        "sessions": training.sessions,
        "processes": training.counts,
        "factor": {
            "mean": math.fsum(adapted) / len(adapted) if adapted else 1.0,
            "spread": training.recorder.spread("factor") or 1.0,
            "layers": factors,
            "names": [layer.name for layer in table],
            "excluded": excluded,
        },
        "place": None if training.adapter is None else training.adapter.apply,
        "decay": None if training.adapter is None else training.adapter.decay,
        "selections": training.selections,
        "weights": weights,
    }


def selection_of(adapter: layerwise.LayerwiseLR) -> dict[str, list[Any]] | None:
    """Give what a rule that amplifies chosen layers has chosen: layer -> value, z, chosen; None for other rules."""
    if not isinstance(adapter.rule, layerwise.rules.GradientAmplification):
        return None
    rows = adapter.get_last_selection()
    return {name: [number_of(row.value), number_of(row.z), bool(row.selected)] for name, row in rows.items()}


def number_of(value: float) -> float | None:
    """Write what was not measured as None, as JSON has no NaN."""
    return value if math.isfinite(value) else None


def digest_of(tensors: Any) -> str:
    """Give the SHA-256 of tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
