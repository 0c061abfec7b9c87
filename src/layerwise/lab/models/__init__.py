"""Networks of the papers, as their authors' software defined them, and of kinds that the papers leave to the future."""

from __future__ import annotations

from layerwise.lab.errors import UsageError


def check_sizes(**sizes: int) -> None:
    """Refuse a size of a network that is no whole number from 1.

    Args:
        **sizes: name of the argument -> its value.

    Raises:
        UsageError: the first that is not.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r}: use a whole number from 1")
