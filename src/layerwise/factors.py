"""One step's factors, as numbers or as a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from .partition import OUTSIDE
from .rules.base import finite_or_one
from .tensors import has_values, moved, warn_without_values

Item = TypeVar("Item")


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
        self._numbers: list[float] | None = None
        if not isinstance(raw, Tensor) or raw.device.type == "cpu":
            self._numbers = self._read()
        # Nothing has to act then, and the optimizer steps as it is.
        self.neutral = self._numbers is not None and self._numbers.count(1.0) == len(self._numbers)

    @property
    def on_device(self) -> bool:
        """Whether reading the factors would wait for the device."""
        return self._numbers is None

    @property
    def numbers(self) -> list[float] | None:
        """The factors as plain numbers; None where reading them would wait for the device."""
        return None if self._numbers is None else self.read()

    def buckets(self, of_layer: Mapping[int, list[Item]]) -> Iterator[tuple[float, list[Item]]]:
        """Yield each distinct factor with what belongs to its layers.

        Args:
            of_layer: Layer's number to what belongs to it; the factor of `OUTSIDE` is 1.
        """
        return gathered(self.read(), of_layer.items())

    @property
    def tensor(self) -> Tensor:
        """The factors on the parameters' device."""
        if self._tensor is None:
            if isinstance(self._raw, Tensor) and self._numbers is None:
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
        self.complete()
        if self._numbers is None:
            self._numbers = self._read()
        return self._numbers

    def complete(self) -> None:
        """Compute what has not been asked for yet."""

    def _read(self) -> list[float]:
        raw: Any = self._raw
        if isinstance(self._raw, Tensor) and not has_values(self._raw):
            warn_without_values("factors that have to be read are 1", 2)
            return [1.0] * len(raw)
        numbers: list[float] = raw.tolist() if isinstance(self._raw, Tensor) else list(raw)
        if self._mask is None and all(map(isfinite, numbers)):
            return numbers
        return [x if inside and isfinite(x) else 1.0 for x, inside in zip(numbers, self._included, strict=True)]


def gathered(
    numbers: Sequence[float], of_layer: Iterable[tuple[int, list[Item]]]
) -> Iterator[tuple[float, list[Item]]]:
    """Return each distinct factor with what belongs to its layers.

    Args:
        numbers: The factor of each layer.
        of_layer: Numbers of layers, each with what belongs to it.
    """
    found: dict[float, list[Item]] = {}
    for layer, items in of_layer:
        factor = 1.0 if layer == OUTSIDE else numbers[layer]
        found[factor] = found[factor] + items if factor in found else items
    return iter(found.items())
