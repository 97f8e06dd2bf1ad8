"""The sampling thread: with readers that a test holds in its hand, and with a driver that hangs."""

import gc
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
from stub_nvml import StubProcess

from memtrace.errors import DeviceUnavailable
from memtrace.record.breakdown import AllocatorReading, DeviceReading
from memtrace.sources.devices.host import CpuDevice, refreshed
from memtrace.sources.devices.sampler import THREAD_NAME, DeviceSampler

HOUR = 3600.0
GPU = "device GPU-1111 Stub\ntotal 1000\nfree 1000\n"


class CountingReader:
    """Reads 1, 2, 3, ... bytes; the reading number `stuck_at` blocks until released."""

    def __init__(self, stuck_at: int | None = None) -> None:
        self.readings = 0
        self.closed_by: list[str] = []
        self.is_stuck = threading.Event()
        self.release = threading.Event()
        self._stuck_at = stuck_at

    def read(self) -> DeviceReading:
        self.readings += 1
        if self.readings == self._stuck_at:
            self.is_stuck.set()
            self.release.wait()
        return DeviceReading(used_bytes=self.readings)

    def close(self) -> None:
        self.closed_by.append(threading.current_thread().name)


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert not sampling_threads()
    yield
    assert not sampling_threads()


class TestSampling:
    def test_the_first_reading_is_there_after_start(self) -> None:
        """A device that answers has a reading as soon as start returns."""
        sampler = DeviceSampler(CpuDevice, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        reading = sampler.reading()
        sampler.stop()
        assert reading is not None and reading.process_bytes

    def test_readings_follow_one_another(self) -> None:
        """Each period brings a new reading."""
        reader = CountingReader(stuck_at=5)
        sampler = DeviceSampler(lambda: reader, period_seconds=0.001, patience_seconds=HOUR)
        sampler.start()
        reader.is_stuck.wait()
        assert sampler.reading() == DeviceReading(used_bytes=4)
        reader.release.set()
        sampler.stop()

    def test_starting_twice(self) -> None:
        """A second start opens nothing and adds no thread."""
        readers = iter([CountingReader()])
        sampler = DeviceSampler(lambda: next(readers), period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        sampler.start()
        threads = sampling_threads()
        sampler.stop()
        assert len(threads) == 1

    def test_the_thread_closes_the_device(self) -> None:
        """Stop, once or twice, ends the thread, which closes the device once."""
        reader = CountingReader()
        sampler = DeviceSampler(lambda: reader, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        sampler.stop()
        sampler.stop()
        assert reader.closed_by == [THREAD_NAME]
        assert not sampling_threads()

    def test_no_reading_after_stop(self) -> None:
        """What was read before a stop is not shown after it."""
        sampler = DeviceSampler(CountingReader, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        sampler.stop()
        assert sampler.reading() is None

    def test_starting_again(self) -> None:
        """A start after a stop opens the device anew."""
        sampler = DeviceSampler(CountingReader, period_seconds=HOUR, patience_seconds=HOUR)
        for _ in range(2):
            sampler.start()
            assert sampler.reading() == DeviceReading(used_bytes=1)
            sampler.stop()

    def test_the_thread_ends_with_its_sampler(self) -> None:
        """A sampler that is dropped without a stop, as with a tracer that nobody detached, leaves no thread behind."""
        reader = CountingReader()
        sampler = DeviceSampler(lambda: reader, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        (thread,) = sampling_threads()
        del sampler
        gc.collect()
        thread.join()
        assert reader.closed_by == [THREAD_NAME]

    def test_a_sampler_may_be_dropped_on_its_own_thread(self) -> None:
        """The collector runs on any thread, that of the sampler included, and waits for none."""
        dropped: list[DeviceSampler] = []

        class DroppingReader(CountingReader):
            def read(self) -> DeviceReading:
                ready.wait()
                dropped.clear()
                gc.collect()
                return super().read()

        ready = threading.Event()
        dropped.append(DeviceSampler(DroppingReader, period_seconds=HOUR, patience_seconds=0.0))
        dropped[0].start()
        (thread,) = sampling_threads()
        ready.set()
        thread.join()


class TestDropped:
    def test_a_sampler_that_nobody_stops(self) -> None:
        """Its thread does not keep it, ends by itself and closes the device; dropping it waits for nothing."""
        reader = CountingReader(stuck_at=2)
        sampler = DeviceSampler(lambda: reader, period_seconds=0.001, patience_seconds=HOUR)
        sampler.start()
        reader.is_stuck.wait()
        (thread,) = sampling_threads()
        gone = weakref.ref(sampler)
        del sampler
        gc.collect()
        assert gone() is None
        assert not reader.closed_by
        reader.release.set()
        thread.join()
        assert reader.closed_by == [THREAD_NAME]

    def test_dropped_after_stop(self) -> None:
        """Nothing is left to end."""
        sampler = DeviceSampler(CountingReader, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        sampler.stop()
        del sampler
        gc.collect()


def allocator(reserved: int, moved: int = 1) -> AllocatorReading:
    return AllocatorReading(allocated_bytes=0, reserved_bytes=reserved, device_allocations=moved)


class TestPairs:
    """A reading of the device belongs to the allocator's where that was the same before and after."""

    class Reader(CountingReader):
        def read(self) -> DeviceReading:
            super().read()
            return DeviceReading(free_bytes=50, process_bytes=30)

    def sampler(self) -> DeviceSampler:
        """One that asks the device when it is asked itself."""
        self.now = 0.0
        sampler = DeviceSampler(self.Reader, period_seconds=0, clock=lambda: self.now)
        sampler.start()
        return sampler

    def figures(self, sampler: DeviceSampler) -> tuple[int | None, int | None]:
        reading = sampler.reading()
        assert reading is not None
        return reading.non_torch_bytes, reading.free_and_reserved_bytes

    def test_the_allocator_was_the_same(self) -> None:
        """They are subtracted, and stand for the readings after them until they are too old."""
        sampler = self.sampler()
        sampler.note(allocator(20))
        assert self.figures(sampler) == (None, None)
        sampler.note(allocator(20))
        assert self.figures(sampler) == (10, 70)
        sampler.note(allocator(25, moved=2))
        assert self.figures(sampler) == (10, 70)
        self.now += 301
        assert self.figures(sampler) == (None, None)

    @pytest.mark.parametrize("after", [allocator(25, moved=2), allocator(20, moved=2)])
    def test_it_has_moved_in_between(self, after: AllocatorReading) -> None:
        """Also where it got memory and gave as much back."""
        sampler = self.sampler()
        sampler.note(allocator(20))
        self.figures(sampler)
        sampler.note(after)
        assert self.figures(sampler) == (None, None)

    def test_before_the_allocator_has_said_anything(self) -> None:
        """Nobody knows what it held."""
        sampler = self.sampler()
        self.figures(sampler)
        sampler.note(allocator(20))
        assert self.figures(sampler) == (None, None)


class TestStaleness:
    @pytest.mark.parametrize(("period", "limit"), [(0.001, 10.0), (1.0, 10.0), (60.0, 300.0)])
    def test_age(self, period: float, limit: float) -> None:
        """A reading counts for five periods and at least 10 s, from when the device was asked."""
        now = 100.0
        reader = CountingReader(stuck_at=2)
        sampler = DeviceSampler(lambda: reader, period_seconds=period, clock=lambda: now, patience_seconds=HOUR)
        sampler.start()
        now = 100.0 + limit
        fresh = sampler.reading()
        now = 100.5 + limit
        stale = sampler.reading()
        reader.release.set()
        sampler.stop()
        assert fresh == DeviceReading(used_bytes=1)
        assert stale is None

    def test_a_reading_that_took_long(self) -> None:
        """An answer that the driver gave after longer than that is old when it comes."""
        now = 100.0

        class SlowReader(CountingReader):
            def read(self) -> DeviceReading:
                nonlocal now
                now += 11
                return super().read()

        sampler = DeviceSampler(SlowReader, period_seconds=2.0, clock=lambda: now, patience_seconds=HOUR)
        sampler.start()
        reading = sampler.reading()
        sampler.stop()
        assert reading is None


class TestHanging:
    def test_a_hang_while_reading(self, stub_driver: StubProcess) -> None:
        """Stop leaves a thread that hangs in the driver behind; released, it closes the device itself."""
        stub_driver.says(GPU)
        alive, reading = stub_driver.run(f"""
            sampler = DeviceSampler(partial(open_device, "cuda", "1111"), period_seconds=0.001, patience_seconds=0.02)
            sampler.start()
            thread, = (thread for thread in threading.enumerate() if thread.name == {THREAD_NAME!r})
            says({GPU!r} + "hang nvmlDeviceGetMemoryInfo_v2")
            while not hanging():
                thread.join(0.001)
            sampler.stop()
            result = thread.is_alive(), sampler.reading()
            says({GPU!r})
            thread.join()
        """)
        assert alive
        assert reading is None

    def test_a_hang_while_opening(self, stub_driver: StubProcess) -> None:
        """A driver that hangs when it is first asked does not hold up start."""
        alive, reading = stub_driver.run(f"""
            says({GPU!r} + "hang nvmlInitWithFlags")
            sampler = DeviceSampler(partial(open_device, "cuda", "1111"), period_seconds=1, patience_seconds=0.02)
            sampler.start()
            thread, = (thread for thread in threading.enumerate() if thread.name == {THREAD_NAME!r})
            result = thread.is_alive(), sampler.reading()
            sampler.stop()
            says({GPU!r})
            thread.join()
        """)
        assert alive
        assert reading is None


class TestFaults:
    def test_a_device_that_is_not_available(self, caplog: pytest.LogCaptureFixture) -> None:
        """The reason is logged once, and there are no readings."""

        def unavailable() -> CountingReader:
            raise DeviceUnavailable("no driver")

        sampler = DeviceSampler(unavailable, period_seconds=0.001, patience_seconds=HOUR)
        with caplog.at_level(logging.WARNING, logger="memtrace"):
            sampler.start()
            sampler.stop()
        assert sampler.reading() is None
        assert [record.getMessage() for record in caplog.records] == ["no device readings: no driver"]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_an_error_of_our_own(self) -> None:
        """An error that no device explains ends the thread and is raised to whoever asks for the reading."""

        class Broken(CountingReader):
            def read(self) -> DeviceReading:
                raise KeyError("a fault of memtrace")

        sampler = DeviceSampler(Broken, period_seconds=HOUR, patience_seconds=HOUR)
        sampler.start()
        with pytest.raises(RuntimeError, match="error of its own") as caught:
            sampler.reading()
        sampler.stop()
        assert isinstance(caught.value.__cause__, KeyError)


class TestOnDemand:
    def test_a_period_of_zero(self) -> None:
        """Without a period there is no thread: each question is a reading of its own."""
        reader = CountingReader()
        sampler = DeviceSampler(lambda: reader, period_seconds=0)
        sampler.start()
        readings = [sampler.reading(), sampler.reading()]
        threads = sampling_threads()
        sampler.stop()
        assert readings == [DeviceReading(used_bytes=1), DeviceReading(used_bytes=2)]
        assert not threads
        assert reader.closed_by == [threading.current_thread().name]
        assert sampler.reading() is None


class TestFork:
    @pytest.mark.parametrize("period", [0.001, 0])
    def test_a_forked_child(self, stub_driver: StubProcess, period: float) -> None:
        """A child has no thread and no reading of its parent; it can start, read and stop by itself."""
        stub_driver.says(GPU)
        inherited, threads, started, references, parent = stub_driver.run(f"""
            sampler = DeviceSampler(
                partial(open_device, "cuda", "1111"), period_seconds={period}, patience_seconds={HOUR}
            )
            sampler.start()
            answers, answer = os.pipe()
            if (pid := os.fork()) == 0:
                child = [sampler.reading(), threading.active_count()]
                sampler.stop()
                sampler.start()
                child.append(sampler.reading().total_bytes)
                sampler.stop()
                os.write(answer, json.dumps([*child, references()]).encode())
                os._exit(0)
            os.waitpid(pid, 0)
            result = [*json.loads(os.read(answers, 1000)), sampler.reading().total_bytes]
            sampler.stop()
        """)
        assert inherited is None
        assert threads == 1
        assert started == parent == 1000
        assert references == 1, "the count of the parent that the child has inherited, and none of its own"


def test_what_a_process_holds_is_read_anew_where_that_is_cheap() -> None:
    """Between two readings of the thread: a leak of short steps shows in each of their records."""
    held = iter(range(100, 103))
    sampler = DeviceSampler(
        CpuDevice,
        period_seconds=HOUR,
        patience_seconds=HOUR,
        refresh=lambda reading: replace(reading, process_bytes=next(held)),
    )
    sampler.start()
    try:
        readings = [sampler.reading() for _ in range(3)]
    finally:
        sampler.stop()
    assert [reading and reading.process_bytes for reading in readings] == [100, 101, 102]
    assert len({reading and reading.total_bytes for reading in readings}) == 1
    before = refreshed(CpuDevice().read()).process_bytes
    kept = bytearray(os.urandom(1 << 20) * 64)  # touched, so that it is resident
    assert (refreshed(DeviceReading(process_bytes=1)).process_bytes or 0) - (before or 0) > len(kept) // 2
