"""Raising before a step whose gradients are not all finite, for those who ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .layers import Layer
from .sharding import Sharing, find_pieces, is_absent, settled_gradient, sharing_of
from .tensors import as_dense_real, has_values, local, moved

OnNonfinite = Literal["ignore", "raise"]
MOST_NAMED = 5


class FiniteGradients:
    """Counts the steps of one adapter, and raises at one with a gradient that is NaN or infinite.

    It reads max |g| of each parameter, which is finite for any finite gradient, where a norm may overflow. That reads
    the gradients once more, waits for the device, and takes one collective where parameters are shared among processes,
    all of which raise then, also for a parameter that only one of them holds.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([1e38, 1e38])  # its norm is beyond float32, the gradient is not
        >>> finite = FiniteGradients()
        >>> finite.look_at([Layer("head", (weight,), ("head.weight",))])
        >>> finite.check()
        >>> weight.grad[1] = torch.nan
        >>> finite.check()
        Traceback (most recent call last):
        FloatingPointError: step 2: the gradient of layer 'head' is not finite (head.weight), so no step was taken...
    """

    def __init__(self) -> None:
        self.steps = 0
        self.look_at([])

    def look_at(self, layers: Sequence[Layer], others: Mapping[str, Tensor] | None = None, model: Any = None) -> None:
        """Look at other parameters from the next step on.

        Args:
            layers: The layers, excluded ones among them.
            others: The optimizer's parameters that are in no layer, by name.
            model: The model, which knows how FSDP1 has shared them among processes.
        """
        none = [Layer("(in no layer)", tuple(others.values()), tuple(others))] if others else []
        self._layers = [*layers, *none]
        self._parameters = [p for layer in self._layers for p in layer.parameters]
        pieces = find_pieces(self._parameters, model)
        self._sharing = sharing_of([pieces.get(id(p)) for p in self._parameters])

    @torch.no_grad()
    def check(self, found_inf: Tensor | None = None) -> None:
        """Raise if a gradient is not finite, else count the step.

        Args:
            found_inf: There when a gradient scaler looks after this step, and lets the optimizer skip it where needed.

        Raises:
            FloatingPointError: A gradient is not finite; nothing has been changed.
        """
        if found_inf is None and self._parameters:
            broken, elsewhere = _broken(self._parameters, self._sharing)
            if broken or elsewhere:
                raise FloatingPointError(_message(self.steps + 1, self._layers, broken))
        self.steps += not is_absent()


def _broken(parameters: Sequence[Tensor], sharing: Sharing | None) -> tuple[list[int], bool]:
    """Return the positions of the parameters with a gradient that is not finite, and whether any process has one.

    Waits for the device.
    """
    held = [
        (i, as_dense_real(local(g.detach())))
        for i, p in enumerate(parameters)
        if (g := settled_gradient(p)) is not None
    ]
    held = [(i, gradient) for i, gradient in held if gradient.numel() and has_values(gradient)]
    device = held[0][1].device if held and sharing is None else local(parameters[0]).device
    if not held and sharing is None:
        return [], False
    flags = torch.zeros(len(parameters), device=device)
    if held:
        largest: Any = torch._foreach_norm([gradient for _, gradient in held], torch.inf)
        positions = torch.tensor([i for i, _ in held], device=device)
        finite = torch.stack([moved(one.isfinite(), device) for one in largest])
        flags[positions] = (~finite).float()
    elsewhere = False
    if sharing is not None:
        flags, some = sharing.flagged(flags)
        if not some > 0:  # none, or NaN: a process is paused, and then none raises
            return [], False
        elsewhere = True
    broken: Any = (flags > 0).nonzero().flatten()
    return broken.tolist(), elsewhere


def _message(step: int, layers: Sequence[Layer], broken: Sequence[int]) -> str:
    if not broken:
        return (
            f"step {step}: the gradient of a parameter that another process holds is not finite, so no step was taken "
            "and nothing has changed; the error of that process names it"
        )
    owners = [(layer.name or "(root)", name) for layer in layers for name in layer.parameter_names]
    names = list(dict.fromkeys(repr(owners[i][0]) for i in broken))
    return (
        f"step {step}: the gradient of layer{'s' if len(names) > 1 else ''} {_some(names)} is not finite "
        f"({_some([owners[i][1] for i in broken])}), so no step was taken and nothing has changed. Causes: too "
        "large a rate, a logarithm or a division by zero in the loss, float16 without a gradient scaler. Lower the "
        "rate, clip, or zero the gradients and go on with the next batch; on_nonfinite='ignore' lets the optimizer step"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
