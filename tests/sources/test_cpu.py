"""Memory events of the CPU, from torch's real profiler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from laws.surroundings import operators_are_recorded
from nothing_left import recorders_of_torch
from torch.profiler import ProfilerActivity, profile

from memtrace.sources import recording_torch_private
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window

SIZE = 4096


PLACES = ("_prepare_profiler", "_enable_profiler", "_enable_record_function", "_disable_profiler")
"""What torch is asked for as a recording begins and ends."""


class Interrupts:
    """A function in whose place Ctrl-C comes once, before or after it."""

    def __init__(self, function: Callable[..., Any], *, after: bool) -> None:
        self._function, self._after = function, after
        self.is_due = False

    def __call__(self, *args: Any) -> Any:
        if self.is_due and self._after:
            self.is_due = False
            self._function(*args)
            raise KeyboardInterrupt
        if self.is_due:
            self.is_due = False
            raise KeyboardInterrupt
        return self._function(*args)


@pytest.fixture
def source() -> Iterator[CpuEvents]:
    source = CpuEvents()
    yield source
    source.abandon()


def changes(window: Window, nbytes: int = SIZE) -> list[int]:
    """The signs of the changes of blocks of one size, in order."""
    return [1 if event.delta > 0 else -1 for event in window.events if abs(event.delta) == nbytes]


def block(nbytes: int = SIZE) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@contextmanager
def recorded_by_torch(without: int | None = None) -> Iterator[list[Any]]:
    """Yields a list that gets the nodes of torch's recording when it ends, of which memtrace does not get one."""
    disable, nodes = torch.autograd._disable_profiler, []  # type: ignore[attr-defined]

    def stop() -> object:
        nodes.extend(disable().experimental_event_tree())
        left = [node for position, node in enumerate(nodes) if position != without]
        return SimpleNamespace(experimental_event_tree=lambda: left)

    with mock.patch.object(torch.autograd, "_disable_profiler", stop):
        yield nodes


