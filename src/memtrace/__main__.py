"""`python -m memtrace` is the same as `memtrace`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs `memtrace`, and returns its exit status.

    `memtrace run` goes before the others are loaded: each process of a training waits for it.
    """
    if sys.argv[1:2] == ["run"] and sys.argv[2:] and sys.argv[2] not in ("-h", "--help"):
        from memtrace.errors import MemTraceError  # noqa: PLC0415
        from memtrace.launch.command import start  # noqa: PLC0415

        try:
            return start(sys.argv[2:])
        except MemTraceError as error:
            sys.stderr.write(f"memtrace: {error}\n")
            return 2
    from memtrace.cli import main as run_command  # noqa: PLC0415

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
