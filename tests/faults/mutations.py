"""Files changed at random, and what a reader may make of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change a file: turn bits, write bytes, cut, leave out, zero, repeat, add, or empty it; never leave it alone."""
    while True:
        made = bytearray(content)
        first, last = sorted(chance.randrange(len(made)) for _ in range(2))
        match chance.choice(
            ("bit", "bit", "bit", "bytes", "cut", "cut", "without", "zeros", "twice", "longer", "empty")
        ):
            case "bit":
                made[first] ^= 1 << chance.randrange(8)
            case "bytes":
                for _ in range(chance.randrange(1, 9)):
                    made[chance.randrange(len(made))] = chance.randrange(256)
            case "cut":
                del made[first:]
            case "without":
                del made[first:last]
            case "zeros":
                made[first:last] = bytes(last - first)
            case "twice":
                made[first:first] = made[first:last]
            case "longer":
                made += chance.randbytes(chance.randrange(1, 100))
            case "empty":
                made.clear()
        if made != content:
            return bytes(made)


def tally(count: int, seed: int, content: bytes, read: Callable[[bytes], str]) -> Counter[str]:
    """Let a reader read a file that was changed, so many times; count what it gave."""
    chance = random.Random(seed)
    return Counter(read(mutated(content, chance)) for _ in range(count))


def named(error: Exception, *words: object) -> str:
    """Check that an error is one line that names something."""
    text = str(error)
    assert all(str(word) in text for word in words), text
    assert "\n" not in text, text
    return "named error"