class TestWindow:
    """What a window has in it."""

    def test_allocations_and_frees(self, source: CpuEvents) -> None:
        """Address, size and time of each; the address is the storage's."""
        before_ns = time.time_ns()
        assert source.open()
        tensor = block()
        address = tensor.untyped_storage().data_ptr()
        del tensor
        window = source.close()
        assert window.complete
        assert window.live_at_begin is None
        seen = [event for event in window.events if abs(event.delta) == SIZE]
        assert [(event.address, event.delta) for event in seen] == [(address, SIZE), (address, -SIZE)]
        assert before_ns <= window.begin_ns <= seen[0].time_ns <= seen[1].time_ns <= window.end_ns <= time.time_ns()

    def test_blocks_of_operators_that_are_recorded_all_the_same(self, source: CpuEvents) -> None:
        """Somebody has switched operators on again: their blocks lie below them, and are found in their order."""
        assert source.open()
        first = block()
        torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]
        second = block().add(1).reshape(64, 64)
        del first
        window = source.close()
        assert changes(window) == [1, 1, 1, -1, -1]
        assert second.untyped_storage().data_ptr() in {event.address for event in window.events}
        assert [event.time_ns for event in window.events] == sorted(event.time_ns for event in window.events)

    def test_the_profilers_own_count_changes_by_each_events_size(self, source: CpuEvents) -> None:
        """Where it began is not told."""
        with recorded_by_torch() as nodes:
            assert source.open()
            kept = [block(size) for size in (100, 200, 300)]
            del kept[1]
            window = source.close()
        totals = [node.extra_fields.total_allocated for node in nodes]
        steps = [after - before for before, after in pairwise(totals)]
        assert steps == [event.delta for event in window.events[1:]]
        assert window.complete

    @pytest.mark.parametrize("lost", [1, 2, 3])
    def test_a_lost_event_shows(self, source: CpuEvents, lost: int) -> None:
        """The profiler's own count knows of it."""
        with recorded_by_torch(without=lost):
            assert source.open()
            kept = [block(size) for size in (100, 200, 300, 400)]
            del kept[1]
            window = source.close()
        assert len(window.events) == 4
        assert not window.complete

    def test_events_are_in_order_of_time(self, source: CpuEvents) -> None:
        """Also those of a backward pass."""
        weight = torch.ones(32, 32, requires_grad=True)
        assert source.open()
        for _ in range(3):
            (weight @ weight).tanh().sum().backward()
        times = [event.time_ns for event in source.close().events]
        assert times == sorted(times)

    def test_a_block_from_before_has_no_event(self) -> None:
        """The ledger must tell that it died. In a process of its own: the profiler keeps sizes of earlier windows."""
        code = (
            "import torch; from memtrace.sources.cpu import CpuEvents;"
            f"tensor = torch.empty({SIZE}, dtype=torch.uint8); source = CpuEvents(); assert source.open();"
            "del tensor; print([event.delta for event in source.close().events])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_torch_writes_nothing_of_it(self) -> None:
        """Neither Kineto's lines nor the allocator's warning; level and environment are as before.

        Where the user has chosen Kineto's level, it stays.
        """
        code = (
            "import os, torch; from memtrace.sources import recording_torch_private as torch_private;"
            "from memtrace.sources.cpu import CpuEvents; level = torch_private._log_level(); before = level.value;"
            f"tensor = torch.empty({SIZE}, dtype=torch.uint8); source = CpuEvents(); environment = dict(os.environ);"
            "assert source.open(); print(level.value); del tensor; source.close();"
            "print(before, level.value, dict(os.environ) == environment)"
        )
        environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
        silent, chosen = (
            subprocess.run(
                [sys.executable, "-c", code], env=environment | own, capture_output=True, text=True, check=True
            )
            for own in ({}, {"KINETO_LOG_LEVEL": "0"})
        )
        assert (silent.stdout, silent.stderr) == ("2\n1 1 True\n", "")
        assert chosen.stdout == silent.stdout
        assert "Completed Stage: Collection" in chosen.stderr

    def test_a_block_that_outlives_the_window(self, source: CpuEvents) -> None:
        """Its free is seen in the next window, where there is one."""
        assert source.open()
        tensor = block()
        assert changes(source.close()) == [1]
        assert source.open()
        del tensor
        assert changes(source.close()) == [-1]

    def test_other_threads_are_not_seen(self, source: CpuEvents) -> None:
        """A thread of the user's allocates for itself."""
        assert source.open()
        other = threading.Thread(target=block)
        other.start()
        other.join()
        assert changes(source.close()) == []

    def test_it_ends_with_its_thread_at_the_latest(self, source: CpuEvents) -> None:
        """That window is lost; later ones, and profiles of the user, are as before."""
        opened: list[bool] = []
        other = threading.Thread(target=lambda: opened.append(source.open()))
        other.start()
        other.join()
        assert opened == [True]
        assert source._thread is None
        assert not source.close().complete
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            block().add(1)
        assert "aten::add" in {event.key for event in profiler.key_averages()}
        assert source.open()
        kept = block()
        assert changes(source.close()) == [1]
        del kept

    def test_each_window_of_a_thread_that_stays(self, source: CpuEvents) -> None:
        """The second recording on it is not taken for one that ends with the thread."""
        lengths: list[list[int]] = []

        def twice() -> None:
            for _ in range(2):
                assert source.open()
                kept = block()
                lengths.append(changes(source.close()))
                del kept

        other = threading.Thread(target=twice)
        other.start()
        other.join()
        assert lengths == [[1], [1]]

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("place", PLACES)
    def test_ctrl_c_inside_torch(
        self, source: CpuEvents, place: str, after: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before and after each call that begins or ends a recording: what is left comes off, the next one begins."""
        interrupts = Interrupts(getattr(torch.autograd, place), after=after)
        monkeypatch.setattr(torch.autograd, place, interrupts)
        for end in (source.close, source.abandon):
            interrupts.is_due = True
            with pytest.raises(KeyboardInterrupt):
                if source.open():
                    end()
            assert not interrupts.is_due
            source.abandon()
            assert recorders_of_torch() == {}
            assert source.open()
            kept = block()
            assert changes(source.close()) == [1]
            del kept
            assert operators_are_recorded()

    def test_an_empty_window(self, source: CpuEvents) -> None:
        """Nothing happened."""
        assert source.open()
        window = source.close()
        assert changes(window) == []
        assert window.complete

    def test_one_window_at_a_time(self, source: CpuEvents) -> None:
        """Opening an open one does nothing."""
        assert source.open()
        assert not source.open()
        assert source.is_open
        source.close()
        assert not source.is_open

    def test_an_abandoned_window_is_forgotten(self, source: CpuEvents) -> None:
        """And another one can be opened; abandoning twice does nothing."""
        assert source.open()
        kept = block()
        source.abandon()
        source.abandon()
        assert not source.is_open
        assert source.open()
        assert changes(source.close()) == []
        del kept

    def test_there_are_no_counters(self, source: CpuEvents) -> None:
        """The CPU's allocator keeps none."""
        assert source.reading() is None


def operators(profiler: profile) -> set[str]:
    return {event.key for event in profiler.key_averages()}


class TestOtherProfilers:
    """There is one profiler in a process."""

    def test_operators_are_recorded_again_afterwards(self, source: CpuEvents) -> None:
        """They are switched off only while a window is open."""
        for end in (source.close, source.abandon):
            assert source.open()
            end()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                block().add(1)
            assert "aten::add" in operators(profiler)

    def test_the_user_was_first(self, source: CpuEvents) -> None:
        """No window, and their profile has everything."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            assert not source.open()
            block().add(1)
        assert not source.is_open
        assert "aten::add" in operators(profiler)

    def test_another_source_was_first(self, source: CpuEvents) -> None:
        """Two tracers: the second one waits for its turn."""
        second = CpuEvents()
        assert source.open()
        assert not second.open()
        source.close()
        assert second.open()
        second.close()

    @pytest.mark.parametrize("end", ["close", "abandon"])
    def test_the_user_comes_second(self, source: CpuEvents, end: str) -> None:
        """The window is given up; what follows is in their profile."""
        assert source.open()
        assert not source.interrupted()
        profiler = profile(activities=[ProfilerActivity.CPU])
        profiler.start()
        assert source.interrupted()
        if end == "close":
            window = source.close()
            assert not window.complete
            assert not window.events
        else:
            source.abandon()
        block().add(1)
        profiler.stop()
        assert "aten::add" in operators(profiler)
        assert source.open()

    def test_the_user_comes_and_goes_inside_the_window(self, source: CpuEvents) -> None:
        """Nobody records any more: the window is lost, and nothing else is stopped."""
        assert source.open()
        with profile(activities=[ProfilerActivity.CPU]):
            block()
        assert not source.close().complete
        assert source.open()
        assert source.close().complete


def test_a_torch_without_these_calls(source: CpuEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs the traces, not the run."""
    monkeypatch.delattr(torch.autograd, "_prepare_profiler")
    assert not source.open()
    with pytest.raises(recording_torch_private.ProfilerUnavailable, match=torch.__version__.replace("+", r"\+")):
        recording_torch_private.start_memory_profiler()
    assert not recording_torch_private.profiler_is_recording()
