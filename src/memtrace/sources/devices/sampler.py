"""A thread that reads the device, so that a slow or hanging driver never holds up the training thread."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from memtrace.errors import DeviceUnavailable
from memtrace.record.breakdown import AllocatorReading, DeviceReading
from memtrace.sources.devices.readers import DeviceReader

logger = logging.getLogger("memtrace")

THREAD_NAME = "memtrace-device-sampler"

MIN_STALE_SECONDS = 10.0
STALE_PERIODS = 5

_NOTHING = DeviceReading()
MAX_PAIR_SECONDS = 300.0
"""How long the newest reading that is known to belong to one of the allocator's stands for those after it."""


class DeviceSampler:
    """The newest reading of one device, taken by a daemon thread of its own.

    The thread opens the device, reads it every period and closes it again, so that each call that may block is made
    there. `start`, `stop` and `note` belong to one thread; any thread may call `reading`. In a forked child the sampler
    is not started: there it has no reading, and `start` begins afresh. The thread of a sampler that is dropped without
    `stop` ends by itself, and nobody waits for it.

    Two readings are subtracted only if they belong to the same moment. The driver is asked on this thread, the
    allocator on the training thread: a reading of the device belongs to the allocator's figures where `note` was given
    the same ones before the driver was asked and after it had answered, without memory got from the device or given
    back in between. Only then are `DeviceReading.non_torch_bytes` and `free_and_reserved_bytes` calculated; they stand
    until the next such reading, for 5 minutes at most.

    Args:
        open_reader: opens the device; called once for each start.
        period_seconds: between two readings. 0 means no thread: `reading` asks the device itself, and blocks as long
            as the device does.
        patience_seconds: how long `start` waits for the first reading and `stop` for the last one.
        clock: monotonic seconds.
        refresh: brings a reading up to date as far as that takes microseconds, on the asking thread: of a CPU, what the
            process holds. Without a reading it begins with an empty one.
    """

    def __init__(
        self,
        open_reader: Callable[[], DeviceReader],
        *,
        period_seconds: float,
        patience_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        refresh: Callable[[DeviceReading], DeviceReading] | None = None,
    ) -> None:
        self._open_reader = open_reader
        self._refresh = refresh
        self._period = period_seconds
        self._patience = patience_seconds
        self._clock = clock
        self._pid = os.getpid()
        self._run: _Run | None = None
        self._let_go: Callable[[], object] | None = None

    def start(self) -> None:
        """Opens the device; does nothing when started already.

        A device that is not available is logged once, and then there are no readings.
        """
        if self._current_run() is not None:
            return
        self._pid = os.getpid()
        if not self._period:
            self._run = _DirectRun(self._open_reader, self._clock)
            return
        self._run = run = _ThreadRun(self._open_reader, self._period, self._patience, self._clock)
        finalizer = weakref.finalize(self, run.let_go)
        finalizer.atexit = False
        self._let_go = finalizer.detach

    def stop(self) -> None:
        """Ends the thread and closes the device; does nothing when not started.

        A thread that hangs in the driver is left behind: it closes the device when it comes back, and what it has
        read is dropped.
        """
        run, self._run = self._current_run(), None
        if self._let_go is not None:
            self._let_go()
        if run is not None:
            run.stop()

    def note(self, allocator: AllocatorReading) -> None:
        """Takes in what the allocator says now; costs about a microsecond."""
        run = self._run
        if run is not None:
            run.pairs.note(allocator)

    def reading(self) -> DeviceReading | None:
        """Returns the newest reading; None where there is none that is newer than 5 periods or 10 s.

        Raises:
            RuntimeError: the thread has ended on an error that is not the device's, which is the cause.
        """
        run = self._current_run()
        newest = None if run is None else run.reading()
        if run is None or (newest is None and self._refresh is None):
            return None
        found = DeviceReading() if newest is None else run.pairs.complete(newest)
        found = found if self._refresh is None else self._refresh(found)
        return None if found == _NOTHING else found

    def _current_run(self) -> _Run | None:
        """Returns the run that this process has started; a forked child has none."""
        return self._run if self._pid == os.getpid() else None


