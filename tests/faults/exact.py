"""Equality to the bit of anything that a state may hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same_bits(actual: Any, expected: Any) -> None:
    """Compare nested dictionaries and lists of tensors and plain values; NaN equals NaN."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            same_bits(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same_bits(one, other)
    else:
        assert actual == expected or (actual != actual and expected != expected)
