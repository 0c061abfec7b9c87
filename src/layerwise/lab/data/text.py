"""English text that ships with Python, so that nothing is downloaded: the language reference that ``help()`` shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from layerwise.lab.errors import UsageError

SYMBOLS = 128
"""Different characters of ASCII, which every text here is of."""

TEST_SHARE = 10
"""The last of so many equal parts is for tests."""


@dataclass(frozen=True)
class Text:
    """A text as numbers, int64, one a character, each below 128; ``test`` follows ``train``."""

    train: Tensor
    test: Tensor


@lru_cache(maxsize=1)
def load() -> Text:
    """Read the topics of ``pydoc_data`` in the order of their names, some 450,000 characters.

    It is the same wherever the version of Python is; another version has other words in places.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python has no module 'pydoc_data', which holds the text: use one with its whole standard library"
        ) from error
    return of("\n".join(topics[name] for name in sorted(topics)))


def of(words: str) -> Text:
    """Make numbers of a text, nine tenths to train, one to test; characters that are not ASCII are left out."""
    symbols = torch.frombuffer(bytearray(words.encode("ascii", "ignore")), dtype=torch.uint8).long()
    split = len(symbols) - len(symbols) // TEST_SHARE
    return Text(symbols[:split], symbols[split:])


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut windows out of a text at random places; shape (count, length)."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def entropy(text: Tensor) -> float:
    """Give the unigram entropy, -Σ p ln p in nats a symbol: no model that ignores the context has a smaller loss."""
    counts = text.bincount().double()
    shares = counts[counts > 0] / len(text)
    return -float((shares * shares.log()).sum())
