"""``python -m coachhook``: the command line."""

from __future__ import annotations

import sys

from coachhook.cli import main

if __name__ == "__main__":
    sys.exit(main())
