"""The command ``layerwise`` until PyTorch is there.

Importing ``layerwise`` imports PyTorch, which takes seconds; Ctrl-C meanwhile would print a traceback. So the command
begins outside of that package.
"""

from __future__ import annotations

import os
import signal

INTERRUPTED = 130
"""What a shell says of a program that Ctrl-C ended."""


def main() -> int:
    """Import the lab and run the command; Ctrl-C before that ends it without a word.

    Returns:
        Exit code, as ``layerwise.lab.cli.main`` gives it.
    """

    def leave(*_: object) -> None:
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    from layerwise.lab import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()
