"""How a script ends: well, or within its training, in the way that the variable END says."""

import os
import signal
import sys
import time

import digests
from torch import nn


def in_call(module: nn.Module, number: int, *, tells: bool = True) -> None:
    """Tells the weights when the module is called for the so manieth time, and ends there unless all goes well."""
    calls = []

    def called(module: nn.Module, args: object) -> None:
        calls.append(None)
        if len(calls) == number:
            if tells:
                print(digests.of(module), flush=True)
            now(os.environ.get("END", "well"))

    module.register_forward_pre_hook(called)


def now(end: str) -> None:
    """Ends the process in one of the ways: `asked` waits for a signal of another process."""
    if end == "status":
        sys.exit(3)
    if end == "exception":
        raise ValueError("bad data")
    if end == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if end in ("signal", "asked"):
        time.sleep(60)
