"""Reading the pickled batches of CIFAR without trusting them.

A pickle is a program: the general unpickler imports and calls whatever the file names. A batch of CIFAR names three
things, all of NumPy, to describe one array. Here each of them is replaced by a stand-in that only holds the values
of the file, from which the array is made after they have been checked; any other name is refused before it is
imported. Nor can it fill the memory: its size is checked before it comes here, what it would do is counted first, and a
text is made bytes once only.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from layerwise.lab.errors import UsageError

FEWEST_OPERATIONS = 10_000
"""So many operations a pickle may have, however short it is."""

BYTES_AN_OPERATION = 100
"""A longer one may have one more for so many bytes; an image alone is 3,072."""

ENCODE = ("_codecs", "encode")
"""Name in the file of what makes bytes of a text."""


class _ElementType:
    """Stands in for ``numpy.dtype``: its name is all that is needed of a type of one byte."""

    name: object = None

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, _: object) -> None:
        """Ignore byte order, fields and alignment, which an element of one byte does not have."""


class _Array:
    """Stands in for ``numpy.ndarray``: holds the state of which one would be made."""

    shape: object = None
    element: object = None
    by_column: object = False
    content: object = None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Keep what ``numpy.ndarray.__reduce__`` wrote."""
        _, self.shape, self.element, self.by_column, self.content = state

    def values(self) -> np.ndarray | None:
        """Make the array, or None if it is not a table of bytes."""
        shape, content = self.shape, self.content
        if not isinstance(self.element, _ElementType) or self.element.name not in (b"u1", "u1"):
            return None
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            return None
        if not isinstance(content, bytes) or len(content) != math.prod(shape):
            return None
        return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if self.by_column else "C")


def _reconstruct(*_: object) -> _Array:
    """Stand in for NumPy's function of this name, which makes the empty array whose state follows."""
    return _Array()


def _check_operations(content: bytes) -> None:
    """Refuse a pickle whose operations would fill the memory: a published file has about three an image."""
    most = max(FEWEST_OPERATIONS, len(content) // BYTES_AN_OPERATION)
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if number > most:
            raise ValueError(f"more than {most} operations in {len(content)} bytes")
        if isinstance(argument, int) and "PUT" in operation.name and not 0 <= argument <= most:
            raise ValueError(f"a place of number {argument}, where there are at most {most} operations")


_STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _ElementType,
}
"""Module and name in the file -> what it gets."""


class _Unpickler(pickle.Unpickler):
    """Unpickles strings, numbers, lists and dictionaries, and the stand-ins; imports nothing."""

    def __init__(self, content: bytes, source: str, remedy: str) -> None:
        # The files were written by Python 2, whose strings are bytes.
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._source = source
        self._remedy = remedy
        self._room = len(content)

    def _encode(self, text: str, codec: str) -> bytes:
        """Stand in for ``_codecs.encode``, with which Python 3 writes bytes at the file's protocol."""
        if codec != "latin1":
            raise ValueError(f"codec={codec!r}: only 'latin1' is used for bytes")
        self._room -= len(text)
        if self._room < 0:
            raise ValueError("it makes more bytes than it holds")
        return text.encode("latin1")

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Give the stand-in of a name.

        Args:
            module_name: as the file says.
            global_name: as the file says.

        Returns:
            The stand-in.

        Raises:
            UsageError: there is none.
        """
        if (module_name, global_name) == ENCODE:
            return self._encode
        if (module_name, global_name) not in _STAND_INS:
            allowed = ", ".join(".".join(names) for names in (*_STAND_INS, ENCODE))
            raise UsageError(
                f"{self._source}: asks for {module_name}.{global_name}, which no file of CIFAR needs (allowed: "
                f"{allowed}); it was not run; do not use this file, {self._remedy}"
            )
        return _STAND_INS[module_name, global_name]


def read_batch(content: bytes, label_key: bytes, source: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of the python version.

    Args:
        content: the file.
        label_key: key of the classes.
        source: where the content is from, for the error.
        remedy: what to do about a damaged file, for the error.

    Returns:
        Pixels and classes, uint8, of the shapes that the file gives.

    Raises:
        UsageError: the file is damaged, or names anything but the array.
    """
    expected = f"expected a pickled dictionary with b'data' and {label_key!r}"
    try:
        _check_operations(content)
        table = _Unpickler(content, source, remedy).load()
    except UsageError:
        raise
    except Exception as error:  # damaged pickles raise nearly everything
        raise UsageError(f"{source}: cannot be read ({error}); {expected}; {remedy}") from error
    array, labels = (table.get(b"data"), table.get(label_key)) if isinstance(table, dict) else (None, None)
    pixels = array.values() if isinstance(array, _Array) else None
    if pixels is None or not isinstance(labels, list) or not all(type(n) is int and 0 <= n < 256 for n in labels):
        raise UsageError(f"{source}: does not hold bytes and classes from 0 to 255; {expected}; {remedy}")
    return pixels, np.array(labels, dtype=np.uint8)
