"""The command ``layerwise`` from its first moment; also ``python -m layerwise``, as for ``torchrun -m layerwise``."""

import sys

from layerwise.lab.errors import leaving


def main() -> int:
    """Import the lab and run the command; Ctrl-C before that ends it without a word.

    Returns:
        Exit code, as ``layerwise.lab.cli.main`` gives it.
    """
    with leaving():
        from layerwise.lab import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
