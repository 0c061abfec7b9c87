"""Checks in an optimizer's first real step what its trial on toy parameters could not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._tensors import several_processes
from ..sharding import LONGEST, Table, can_compare, compared
from .toys import parameters_of
from .trial import Verdict, holds_copies, in_own_groups

CLOSE = 1e-6
"""The largest relative difference of norms that count as equal."""


class FirstSteps:
    """Raises in the first step if factors would act wrongly; weights and state are restored.

    The cost falls on the first step only. If the optimizer's own step communicates and the rule reads gradients, the
    processes compare their norms. If the optimizer could not be tried and has no state yet, the parameters are copied.

    Args:
        name: The name of the optimizer's class.
        verdict: The result of its trial.
        reads_gradients: Whether the rule's factors depend on gradients.
        under_update: Whether `apply="update"` is in use.
    """

    def __init__(self, name: str, verdict: Verdict, *, reads_gradients: bool, under_update: bool) -> None:
        self._name, self._verdict = name, verdict
        # The others wait for it, so a process in which the rule is paused compares too.
        self.compares = verdict.communicates and reads_gradients and several_processes() and can_compare()
        self._looks_for_copies = verdict.untried is not None and under_update
        self._before: list[tuple[Tensor, Tensor]] | None = None
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def before(self, optimizer: Any) -> None:
        """Check before the step."""
        self._before = None
        parameters = parameters_of(optimizer)
        if self.compares:
            self.compares = False
            self._compare_gradients(parameters)
        if not self._looks_for_copies:
            return
        if optimizer.state:
            self._looks_for_copies = False
            self._check_copies(optimizer, parameters)
        else:
            self._before = [(p, p.detach().clone()) for p in parameters]
            self._groups = [(group, dict(group)) for group in optimizer.param_groups]

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """Check the state that the first step has created; if it is refused, undo the step."""
        before, self._before = self._before, None
        if before is None:
            return
        self._looks_for_copies = False
        try:
            self._check_copies(optimizer, [tensor for pair in before for tensor in pair])
        except RuntimeError:
            for p, old in before:
                p.copy_(old)
            for group, options in self._groups:
                group.clear()
                group.update(options)
            optimizer.state.clear()
            raise

    def _check_copies(self, optimizer: Any, weights: Sequence[Tensor]) -> None:
        if holds_copies(optimizer, weights):
            raise RuntimeError(
                f"apply='update' does not work with {self._name}: its state holds copies of the weights, from which it "
                "may compute the next weights, which would undo a scaled step. It cannot be tried on toy parameters "
                f"({self._verdict.untried}). Weights and state are as before this step. For factors that never "
                f"change, use permanent groups: {in_own_groups(optimizer)}"
            )

    def _compare_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Raise on all processes if equal weights have different gradients, which the step averages itself."""
        plain = [p for p in parameters if not hasattr(p, "device_mesh")]
        own = {"norms": [[n for tensor in (p, p.grad) for n in (-_norm(tensor), _norm(tensor))] for p in plain]}
        ranks = torch.distributed.get_process_group_ranks(self._verdict.process_group)
        table = compared(f"gradients of {self._name}", own, _largest, ranks, LONGEST)
        if table is None:
            raise RuntimeError(
                f"{self._name} communicates in its step, and not all of the processes {ranks} reached their first step "
                f"with a LayerwiseLR within {LONGEST:g} s: create it in every process. Nothing has changed"
            )
        for smallest, largest, smallest_gradient, largest_gradient in table["norms"]:
            if _equal(-smallest, largest) and not _equal(-smallest_gradient, largest_gradient):
                raise RuntimeError(
                    f"the processes hold equal weights and different gradients, which {self._name} averages in its "
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


class KnownGroups:
    """All parameters, with their latest options, of an optimizer that replaces its groups in its step.

    Args:
        groups: The optimizer's groups.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.param_groups: list[dict[str, Any]] = [{**group, "params": list(group["params"])} for group in groups]

    def update(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over the current groups' options, and parameters that are new."""
        now: dict[int, Mapping[str, Any]] = {id(p): group for group in groups for p in group["params"]}
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            current = next((now[id(p)] for p in group["params"] if id(p) in now), group)
            group.update({name: value for name, value in current.items() if name not in ("params", "param_names")})
        for group in groups:
            new = [i for i, p in enumerate(group["params"]) if id(p) not in known]
            if new:
                names = {"param_names": [group["param_names"][i] for i in new]} if "param_names" in group else {}
                self.param_groups.append({**group, "params": [group["params"][i] for i in new], **names})
