"""One step's factors, as numbers or as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from .rules.base import finite_or_one
from .tensors import moved


class Factors:
    """One step's factors: numbers where reading them waits for nothing, else a tensor on the parameters' device.

    A factor that is not finite is 1.

    Args:
        raw: What the rule returned, shape `[n_layers]`, or plain numbers on the CPU.
        included: Which layers are not excluded; the factor of the others is 1.
        mask: The same as a tensor beside `raw`; None if all are included.
    """

    def __init__(self, raw: Tensor | Sequence[float], included: Sequence[bool], mask: Tensor | None) -> None:
        self._raw, self._included, self._mask = raw, included, mask
        self._tensor: Tensor | None = None
        self._each: dict[torch.device, tuple[Tensor, ...]] = {}
        self.numbers: list[float] | None = None
        if not isinstance(raw, Tensor) or raw.device.type == "cpu":
            self.numbers = self._read()
        # Nothing has to act then, and the optimizer steps as it is.
        self.neutral = self.numbers is not None and self.numbers.count(1.0) == len(self.numbers)

    @property
    def tensor(self) -> Tensor:
        """The factors on the parameters' device."""
        if self._tensor is None:
            if isinstance(self._raw, Tensor) and self.numbers is None:
                finite = finite_or_one(self._raw)
                self._tensor = finite if self._mask is None else torch.where(self._mask, finite, 1.0)
            else:
                self._tensor = torch.tensor(self.read(), dtype=torch.float64, device="cpu")
        return self._tensor

    def each(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the factors one by one, on the device of another tensor (a model may lie on several)."""
        if like.device not in self._each:
            self._each[like.device] = moved(self.tensor, like.device).unbind()
        return self._each[like.device]

    def read(self) -> list[float]:
        """Return the numbers; on an accelerator this waits for the device, once."""
        if self.numbers is None:
            self.numbers = self._read()
        return self.numbers

    def _read(self) -> list[float]:
        numbers: list[float] = self._raw.tolist() if isinstance(self._raw, Tensor) else list(self._raw)
        if self._mask is None and all(map(isfinite, numbers)):
            return numbers
        return [x if inside and isfinite(x) else 1.0 for x, inside in zip(numbers, self._included, strict=True)]
