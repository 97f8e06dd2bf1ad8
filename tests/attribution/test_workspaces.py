"""What cuBLAS keeps, told by its sizes: in windows made by hand, in recorded ones and at a failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_cuda import FakeAllocator

from memtrace.attribution.hidden import WORKSPACE, stream_of, tag_workspaces
from memtrace.attribution.timeline import StepMarks, Timeline, replay
from memtrace.oom.composition import StepFacts, from_blocks
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment, Phase
from memtrace.record.units import MIB
from memtrace.sources.cuda.allocator import stream_memory
from memtrace.sources.cuda.cublas import configured_sizes
from memtrace.sources.cuda.source import CudaEvents, parse_window
from memtrace.sources.events import Block, Event, Events, StreamMemory, Tag, TagEvent, Window

TRACES = Path(__file__).parents[1] / "fixtures" / "gpu" / "traces"
WEIGHTS = Tag(Category.WEIGHTS, "trainable", "float32")
HOPPER = configured_sizes(9, {})
SIZE = 32 * MIB
END = 1000


def at_the_end(
    *events: tuple[int, int, int], live: Sequence[Block] = (), tags: Sequence[TagEvent] = ()
) -> dict[str, int]:
    """Returns the entries at the end of a step over a window, as `category/component`."""
    window = Window(
        begin_ns=0, end_ns=END, events=Events.of(Event(*event) for event in events), live_at_begin=live, resolution_ns=1
    )
    timeline = replay(window, (), tags)
    tag_workspaces(timeline.lifetimes, HOPPER)
    return shown(timeline)


def shown(timeline: Timeline) -> dict[str, int]:
    marks = StepMarks(begin_ns=timeline.change_ns[0] - 1, end_ns=timeline.change_ns[-1], phases=())
    found = timeline.moments(marks)[Moment.STEP_END]
    assert found.total_bytes == found.allocated_bytes
    return {f"{key.category}/{key.component}": size for key, size in found.entries.items()}


def test_a_block_of_each_thread_is_a_workspace() -> None:
    """One that was there before, and one that the first backward pass of the window makes."""
    assert at_the_end((110, 2, SIZE), live=[Block(1, SIZE)]) == {"workspaces/cublas": 2 * SIZE}


def test_a_leak_of_the_same_size_still_shows() -> None:
    """There are no more workspaces than threads that multiply; the third block is unattributed."""
    found = at_the_end((110, 3, SIZE), live=[Block(1, SIZE), Block(2, SIZE)])
    assert found["workspaces/cublas"] == 2 * SIZE
    assert sum(size for name, size in found.items() if name.startswith("unattributed/")) == SIZE


def test_what_is_claimed_or_freed_or_of_another_size_is_none() -> None:
    """A weight of that size is a weight, what the step frees is its own, and a size that cuBLAS has not is nobody's."""
    found = at_the_end(
        (110, 3, SIZE),
        (120, 3, -SIZE),
        live=[Block(1, SIZE), Block(2, SIZE + 512)],
        tags=[TagEvent(50, 1, SIZE, WEIGHTS)],
    )
    assert found == {"weights/trainable": SIZE, "unattributed/outside": SIZE + 512}


@pytest.mark.parametrize(("name", "lt"), [("llama", 0), ("tiny", MIB)])
def test_the_workspaces_of_a_recorded_run_are_found(name: str, lt: int) -> None:
    """On an H200: 32 MiB for the loop's thread and for autograd's, and cuBLASLt's where products have a bias."""
    trace = json.loads((TRACES / f"{name}.json").read_text(encoding="utf-8"))
    timeline = replay(parse_window(trace["snapshot"], 0, 0, 2**62, ()), (), ())
    tag_workspaces(timeline.lifetimes, HOPPER)
    assert shown(timeline)["workspaces/cublas"] == 2 * SIZE + lt


GB, SIDE, COPIES = 10**9, 7, 9
"""Address of what most memory is for, and two further streams."""


def on_streams(patch: pytest.MonkeyPatch, *, within: Sequence[tuple[int, int, int]]) -> dict[str, int]:
    """A step of a run whose default stream and stream `SIDE` multiply, and whose stream `COPIES` does not.

    Two threads have a workspace on each of the first two, which is what autograd does with products of a side stream.

    Args:
        patch: puts the stand-in allocator in the place of torch's.
        within: (address, bytes, stream) of what is allocated within the step and stays.
    """
    allocator = FakeAllocator().install(patch)
    allocator.allocate(GB, GB)
    for number, stream in enumerate((0, 0, SIDE, SIDE)):
        allocator.allocate(10 * GB + number * SIZE, SIZE, stream)
    source = CudaEvents(0)
    assert source.open()
    allocator.allocate(3 * GB, SIZE, COPIES)  # a batch of the size, which is given back
    for address, size, stream in within:
        allocator.allocate(address, size, stream)
    allocator.free(3 * GB)
    window = source.close()
    assert window.complete
    timeline = replay(window, [TagEvent(0, GB, GB, WEIGHTS)], ())
    tag_workspaces(timeline.lifetimes, HOPPER, window.streams)
    return shown(timeline)


