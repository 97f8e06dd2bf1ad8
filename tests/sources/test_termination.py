"""SIGTERM, where what it is told to goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref

import pytest

from memtrace.sources.termination import Termination

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


class Subscriber:
    def tell(self):
        """Would be told."""


def test_the_handler_of_before_is_let_go_with_the_last_subscriber():
    """It may know a model, as the one of a framework does that its training has set and takes back."""

    def handler(number, frame):
        """Handles the signal for a training."""

    subscriber = Subscriber()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        unsubscribe = Termination().subscribe(subscriber.tell)
        unsubscribe()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    alive = weakref.ref(handler)
    del handler
    assert alive() is None
