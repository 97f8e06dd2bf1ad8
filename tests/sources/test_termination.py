"""SIGTERM, where what it is told to goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys

TERMINATED = """
import os, signal, threading
from memtrace.sources.termination import TERMINATION

class Subscriber:
    def tell(self):
        raise RuntimeError("of the subscriber")

subscriber = Subscriber()
TERMINATION.subscribe(subscriber.tell)
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(60)
"""


def test_a_process_ends_of_it_whatever_its_subscribers_do():
    """One that raises takes nothing from the signal: the process ends by it, at once."""
    done = subprocess.run([sys.executable, "-c", TERMINATED], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == -signal.SIGTERM
