"""Compares the gradients of processes whose optimizer averages them in its own step."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..sharding import LONGEST, Table, compared
from .toys import parameters_of

CLOSE = 1e-6
"""The largest relative difference of norms that count as equal."""


def compare_gradients(optimizer: Any, process_group: Any) -> None:
    """Raise on all processes if equal weights have different gradients, before the first step.

    Args:
        optimizer: An optimizer that communicates in its step.
        process_group: The process group that it uses; None for the default one.

    Raises:
        RuntimeError: The gradients differ, or not all processes have come here; nothing has changed.
    """
    name, parameters = type(optimizer).__name__, parameters_of(optimizer)
    plain = [p for p in parameters if not hasattr(p, "device_mesh")]
    own = {"norms": [[n for tensor in (p, p.grad) for n in (-_norm(tensor), _norm(tensor))] for p in plain]}
    ranks = torch.distributed.get_process_group_ranks(process_group)
    table = compared(f"gradients of {name}", own, _largest, ranks, LONGEST)
    if table is None:
        raise RuntimeError(
            f"{name} communicates in its step, and not all of the processes {ranks} reached their first step "
            f"with a LayerwiseLR within {LONGEST:g} s: create it in every process. Nothing has changed"
        )
    for smallest, largest, smallest_gradient, largest_gradient in table["norms"]:
        if _equal(-smallest, largest) and not _equal(-smallest_gradient, largest_gradient):
            raise RuntimeError(
                f"the processes hold equal weights and different gradients, which {name} averages in its "
                "step. The factors are computed before that, so they would differ, and the weights would drift "
                "apart. Nothing has changed. Average the gradients before step() (DistributedDataParallel "
                "does), or use a rule whose factors do not depend on gradients"
            )


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(cast(Any, tensor.detach().double().norm().item()))


def _largest(before: Table, own: Table) -> Table:
    """Return the largest of each number; none where the processes hold different parameters."""
    if len(before["norms"]) != len(own["norms"]):
        return {"norms": []}
    of_both = [torch.tensor(table["norms"], dtype=torch.float64, device="cpu") for table in (before, own)]
    return {"norms": torch.maximum(*of_both).tolist()}  # NaN if either is


def _equal(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=CLOSE)
