"""Caffe's solvers as optimizers of PyTorch: the local rate is inside the history, as in Singh et al. 2015.

They differ from ``torch.optim`` where the rate changes. Caffe's SGD keeps ``h <- mu h + local d; w <- w - h``,
so what the history holds keeps the rate of its own iteration; ``torch.optim.SGD`` multiplies the whole history
by the newest rate. Each parameter group may carry Caffe's ``lr_mult`` and ``decay_mult``, which stay outside of
``group["lr"]``: a scheduler changes the one global rate, and so does ``layerwise.LayerwiseLR(apply="lr")``, whose
factor m_l makes the local rate t(k) m_l lr_mult.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.lab.errors import UsageError
from layerwise.rules.base import is_number

_LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a finite number from 0", lambda value: 0 <= value < math.inf),
    "lr_mult": ("a finite number from 0, 1 to keep the rate", lambda value: 0 <= value < math.inf),
    "momentum": ("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "weight_decay": ("a finite number from 0, 0 for none", lambda value: 0 <= value < math.inf),
    "decay_mult": ("a finite number from 0, 0 for no decay", lambda value: 0 <= value < math.inf),
    "delta": ("a finite number above 0, or an element without gradients divides 0 by 0", lambda v: 0 < v < math.inf),
}
"""Option of a group -> its range in words, and whether a number is inside."""


def _check(place: str, name: str, value: object) -> None:
    """Raise unless an option is a number in its range."""
    words, inside = _LIMITS[name]
    if not is_number(value) or not inside(value):  # type: ignore[arg-type]
        raise UsageError(f"{place}: {name}={value!r}: use {words}")


class _Solver(torch.optim.Optimizer, ABC):
    """What Caffe's solvers have in common.

    d = g + weight_decay decay_mult w, local = lr lr_mult; a solver says what follows from them.

    Args:
        params: parameters, named parameters or groups, as for any optimizer of PyTorch.
        options: values for groups that have none of their own; lr_mult and decay_mult are 1 there.

    Raises:
        UsageError: a value out of its range, a momentum for a solver that takes none, or parameters other than
            float32 and float64, the types Caffe has.

    Reference:
        Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::ApplyUpdate and SGDSolver::Regularize.
    """

    def __init__(self, params: Iterable[Any], **options: float) -> None:
        super().__init__(params, {**options, "lr_mult": 1.0, "decay_mult": 1.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: ``params``, and what differs from the defaults; it is copied, so that one list of groups can
                serve several solvers.

        Raises:
            UsageError: as the constructor; no group is added then.
        """
        solver = type(self).__name__
        group = {**self.defaults, **param_group}
        for name in _LIMITS:
            if name in self.defaults:
                _check(solver, name, group[name])
            elif name in group:
                raise UsageError(f"{solver}: {name}={group[name]!r}: {solver} takes no {name}, leave it out")
        super().add_param_group(group)
        # PyTorch accepts parameters in several forms; only now they are a list.
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                del self.param_groups[-1]
                raise UsageError(f"{solver}: dtype={parameter.dtype!r}: use parameters of torch.float32 or float64")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient stay as they are, and so does their history.

        Args:
            closure: computes the loss and its gradients anew, if given.

        Returns:
            What the closure returned, or None.

        Raises:
            UsageError: a gradient is sparse; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [[w for w in group["params"] if w.grad is not None] for group in self.param_groups]
        for weights in present:
            for w in weights:
                if w.grad.layout is not torch.strided:
                    raise UsageError(
                        f"{type(self).__name__}: layout={w.grad.layout!r} of the gradient of a parameter of shape "
                        f"{tuple(w.shape)}: use dense gradients, such as those of nn.Embedding(..., sparse=False)"
                    )
        # Tensor by tensor: for the eight of LeNet on one thread torch._foreach_* was not faster, within an iteration
        # of training and with the small groups of an adapter, and it holds the intermediate values of all at once.
        for group, weights in zip(self.param_groups, present, strict=True):
            local, decay = group["lr"] * group["lr_mult"], group["weight_decay"] * group["decay_mult"]
            for w in weights:
                d = w.grad if decay == 0 else torch.add(w.grad, w, alpha=decay)
                self._update(w, d, local, group)
        return loss

    @abstractmethod
    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        """Step one parameter; ``d`` may be its gradient itself and is not to be changed."""

    def _history(self, w: Tensor, name: str = "history") -> Tensor:
        """Return a blob of a parameter's history, zeros at its first step."""
        state = self.state[w]
        if name not in state:
            state[name] = torch.zeros_like(w, memory_format=torch.preserve_format)
        return state[name]


