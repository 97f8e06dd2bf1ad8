"""`python -m memtrace` is the same as `memtrace`."""

from __future__ import annotations

import atexit
import gc
import sys

LOCAL_RANK = ("--local_rank=", "--local-rank=")
"""What launchers tell a script in its first argument: `deepspeed`, and `torch.distributed.launch`."""


def main() -> int:
    """Runs `memtrace`, and returns its exit status.

    `memtrace run` goes before the others are loaded: each process of a training waits for it.
    """
    words = sys.argv[1:]
    place = [word for word in words[:1] if word.startswith(LOCAL_RANK)]  # told by a launcher, before all other words
    words = words[len(place) :]
    if words[:1] == ["run"] and words[1:] and words[1] not in ("-h", "--help"):
        from memtrace.errors import MemTraceError  # noqa: PLC0415
        from memtrace.launch.command import start  # noqa: PLC0415

        try:
            return start(words[1:], place)
        except MemTraceError as error:
            sys.stderr.write(f"memtrace: {error}\n")
            return 2
    from memtrace.cli import main as run_command  # noqa: PLC0415

    atexit.register(gc.freeze)  # no collection goes through torch and transformers once more while the process ends
    return run_command(words)


if __name__ == "__main__":
    sys.exit(main())
