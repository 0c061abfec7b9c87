"""The command ``layerwise`` from its first moment; also ``python -m layerwise``, as for ``torchrun -m layerwise``."""

import os
import sys

from layerwise.lab.errors import leaving


def main() -> int:
    """Import the lab and run the command; Ctrl-C during the import ends it silently. Returns the exit code."""
    if __name__ == "__main__" and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
        # `python -m` puts the working directory there, and `layerwise` does not: a task is to find the same modules.
        del sys.path[0]
    with leaving():
        from layerwise.lab import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
