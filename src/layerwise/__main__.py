"""The command ``layerwise`` from its first moment; also ``python -m layerwise``, as for ``torchrun -m layerwise``."""

import os
import sys
from contextlib import suppress

from layerwise.lab.errors import leaving


def main() -> int:
    """Import the lab and run the command; Ctrl-C during the import ends it silently. Returns the exit code."""
    with leaving():
        from layerwise.lab import cli
    return cli.main()


if __name__ == "__main__":
    with suppress(FileNotFoundError):  # the working directory was removed
        # `python -m` puts it first, which `layerwise` does not: a task finds the same modules with both.
        if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
            del sys.path[0]
    sys.exit(main())
