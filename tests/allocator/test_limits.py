"""What the allocator does where the device has no more: collects, gives back what is cached, tries again, fails."""

from __future__ import annotations

from memtrace.allocator.caching_allocator import CachingAllocator
from memtrace.allocator.settings import AllocatorSettings
from memtrace.record.units import GIB, MIB

GROWS = AllocatorSettings(expandable_segments=True)


def filled(settings: AllocatorSettings, limit: int, *sizes: int) -> CachingAllocator:
    """An allocator that had blocks of these sizes at once, and has them cached."""
    made = CachingAllocator(settings, limit=limit)
    for key, size in enumerate(sizes):
        assert made.allocate(key, size)
    for key in range(len(sizes)):
        made.free(key)
    return made


def test_what_is_cached_is_given_back_for_a_request() -> None:
    """One retry: both cached segments go, and the request is served."""
    made = filled(AllocatorSettings(), 100 * MIB, 40 * MIB, 50 * MIB)
    assert made.allocate("new", 60 * MIB)
    assert (made.retries, made.reserved_bytes) == (1, 60 * MIB)
    assert made.peak_reserved_bytes == 90 * MIB


def test_a_segment_with_one_block_in_use_stays() -> None:
    """That is what fragments: 48 of 50 MiB are free, nobody gets them, and the request fails."""
    made = CachingAllocator(limit=60 * MIB)
    made.allocate("large", 50 * MIB)
    made.free("large")
    made.allocate("pin", 2 * MIB)
    assert not made.allocate("new", 50 * MIB)
    assert made.retries == 1
    assert made.device.wanted_bytes == 100 * MIB
    assert made.allocated_bytes == 2 * MIB
    assert made.allocate("smaller", 48 * MIB)


def test_growing_segments_give_back_pages() -> None:
    """The same with expandable segments: the pages after the pin are given back, or grow with the request."""
    made = CachingAllocator(GROWS, limit=80 * MIB)
    made.allocate("large", 50 * MIB)
    made.free("large")
    made.allocate("pin", 2 * MIB)
    assert made.allocate("new", 50 * MIB)
    assert (made.retries, made.reserved_bytes) == (0, 60 * MIB)


def test_pages_come_back_from_another_pool() -> None:
    """A large request gets what the small pool has cached."""
    made = filled(GROWS, 40 * MIB, *[MIB] * 20)
    assert made.reserved_bytes == 20 * MIB
    assert made.allocate("large", 30 * MIB)
    assert (made.retries, made.reserved_bytes) == (1, 40 * MIB)


def test_blocks_that_may_not_be_split_go_first() -> None:
    """With a limit on splits the smallest block above it that is large enough is given back, and no more."""
    settings = AllocatorSettings(max_split_size=100 * MIB)
    made = filled(settings, 550 * MIB, 150 * MIB, 300 * MIB, 90 * MIB)
    assert made.allocate("new", 200 * MIB)
    assert (made.retries, made.reserved_bytes) == (0, 440 * MIB)
    made = filled(settings, 300 * MIB, 150 * MIB, 110 * MIB)
    assert made.allocate("new", 220 * MIB)  # no single block is large enough: the largest ones, until they are
    assert (made.retries, made.reserved_bytes) == (0, 220 * MIB)


def test_garbage_is_collected_before_the_limit() -> None:
    """Above the threshold what was not used for longest goes before new memory is asked for."""
    settings = AllocatorSettings(garbage_collection_threshold=0.5)
    made = CachingAllocator(settings, limit=GIB)
    for key, size in enumerate((300, 310, 30)):
        made.allocate(key, size * MIB)
    made.free(0)
    for _ in range(5):  # 310 MiB are used again and again, 300 are not
        made.free(1)
        made.allocate(1, 310 * MIB)
    made.free(1)
    made.allocate("new", 400 * MIB)
    assert made.reserved_bytes == (310 + 30 + 400) * MIB
    assert made.retries == 0


def test_without_a_limit_nothing_is_collected() -> None:
    """There is nothing that a threshold could be a share of, as in a process that sets no fraction."""
    made = CachingAllocator(AllocatorSettings(garbage_collection_threshold=0.1))
    made.allocate(0, 300 * MIB)
    made.free(0)
    made.allocate(1, 400 * MIB)
    assert made.reserved_bytes == 700 * MIB


def test_a_stream_has_pools_of_its_own() -> None:
    """What one stream has freed another does not get, but the device is one: a retry empties both."""
    made = CachingAllocator(limit=100 * MIB)
    block = made.take(40 * MIB, 1)
    assert block is not None
    made.give_back(block)
    assert made.take(40 * MIB, 2) is not None
    assert made.reserved_bytes == 80 * MIB
    assert made.take(50 * MIB, 2) is not None
    assert (made.retries, made.reserved_bytes) == (1, 90 * MIB)


def test_an_address_space_ends() -> None:
    """More than any device has is served by nobody, also where there is no limit."""
    made = CachingAllocator(GROWS)
    assert [made.allocate(key, 1 << 44) for key in range(5)] == [True] * 2 + [False] * 3
    assert made.allocate("small", MIB)