def test_each_thread_has_a_workspace_on_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of two streams, by the segments' streams; without them two would be nobody's."""
    found = on_streams(monkeypatch, within=())
    assert found == {"weights/trainable": GB, "workspaces/cublas": 4 * SIZE}


def test_a_batch_that_is_fetched_ahead_is_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream that only copies, and on one that multiplies too: what a step makes there and leaves is nobody's.

    So is a third block of the size on the stream of the training.
    """
    ahead = [(20 * GB, SIZE, COPIES), (21 * GB, SIZE, SIDE), (22 * GB, SIZE, 0)]
    found = on_streams(monkeypatch, within=ahead)
    assert found.pop("workspaces/cublas") == 4 * SIZE
    assert found.pop("weights/trainable") == GB
    assert sum(found.values()) == 3 * SIZE


def test_a_training_on_a_stream_of_its_own_has_them_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most memory is for it: what its first products make within a window counts there, and not elsewhere."""
    allocator = FakeAllocator().install(monkeypatch)
    allocator.allocate(GB, GB, SIDE)
    source = CudaEvents(0)
    assert source.open()
    for number, stream in enumerate((SIDE, SIDE, 0)):
        allocator.allocate(10 * GB + number * SIZE, SIZE, stream)
    window = source.close()
    timeline = replay(window, [TagEvent(0, GB, GB, WEIGHTS)], ())
    tag_workspaces(timeline.lifetimes, HOPPER, window.streams)
    found = shown(timeline)
    assert found.pop("workspaces/cublas") == 2 * SIZE
    assert sum(found.values()) == GB + SIZE


def test_segments_of_other_devices_and_forms_say_nothing_of_streams() -> None:
    """Streams of another device have numbers of their own; versions of torch that tell no stream have one for all."""
    ours = {"device": 0, "address": 100, "total_size": 50, "stream": 0}
    side = {"device": 0, "address": 300, "total_size": 50, "stream": SIDE}
    assert stream_memory([side, ours], 0) == [(100, 150, 0), (300, 350, SIDE)]
    assert not stream_memory([ours, {**side, "device": 1}], 0)
    assert not stream_memory([ours, {"device": 0, "address": 300, "total_size": 50}, "nonsense"], 0)
    assert not stream_memory(None, 0)
    assert stream_of(149, stream_memory([side, ours], 0)) == 0
    assert stream_of(349, stream_memory([side, ours], 0)) == SIDE


def test_without_products_there_is_nothing_to_tag() -> None:
    """A CPU lists no sizes, and nothing of any size is a workspace there."""
    window = Window(begin_ns=0, end_ns=END, events=Events.of([Event(5, 1, SIZE)]), live_at_begin=None, resolution_ns=1)
    timeline = replay(window, (), ())
    tag_workspaces(timeline.lifetimes, ())
    assert all(life.tag is None for life in timeline.lifetimes)


def test_a_failure_finds_them_by_the_same_rule() -> None:
    """Of three blocks of that size at an out-of-memory error two are workspaces, the third was there before."""
    blocks = [Block(address, SIZE) for address in (1, 2, 3)]
    holdings, _ = from_blocks(blocks, (), (), StepFacts(phase=Phase.OUTSIDE), HOPPER)
    keys = [holding.key for holding in holdings]
    assert keys.count(EntryKey(*WORKSPACE)) == 2
    assert keys.count(EntryKey(Category.UNATTRIBUTED, Phase.OUTSIDE, "")) == 1
    streams = [StreamMemory(1, 3, 0), StreamMemory(3, 4, SIDE)]
    holdings, _ = from_blocks(blocks, (), (), StepFacts(phase=Phase.OUTSIDE), HOPPER, streams=streams)
    assert {holding.key for holding in holdings} == {EntryKey(*WORKSPACE)}


@pytest.mark.parametrize(
    ("major", "environment", "expected"),
    [
        (9, {}, [SIZE, SIZE, MIB, MIB]),
        (8, {}, [8_519_680, 8_519_680, MIB, MIB]),
        (9, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, [SIZE, SIZE, MIB, MIB]),
        (9, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, [131_072, 131_072, MIB, MIB]),
        (8, {"CUBLAS_WORKSPACE_CONFIG": "nonsense", "CUBLASLT_WORKSPACE_SIZE": "0"}, [8_519_680, 8_519_680]),
        (9, {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "CUBLASLT_WORKSPACE_SIZE": "76"}, [77_824, 77_824]),
    ],
)
def test_sizes_are_those_of_the_device_or_of_the_environment(
    major: int, environment: dict[str, str], expected: list[int]
) -> None:
    """Pairs of KiB and counts for cuBLAS, KiB for cuBLASLt; what torch cannot read changes nothing."""
    assert list(configured_sizes(major, environment)) == expected
