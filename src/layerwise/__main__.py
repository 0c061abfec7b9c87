"""The command ``layerwise`` from its first moment; also ``python -m layerwise``, as for ``torchrun -m layerwise``."""

import sys

from layerwise.lab.errors import leaving


def main() -> int:
    """Import the lab and run the command; Ctrl-C during the import ends it silently. Returns the exit code."""
    with leaving():
        from layerwise.lab import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
