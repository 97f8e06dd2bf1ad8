"""SIGTERM, where what it is told to goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

TERMINATED = """
import os, signal, threading
from memtrace.sources.termination import TERMINATION

class Subscriber:
    def tell(self):
        {}

subscriber = Subscriber()
TERMINATION.subscribe(subscriber.tell)
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(60)
"""


@pytest.mark.parametrize("does", ["raise RuntimeError('of the subscriber')", "threading.Event().wait(60)"])
def test_a_process_ends_of_it_whatever_its_subscribers_do(does):
    """One that raises takes nothing from the signal, and one that hangs two seconds: the process ends by it."""
    script = TERMINATED.format(does)
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == -signal.SIGTERM