class _Mark(NamedTuple):
    """What of the allocator changes with each piece of memory that it gets from the device or gives back."""

    reserved_bytes: int
    device_allocations: int | None


class _Sample(NamedTuple):
    reading: DeviceReading
    begun: float
    """When the device was asked, by the clock of the sampler."""
    before: _Mark | None
    """What the allocator had last said by then."""


class _Pairs:
    """Which readings of the device belong to which of the allocator. No lock: what it knows is replaced as a whole."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._noted: _Mark | None = None
        self._newest: _Sample | None = None
        self._pair: _Sample | None = None
        """The newest reading whose mark was the same afterwards."""
        self._completed: tuple[DeviceReading, _Sample, DeviceReading] | None = None
        """What was completed last, with which pair, and the result: mostly asked for again, within one period."""

    def read(self, reader: DeviceReader) -> _Sample:
        """Asks the device."""
        before, begun = self._noted, self._clock()
        self._newest = sample = _Sample(reader.read(), begun, before)
        return sample

    def note(self, allocator: AllocatorReading) -> None:
        noted, newest = self._noted, self._newest
        reserved, allocations = allocator.reserved_bytes, allocator.device_allocations
        if noted is None or noted.reserved_bytes != reserved or noted.device_allocations != allocations:
            self._noted = noted = _Mark(reserved, allocations)
        if newest is not None and newest.before == noted:
            self._pair = newest

    def complete(self, reading: DeviceReading) -> DeviceReading:
        """Returns a reading with what follows from the newest one that belongs to a reading of the allocator."""
        pair = self._pair
        if pair is None or pair.before is None or self._clock() - pair.begun > MAX_PAIR_SECONDS:
            return reading
        done = self._completed
        if done is not None and done[0] is reading and done[1] is pair:
            return done[2]
        reserved, free, process = pair.before.reserved_bytes, pair.reading.free_bytes, pair.reading.process_bytes
        found = replace(
            reading,
            non_torch_bytes=None if process is None or process < reserved else process - reserved,
            free_and_reserved_bytes=None if free is None else free + reserved,
        )
        self._completed = reading, pair, found
        return found


class _Run(Protocol):
    """What lies between a start and a stop."""

    @property
    def pairs(self) -> _Pairs: ...

    def reading(self) -> DeviceReading | None: ...

    def stop(self) -> None: ...


class _DirectRun:
    """Reads the device when asked, on the asking thread."""

    def __init__(self, open_reader: Callable[[], DeviceReader], clock: Callable[[], float]) -> None:
        self._reader = _open_or_log(open_reader)
        self.pairs = _Pairs(clock)

    def reading(self) -> DeviceReading | None:
        return None if self._reader is None else self.pairs.read(self._reader).reading

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.close()


class _ThreadRun:
    """One life of the sampling thread, which holds this and nothing of the sampler.

    What it knows is replaced as a whole, so that readers need no lock.
    """

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
        self.pairs = _Pairs(clock)
        self._newest: _Sample | None = None
        self._fault: BaseException | None = None
        self._has_begun = threading.Event()
        self._at_work = threading.Lock()
        """Held until the thread is to end. A lock, since `let_go` runs inside the collector, on any thread: an Event
        would wait there for a lock of its own, which that very thread may hold."""
        self._at_work.acquire()
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

    def let_go(self) -> None:
        """Tells the thread to end, without waiting for it or for anything else."""
        with suppress(RuntimeError):  # it was told already
            self._at_work.release()

    def stop(self) -> None:
        self.let_go()
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
            pause = 0.0
            while not self._at_work.acquire(timeout=pause):
                self._newest = self.pairs.read(reader)
                self._has_begun.set()
                pause = self._period


def _open_or_log(open_reader: Callable[[], DeviceReader]) -> DeviceReader | None:
    try:
        return open_reader()
    except DeviceUnavailable as reason:
        logger.warning("no device readings: %s", reason)
        return None
