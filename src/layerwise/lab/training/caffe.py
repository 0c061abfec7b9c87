"""Caffe's solvers as optimizers of PyTorch: the local rate is inside the history, as in Singh et al. 2015.

Where the rate changes, ``torch.optim.SGD`` multiplies the whole history by the newest rate. Caffe's ``lr_mult`` and
``decay_mult`` stay outside of ``group["lr"]``, which schedulers and ``LayerwiseLR(apply="lr")`` change: with a factor
m_l the local rate is t(k) m_l lr_mult.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.lab.errors import UsageError


class _Solver(torch.optim.Optimizer, ABC):
    """What Caffe's solvers have in common.

    d = g + weight_decay decay_mult w, local = lr lr_mult; a solver says what follows from them.
    Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::ApplyUpdate and SGDSolver::Regularize.
    """

    def __init__(self, params: Iterable[Any], **options: float) -> None:
        momentum, delta = options.get("momentum", 0.0), options.get("delta", 1.0)
        if not 0 <= momentum < 1:
            raise UsageError(f"{type(self).__name__}: momentum={momentum!r}: use a number from 0 to below 1")
        if not 0 < delta < math.inf:  # else an element without gradients divides 0 by 0
            raise UsageError(f"{type(self).__name__}: delta={delta!r}: use a finite number above 0")
        super().__init__(params, {**options, "lr_mult": 1.0, "decay_mult": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient stay as they are, and so does their history."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Tensor by tensor: for the eight of LeNet on one thread torch._foreach_* was not faster, within an iteration
        # of training and with the small groups of an adapter, and it holds the intermediate values of all at once.
        for group in self.param_groups:
            local, decay = group["lr"] * group["lr_mult"], group["weight_decay"] * group["decay_mult"]
            for w in group["params"]:
                if w.grad is not None:
                    d = w.grad if decay == 0 else torch.add(w.grad, w, alpha=decay)
                    self._update(w, d, local, group)
        return loss

    @abstractmethod
    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        """Step one parameter; ``d`` may be its gradient itself and is not to be changed."""

    def _history(self, w: Tensor, name: str = "history") -> Tensor:
        """Give a blob of a parameter's history, zeros at its first step."""
        state = self.state[w]
        if name not in state:
            state[name] = torch.zeros_like(w, memory_format=torch.preserve_format)
        return state[name]


class SGD(_Solver):
    """Caffe's SGD; without momentum it keeps no history.

    d = g + weight_decay decay_mult w; h <- momentum h + lr lr_mult d; w <- w - h
    Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::ComputeUpdateValue.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        if group["momentum"] == 0:
            w.add_(d, alpha=-local)
        else:
            w.sub_(self._history(w).mul_(group["momentum"]).add_(d, alpha=local))


class Nesterov(SGD):
    """Caffe's form of Nesterov's accelerated gradient.

    d = g + weight_decay decay_mult w; h_0 = h; h <- momentum h_0 + lr lr_mult d;
    w <- w - ((1 + momentum) h - momentum h_0)
    Caffe src/caffe/solvers/nesterov_solver.cpp, NesterovSolver::ComputeUpdateValue.
    """

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        momentum = group["momentum"]
        if momentum != 0:
            # h - momentum h_0 is local d, so the update is momentum h + local d, and no copy of h_0 is needed.
            w.add_(self._history(w).mul_(momentum).add_(d, alpha=local), alpha=-momentum)
        w.add_(d, alpha=-local)


class AdaGrad(_Solver):
    """Caffe's AdaGrad, which has no momentum; the rate is outside of the sum, as in Singh et al. 2015, equation 12.

    d = g + weight_decay decay_mult w; h <- h + d^2; w <- w - lr lr_mult d / (sqrt(h) + delta), element by element
    Caffe src/caffe/solvers/adagrad_solver.cpp, AdaGradSolver::ComputeUpdateValue; default of delta in
    src/caffe/proto/caffe.proto, SolverParameter.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, weight_decay: float = 0.0, delta: float = 1e-8) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, delta=delta)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        root = self._history(w).addcmul_(d, d).sqrt()
        w.addcdiv_(d, root.add_(group["delta"]), value=-local)


class AdaDelta(_Solver):
    """Caffe's AdaDelta, whose ``momentum`` is the decay rho of its two averages; the rate is outside of both.

    d = g + weight_decay decay_mult w; h <- momentum h + (1 - momentum) d^2; u = d sqrt((h_2 + delta) / (h + delta));
    h_2 <- momentum h_2 + (1 - momentum) u^2; w <- w - lr lr_mult u, element by element
    Caffe src/caffe/solvers/adadelta_solver.cpp, AdaDeltaSolver::ComputeUpdateValue; lenet_adadelta_solver.prototxt has
    rate 1, momentum 0.95 and delta 1e-6.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, momentum: float, weight_decay: float = 0.0, delta: float = 1e-6
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, delta=delta)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        momentum, delta = group["momentum"], group["delta"]
        squares, updates = self._history(w), self._history(w, "update_history")
        squares.mul_(momentum).addcmul_(d, d, value=1 - momentum)
        u = updates.add(delta).div_(squares.add(delta)).sqrt_().mul_(d)
        updates.mul_(momentum).addcmul_(u, u, value=1 - momentum)
        w.add_(u, alpha=-local)


def parameter_groups(model: nn.Module, multipliers: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Group a network's named parameters by (lr_mult, decay_mult), 1 where none are given.

    It is what ``param { lr_mult decay_mult }`` is in Caffe (src/caffe/proto/caffe.proto, ParamSpec).
    """
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(multipliers.get(name, (1.0, 1.0)), []).append((name, parameter))
    return [{"params": params, "lr_mult": rate, "decay_mult": decay} for (rate, decay), params in members.items()]
