"""``python -m surgery``: the command line, as ``accelerate launch -m surgery`` starts it too."""

import sys

from surgery.cli import main

if __name__ == "__main__":
    sys.exit(main())