class SGD(_Solver):
    """Caffe's SGD.

    d = g + weight_decay decay_mult w; h <- momentum h + lr lr_mult d; w <- w - h

    Args:
        params: parameters, named parameters or groups; see ``parameter_groups``.
        lr: the global rate t(k), Caffe's base_lr under its policy.
        momentum: mu, from 0 to below 1; without it there is no history.
        weight_decay: lambda, L2, on all parameters with a decay_mult above 0.

    Raises:
        UsageError: a value out of its range.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> solver = SGD([{"params": [w], "lr_mult": 2.0}], 0.1, momentum=0.5)
        >>> w.grad = torch.ones(1)
        >>> solver.step()  # h = 0.1 * 2 * 1
        >>> solver.param_groups[0]["lr"] = 0.0
        >>> solver.step()  # h = 0.5 * 0.2: of the old rate
        >>> round(w.item(), 6)
        0.7

    Reference:
        Caffe src/caffe/solvers/sgd_solver.cpp, SGDSolver::ComputeUpdateValue.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        if group["momentum"] == 0:
            w.add_(d, alpha=-local)
        else:
            w.sub_(self._history(w).mul_(group["momentum"]).add_(d, alpha=local))


class Nesterov(_Solver):
    """Caffe's form of Nesterov's accelerated gradient.

    d = g + weight_decay decay_mult w; h_0 = h; h <- momentum h_0 + lr lr_mult d;
    w <- w - ((1 + momentum) h - momentum h_0)

    Args:
        params: parameters, named parameters or groups; see ``parameter_groups``.
        lr: the global rate t(k), Caffe's base_lr under its policy.
        momentum: mu, from 0 to below 1; at 0 this is SGD without a history.
        weight_decay: lambda, L2, on all parameters with a decay_mult above 0.

    Raises:
        UsageError: a value out of its range.

    Reference:
        Caffe src/caffe/solvers/nesterov_solver.cpp, NesterovSolver::ComputeUpdateValue.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        momentum = group["momentum"]
        if momentum != 0:
            # h - momentum h_0 is local d, so the update is momentum h + local d, and no copy of h_0 is needed.
            w.add_(self._history(w).mul_(momentum).add_(d, alpha=local), alpha=-momentum)
        w.add_(d, alpha=-local)


class AdaGrad(_Solver):
    """Caffe's AdaGrad, which has no momentum.

    d = g + weight_decay decay_mult w; h <- h + d^2; w <- w - lr lr_mult d / (sqrt(h) + delta), element by element

    The rate, and with it a layer's factor, is outside of the sum; Singh et al. 2015, equation 12.

    Args:
        params: parameters, named parameters or groups; see ``parameter_groups``.
        lr: the global rate t(k), Caffe's base_lr under its policy.
        weight_decay: lambda, L2, on all parameters with a decay_mult above 0.
        delta: added outside of the root.

    Raises:
        UsageError: a value out of its range.

    Reference:
        Caffe src/caffe/solvers/adagrad_solver.cpp, AdaGradSolver::ComputeUpdateValue; default of delta in
        src/caffe/proto/caffe.proto, SolverParameter.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, weight_decay: float = 0.0, delta: float = 1e-8) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, delta=delta)

    def _update(self, w: Tensor, d: Tensor, local: float, group: Mapping[str, Any]) -> None:
        root = self._history(w).addcmul_(d, d).sqrt()
        w.addcdiv_(d, root.add_(group["delta"]), value=-local)


class AdaDelta(_Solver):
    """Caffe's AdaDelta, whose ``momentum`` is the decay of its two averages.

    d = g + weight_decay decay_mult w; h <- momentum h + (1 - momentum) d^2; u = d sqrt((h_2 + delta) / (h + delta));
    h_2 <- momentum h_2 + (1 - momentum) u^2; w <- w - lr lr_mult u, element by element

    The rate, and with it a layer's factor, is outside of both averages.

    Args:
        params: parameters, named parameters or groups; see ``parameter_groups``.
        lr: the global rate t(k), Caffe's base_lr under its policy; 1 in lenet_adadelta_solver.prototxt.
        momentum: rho, from 0 to below 1; 0.95 in lenet_adadelta_solver.prototxt.
        weight_decay: lambda, L2, on all parameters with a decay_mult above 0.
        delta: added inside of the root; 1e-6 in lenet_adadelta_solver.prototxt.

    Raises:
        UsageError: a value out of its range.

    Reference:
        Caffe src/caffe/solvers/adadelta_solver.cpp, AdaDeltaSolver::ComputeUpdateValue.
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
    """Group a network's parameters by their multipliers, what ``param { lr_mult decay_mult }`` is in Caffe.

    Args:
        model: the network.
        multipliers: parameter name -> (lr_mult, decay_mult); a parameter that is missing has (1, 1).

    Returns:
        One group for each pair, in the order of first appearance in ``model.named_parameters()``: ``params`` with
        names, ``lr_mult`` and ``decay_mult``.

    Raises:
        UsageError: a name that the network has not, or no pair of finite numbers from 0.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), {"bias": (2.0, 0.0)})
        >>> [([name for name, _ in group["params"]], group["lr_mult"], group["decay_mult"]) for group in groups]
        [(['weight'], 1.0, 1.0), (['bias'], 2.0, 0.0)]

    Reference:
        Caffe src/caffe/proto/caffe.proto, ParamSpec.
    """
    named = dict(model.named_parameters())
    for name, pair in multipliers.items():
        if name not in named:
            raise UsageError(f"multipliers name {name!r}: use names of the network's parameters: {', '.join(named)}")
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UsageError(f"multipliers[{name!r}]={pair!r}: use a pair (lr_mult, decay_mult) of numbers from 0")
        for option, value in zip(("lr_mult", "decay_mult"), pair, strict=True):
            _check(f"multipliers[{name!r}]", option, value)
    members: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named.items():
        rate, decay = multipliers.get(name, (1.0, 1.0))
        members.setdefault((float(rate), float(decay)), []).append((name, parameter))
    return [{"params": params, "lr_mult": rate, "decay_mult": decay} for (rate, decay), params in members.items()]
