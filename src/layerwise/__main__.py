"""``python -m layerwise``: the command, for ``torchrun -m layerwise``."""

import sys

from layerwise.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
