"""``python -m layerwise_command``: the command, whose import of PyTorch Ctrl-C ends without a traceback."""

import sys

from layerwise_command import main

if __name__ == "__main__":
    sys.exit(main())
