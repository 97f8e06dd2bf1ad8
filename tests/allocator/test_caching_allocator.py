"""The allocator model: cases worked by hand from the rules of CUDACachingAllocator.cpp, and what must always hold."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrace.allocator.caching_allocator import CachingAllocator, replay, round_size
from memtrace.allocator.settings import AllocatorSettings
from memtrace.errors import PlanError
from memtrace.record.units import GIB, KIB, MIB
from memtrace.sources.events import Event

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def allocator(*sizes: int, settings: AllocatorSettings | None = None) -> CachingAllocator:
    """An allocator that has given out blocks of these sizes, by their position."""
    made = CachingAllocator(settings)
    for key, size in enumerate(sizes):
        made.allocate(key, size)
    return made


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 512), (512, 512), (513, 1024), (1000, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_sizes_are_multiples_of_512(asked: int, given: int) -> None:
    """Every request is rounded up to a multiple of 512 bytes, at least 512."""
    assert allocator(asked).allocated_bytes == given == round_size(asked)
    assert allocator(asked).requested_bytes == asked


@pytest.mark.parametrize(
    ("asked", "divisions", "given"),
    [
        (1200 * KIB, 4, 1280 * KIB),  # torch's own example: 1024, 1280, 1536, 1792 between 1024 and 2048
        (1280 * KIB, 4, 1280 * KIB),
        (1025 * KIB, 1, 1025 * KIB),
        (5 * GIB, 8, 5 * GIB),
        (5 * GIB + 1, 8, 5 * GIB + GIB // 2),
        (1100, 4, 1536),  # at most 4 x 512 bytes: the usual rule
    ],
)
def test_roundup_divides_the_space_between_powers_of_two(asked: int, divisions: int, given: int) -> None:
    """With roundup_power2_divisions a size goes up to the next step between two powers of two."""
    assert round_size(asked, divisions) == given


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # the largest small request
        (MIB + 1, 20 * MIB),
        (10 * MIB - 1, 10 * MIB),  # rounds up to 10 MiB, which is no longer below 10 MiB
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (21 * MIB, 22 * MIB),
        (GIB, GIB),
    ],
)
def test_segments(asked: int, reserved: int) -> None:
    """Small requests share 2 MiB, those below 10 MiB share 20 MiB, larger ones have multiples of 2 MiB."""
    assert allocator(asked).reserved_bytes == reserved


class TestSegmentPools:
    def test_small_requests_share_a_segment(self) -> None:
        """2 MiB hold four blocks of 512 KiB, and the fifth needs a second segment."""
        assert allocator(*[512 * KIB] * 4).reserved_bytes == 2 * MIB
        assert allocator(*[512 * KIB] * 5).reserved_bytes == 4 * MIB

    def test_the_rest_of_a_large_segment_is_used(self) -> None:
        """20 MiB hold three blocks of 6 MiB; the 2 MiB that are left take one of 2 MiB."""
        assert allocator(6 * MIB, 6 * MIB, 6 * MIB, 2 * MIB).reserved_bytes == 20 * MIB

    def test_a_rest_of_up_to_1_mib_goes_along(self) -> None:
        """In the large pool a rest of 1 MiB is not worth splitting: the block keeps it."""
        kept = allocator(GIB)
        kept.free(0)
        kept.allocate("smaller", GIB - MIB)
        assert kept.allocated_bytes == GIB
        kept.free("smaller")
        kept.allocate("smaller still", GIB - MIB - 512)
        assert kept.allocated_bytes == GIB - MIB - 512

    def test_a_rest_of_512_bytes_is_kept_in_the_small_pool(self) -> None:
        """In the small pool every rest is worth splitting."""
        filled = allocator(MIB, MIB - 512, 512)
        assert filled.allocated_bytes == filled.reserved_bytes == 2 * MIB

    def test_the_smallest_block_that_fits_is_taken(self) -> None:
        """Of free blocks of 40, 30 and 50 MiB a request of 25 MiB takes the one of 30 MiB."""
        made = allocator(40 * MIB, 30 * MIB, 50 * MIB)
        places = [made.address_range(key) for key in range(3)]
        for key in range(3):
            made.free(key)
        made.allocate("new", 25 * MIB)
        assert made.address_range("new").start == places[1].start
        assert made.reserved_bytes == 120 * MIB

    def test_of_equal_blocks_the_one_with_the_lowest_address_is_taken(self) -> None:
        """Ties between sizes are broken by address."""
        made = allocator(30 * MIB, 30 * MIB)
        first = made.address_range(0)
        made.free(1)
        made.free(0)
        made.allocate("new", 30 * MIB)
        assert made.address_range("new") == first

    def test_free_neighbours_merge(self) -> None:
        """Three blocks of 6 MiB that are freed in any order make room for one of 18 MiB."""
        for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
            made = allocator(6 * MIB, 6 * MIB, 6 * MIB)
            for key in order:
                made.free(key)
            made.allocate("whole", 18 * MIB)
            assert made.reserved_bytes == 20 * MIB

    def test_blocks_of_two_segments_do_not_merge(self) -> None:
        """Two free segments of 30 MiB do not hold 60 MiB: that is fragmentation."""
        made = allocator(30 * MIB, 30 * MIB)
        made.free(0)
        made.free(1)
        made.allocate("both", 60 * MIB)
        assert made.reserved_bytes == 120 * MIB

    def test_pools_do_not_mix(self) -> None:
        """A free block of 20 MiB does not serve a small request."""
        made = allocator(5 * MIB)
        made.free(0)
        made.allocate("small", KIB)
        assert made.reserved_bytes == 22 * MIB

    def test_reserved_stays_after_a_free_and_the_cache_can_be_emptied(self) -> None:
        """What is freed stays reserved; empty_cache gives back the segments that are wholly free."""
        made = allocator(30 * MIB, 6 * MIB, 6 * MIB, KIB)
        made.free(0)
        made.free(1)
        assert (made.allocated_bytes, made.reserved_bytes) == (6 * MIB + KIB, 52 * MIB)
        made.empty_cache()
        assert made.reserved_bytes == 22 * MIB
        made.free(2)
        made.free(3)
        made.empty_cache()
        assert made.reserved_bytes == 0

    def test_empty_storages_take_no_block(self) -> None:
        """Torch does not ask the allocator for 0 bytes."""
        made = allocator(0)
        made.free(0)
        assert made.reserved_bytes == 0

    def test_peaks_are_kept(self) -> None:
        """The high-water marks survive frees."""
        made = allocator(30 * MIB)
        made.free(0)
        made.allocate("small", 512)
        assert (made.peak_allocated_bytes, made.peak_reserved_bytes) == (30 * MIB, 32 * MIB)


def test_the_second_of_two_equal_steps_can_reserve_more() -> None:
    """Best fit depends on what is cached: a plan has to look at the second step.

    Step 1 puts 1.5 and 11 MiB into one segment of 20 MiB and 10 MiB into another. In step 2 the best fit for the 1.5
    MiB is the segment of 10 MiB, and for the 10 MiB nothing is left but 9 MiB of the first.
    """
    made, reserved = CachingAllocator(), []
    for _ in range(2):
        for key, size in enumerate((3 * MIB // 2, 11 * MIB, 10 * MIB)):
            made.allocate(key, size)
        reserved.append(made.reserved_bytes)
        for key in range(3):
            made.free(key)
    assert reserved == [30 * MIB, 40 * MIB]


class TestSplitLimit:
    LIMITED = AllocatorSettings(max_split_size=100 * MIB)

    def test_large_blocks_are_not_split(self) -> None:
        """A block of 200 MiB is not given to a request of 50 MiB."""
        made = allocator(200 * MIB, settings=self.LIMITED)
        made.free(0)
        made.allocate("smaller", 50 * MIB)
        assert made.reserved_bytes == 250 * MIB

    def test_large_requests_take_blocks_that_are_a_little_larger(self) -> None:
        """A request of 181 MiB takes the block of 200 MiB whole; one of 180 MiB leaves 20 MiB and does not."""
        made = allocator(200 * MIB, settings=self.LIMITED)
        made.free(0)
        made.allocate("close", 181 * MIB)
        assert (made.allocated_bytes, made.reserved_bytes) == (200 * MIB, 200 * MIB)
        made.free("close")
        made.allocate("further", 180 * MIB)
        assert (made.allocated_bytes, made.reserved_bytes) == (180 * MIB, 380 * MIB)


class TestExpandableSegments:
    def test_a_segment_grows_by_pages(self) -> None:
        """The large pool grows by 20 MiB pages, and a block may lie over several."""
        made = allocator(30 * MIB, settings=EXPANDABLE)
        assert made.reserved_bytes == 40 * MIB
        made.allocate("rest", 10 * MIB)
        assert made.reserved_bytes == 40 * MIB
        made.allocate("more", 21 * MIB)
        assert made.reserved_bytes == 80 * MIB

    def test_small_pages_are_2_mib(self) -> None:
        """The small pool grows by 2 MiB."""
        assert allocator(MIB, MIB, KIB, settings=EXPANDABLE).reserved_bytes == 4 * MIB

    def test_blocks_next_to_each_other_merge_across_pages(self) -> None:
        """What fragments segments does not fragment one that grows: 30 + 30 MiB hold 60 MiB."""
        made = allocator(30 * MIB, 30 * MIB, settings=EXPANDABLE)
        made.free(0)
        made.free(1)
        made.allocate("both", 60 * MIB)
        assert made.reserved_bytes == 60 * MIB

    def test_the_free_end_of_the_segment_is_extended(self) -> None:
        """A request that the free end does not hold takes it and maps only what is missing."""
        made = allocator(30 * MIB, 10 * MIB, settings=EXPANDABLE)
        made.free(1)
        made.allocate("longer", 29 * MIB)
        assert made.reserved_bytes == 60 * MIB

    def test_every_rest_is_split_off(self) -> None:
        """Where segments grow, a rest of 512 bytes is worth splitting in the large pool, too."""
        made = allocator(20 * MIB, settings=EXPANDABLE)
        made.free(0)
        made.allocate("smaller", 20 * MIB - 512)
        assert made.allocated_bytes == 20 * MIB - 512

    def test_a_block_that_cannot_grow_comes_first(self) -> None:
        """The free end counts as large as it can grow to: a larger block elsewhere is the better fit."""
        made = allocator(15 * MIB, 2 * MIB, 33 * MIB, 10 * MIB, settings=EXPANDABLE)
        inner = made.address_range(0)
        made.free(0)
        made.free(3)
        made.allocate("new", 9 * MIB)
        assert made.address_range("new").start == inner.start

    def test_emptying_gives_back_whole_pages_and_they_are_mapped_again(self) -> None:
        """Pages inside a free block go back; the next request fills the hole before the end grows."""
        made = allocator(50 * MIB, 10 * MIB, settings=EXPANDABLE)
        made.free(0)
        made.empty_cache()
        assert made.reserved_bytes == 20 * MIB
        made.allocate("again", 45 * MIB)
        assert made.address_range("again").start < made.address_range(1).start
        assert made.reserved_bytes == 60 * MIB


def test_replay_counts_after_each_event() -> None:
    """The counters stand beside the events: allocations add, frees subtract, reserved stays."""
    events = [Event(1, 7, 1000), Event(2, 8, 3 * MIB), Event(3, 7, -1000), Event(4, 8, -3 * MIB)]
    result = replay(events, CachingAllocator())
    assert result.requested_bytes == [1000, 1000 + 3 * MIB, 3 * MIB, 0]
    assert result.allocated_bytes == [1024, 1024 + 3 * MIB, 3 * MIB, 0]
    assert result.reserved_bytes == [2 * MIB, 22 * MIB, 22 * MIB, 22 * MIB]
    assert result.peak_reserved_bytes == 22 * MIB


def test_an_address_cannot_be_allocated_twice() -> None:
    """Two blocks at one address are a mistake of the caller."""
    with pytest.raises(PlanError, match="in use"):
        replay([Event(1, 7, 1000), Event(2, 7, 1000)], CachingAllocator())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_split_size": 20 * MIB}, "above 20 MiB"),
        ({"max_non_split_rounding": 1}, "at least 20 MiB"),
        ({"roundup_power2_divisions": 3}, "power of two"),
        ({"roundup_power2_divisions": (0,) * 15 + (6,)}, "power of two"),
        ({"garbage_collection_threshold": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_torch_refuses(wrong: dict[str, Any], said: str) -> None:
    """Limits that torch does not accept are named."""
    with pytest.raises(PlanError, match=said):
        AllocatorSettings(**wrong)


SIZES = st.one_of(
    st.integers(1, 4 * KIB), st.integers(1, 2 * MIB), st.integers(MIB, 30 * MIB), st.sampled_from([MIB, 10 * MIB])
)
ACTIONS = st.lists(st.one_of(SIZES, st.integers(-40, 0)), max_size=80)
CONFIGURATIONS = st.sampled_from(
    [
        AllocatorSettings(),
        EXPANDABLE,
        AllocatorSettings(max_split_size=21 * MIB),
        AllocatorSettings(roundup_power2_divisions=4),
        AllocatorSettings(expandable_segments=True, max_split_size=21 * MIB),
    ]
)


@given(actions=ACTIONS, configuration=CONFIGURATIONS)
def test_invariants(actions: list[int], configuration: AllocatorSettings) -> None:
    """Whatever is allocated, freed and emptied: blocks do not overlap, counters add up, and all comes back."""
    made = CachingAllocator(configuration)
    live: dict[int, int] = {}
    for key, action in enumerate(actions):
        if action > 0:
            made.allocate(key, action)
            live[key] = action
        elif action == 0:
            made.empty_cache()
        elif live:
            freed = list(live)[action % len(live)]
            made.free(freed)
            del live[freed]
        blocks = sorted((made.address_range(key) for key in live), key=lambda block: block.start)
        assert all(left.stop <= right.start for left, right in pairwise(blocks))
        assert made.requested_bytes == sum(live.values())
        assert made.allocated_bytes == sum(map(len, blocks))
        assert made.requested_bytes <= made.allocated_bytes <= made.reserved_bytes <= made.peak_reserved_bytes
        assert all(len(made.address_range(key)) >= size for key, size in live.items())
    for key in live:
        made.free(key)
    assert (made.requested_bytes, made.allocated_bytes) == (0, 0)
    made.empty_cache()
    assert made.reserved_bytes == 0
