"""`python -m memtrace` is the same as `memtrace`."""

from __future__ import annotations

import sys

from memtrace.cli import main

if __name__ == "__main__":
    sys.exit(main())
