"""A thread that reads the device, so that a slow or hanging driver never holds up the training thread."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from memtrace.breakdown import DeviceReading
from memtrace.errors import DeviceUnavailable
from memtrace.sources.device import DeviceReader

logger = logging.getLogger("memtrace")

THREAD_NAME = "memtrace-device-sampler"

MIN_STALE_SECONDS = 10.0
STALE_PERIODS = 5


class DeviceSampler:
    """The newest reading of one device, taken by a daemon thread of its own.

    The thread opens the device, reads it every period and closes it again, so that each call that may block is made
    there. `start` and `stop` belong to one thread; any thread may call `reading`. In a forked child the sampler is
    not started: there it has no reading, and `start` begins afresh. The thread does not keep its sampler alive, and
    ends when that is collected.

    Args:
        open_reader: opens the device; called once for each start.
        period_seconds: between two readings. 0 means no thread: `reading` asks the device itself, and blocks as long
            as the device does.
        patience_seconds: how long `start` waits for the first reading and `stop` for the last one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        open_reader: Callable[[], DeviceReader],
        *,
        period_seconds: float,
        patience_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_reader = open_reader
        self._period = period_seconds
        self._patience = patience_seconds
        self._clock = clock
        self._pid = os.getpid()
        self._run: _Run | None = None

    def start(self) -> None:
        """Opens the device; does nothing when started already.

        A device that is not available is logged once, and then there are no readings.
        """
        if self._current_run() is not None:
            return
        self._pid = os.getpid()
        if self._period:
            run = _ThreadRun(self._open_reader, self._period, self._patience, self._clock)
            weakref.finalize(self, run.end).atexit = False
            self._run = run
        else:
            self._run = _DirectRun(self._open_reader)

    def stop(self) -> None:
        """Ends the thread and closes the device; does nothing when not started.

        A thread that hangs in the driver is left behind: it closes the device when it comes back, and what it has
        read is dropped.
        """
        run, self._run = self._current_run(), None
        if run is not None:
            run.stop()

    def reading(self) -> DeviceReading | None:
        """Returns the newest reading; None where there is none that is newer than 5 periods or 10 s.

        Raises:
            RuntimeError: the thread has ended on an error that is not the device's, which is the cause.
        """
        run = self._current_run()
        return None if run is None else run.reading()

    def _current_run(self) -> _Run | None:
        """Returns the run that this process has started; a forked child has none."""
        return self._run if self._pid == os.getpid() else None


class _Run(Protocol):
    """What lies between a start and a stop."""

    def reading(self) -> DeviceReading | None: ...

    def stop(self) -> None: ...


class _DirectRun:
    """Reads the device when asked, on the asking thread."""

    def __init__(self, open_reader: Callable[[], DeviceReader]) -> None:
        self._reader = _open_or_log(open_reader)

    def reading(self) -> DeviceReading | None:
        return None if self._reader is None else self._reader.read()

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.close()


class _TimedReading(NamedTuple):
    reading: DeviceReading
    begun: float
    """When the device was asked, by the clock of the sampler."""


class _ThreadRun:
    """One life of the sampling thread. What it knows is replaced as a whole, so that readers need no lock."""

    def __init__(
        self,
        open_reader: Callable[[], DeviceReader],
        period_seconds: float,
        patience_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._open_reader = open_reader
        self._period = period_seconds
        self._patience = patience_seconds
        self._clock = clock
        self._newest: _TimedReading | None = None
        self._fault: BaseException | None = None
        self._has_begun = threading.Event()
        # No Event: the collector may end the run between any two instructions, also of the thread that waits, and an
        # Event's lock would then be taken twice. SimpleQueue.put is made for finalizers.
        self._end: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=THREAD_NAME, daemon=True)
        self._thread.start()
        self._has_begun.wait(self._patience)

    def reading(self) -> DeviceReading | None:
        if self._fault is not None:
            raise RuntimeError("the device sampler has ended on an error of its own") from self._fault
        newest = self._newest
        if newest is None or self._clock() - newest.begun > max(STALE_PERIODS * self._period, MIN_STALE_SECONDS):
            return None
        return newest.reading

    def end(self) -> None:
        """Tells the thread to end and waits for nothing."""
        self._end.put(None)

    def stop(self) -> None:
        self.end()
        self._thread.join(self._patience)

    def _main(self) -> None:
        try:
            self._sample()
        finally:
            self._newest = None
            self._fault = sys.exception()  # raised by reading(), on a thread that is guarded
            self._has_begun.set()

    def _sample(self) -> None:
        reader = _open_or_log(self._open_reader)
        if reader is None:
            return
        with closing(reader):
            ended = self._ends_within(0)
            while not ended:
                begun = self._clock()
                self._newest = _TimedReading(reader.read(), begun)
                self._has_begun.set()
                ended = self._ends_within(self._period)

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._end.get(timeout=seconds)
        except Empty:
            return False
        return True


def _open_or_log(open_reader: Callable[[], DeviceReader]) -> DeviceReader | None:
    try:
        return open_reader()
    except DeviceUnavailable as reason:
        logger.warning("no device readings: %s", reason)
        return None
