"""`python -m memtrace` is the same as `memtrace`."""

from __future__ import annotations

import atexit
import os
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

    status = run_command(words)
    _leave(status)
    return status


def _leave(status: int) -> None:
    """Ends the process at once, unless somebody in it is still at work: Python would first take torch apart.

    What was registered to be done at exit is done. Returns where a thread goes on, or the output cannot be written.
    """
    import threading  # noqa: PLC0415 - not for `memtrace run`

    if threading.active_count() > 1 or sys.gettrace() or sys.getprofile():
        return
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as it is where the caller has closed it
                stream.flush()
    except (OSError, ValueError):  # Python says so itself
        return
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
