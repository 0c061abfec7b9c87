"""Rows of a parameter that are a layer of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor


class Rows(Tensor):
    """A view of some rows of a parameter, whose gradient is a view of the same rows of the parameter's gradient.

    Operations on it return ordinary tensors.

    Args:
        whole: The parameter.
        dimension: Along which the rows are counted.
        first: The first row.
        count: How many rows.
        label: What stands for them in names.

    Example:
        >>> weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
        >>> rows = Rows(weight, 0, 1, 2, "v")
        >>> weight.grad = torch.ones(3, 2)
        >>> rows + 0, rows.grad
        (tensor([[2., 3.],
                [4., 5.]]), tensor([[1., 1.],
                [1., 1.]]))
    """

    whole: Tensor
    label: str
    span: tuple[int, int, int]
    seen: tuple[int, torch.dtype]
    __torch_function__: Any = cast(Any, torch._C)._disabled_torch_function_impl

    def __new__(cls, whole: Tensor, dimension: int, first: int, count: int, label: str) -> Rows:
        """Make the view."""
        rows: Any = Tensor._make_subclass(cls, whole.detach().narrow(dimension, first, count))
        rows.whole, rows.label, rows.span = whole, label, (dimension, first, count)
        rows.seen = (whole.data_ptr(), whole.dtype)
        return rows

    def of(self, whole: Tensor) -> Tensor:
        """Return a view of these rows of a tensor of the parameter's shape."""
        return whole.narrow(*self.span)

    def renew(self) -> None:
        """View the parameter's memory where the parameter has other memory now."""
        seen = (self.whole.data_ptr(), self.whole.dtype)
        if seen != self.seen:
            self.data, self.seen = self.of(self.whole.detach()), seen

    @property
    def grad(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rows of the parameter's gradient; None if it has none."""
        gradient = self.whole.grad
        return None if gradient is None else self.of(gradient)

    @property
    def requires_grad(self) -> Any:
        """Whether the parameter is trained."""
        return self.whole.requires_grad


def is_rows(tensor: object) -> TypeGuard[Rows]:
    """Return whether a tensor is rows of a parameter."""
    return type(tensor) is Rows


def whole_of(tensor: Tensor) -> Tensor:
    """Return the parameter of which a tensor is rows; else the tensor itself."""
    return tensor.whole if is_rows(tensor) else tensor


def renew(tensors: Iterable[Tensor]) -> None:
    """Let those of the tensors that are rows view the memory that their parameters have now."""
    for tensor in tensors:
        if is_rows(tensor):
            tensor.renew()
