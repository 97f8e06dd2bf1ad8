"""Blocks that no Python object refers to, told by the sizes that their owner says they have."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from memtrace.attribution.timeline import Lifetime
from memtrace.record.categories import Category
from memtrace.sources.events import StreamMemory, Tag, TagEvent

WORKSPACE = Tag(Category.WORKSPACES, "cublas", "")

_DEFAULT_STREAM = 0
_begin = itemgetter(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenBuffers:
    """What an engine says about buffers of its own that it shows nobody. Sizes are bytes."""

    tag: Tag
    first: Sequence[int]
    """The buffers that it began with."""
    current: Sequence[int] | None
    """The buffers that it has now, with the same sum; None where it does not say yet, or still has the first ones."""
    settled: bool = True
    """Whether it has the buffers that it will keep, though it may not say yet how large each of them is."""

    @property
    def nbytes(self) -> int:
        """What the buffers of now take together."""
        return sum(self.first if self.current is None else self.current)


def tag_hidden(lifetimes: Sequence[Lifetime], hidden: HiddenBuffers) -> None:
    """Tags the blocks that are the hidden buffers.

    A block is one of them where nobody else claims it and it has the size of one; the one that lived longest where
    several have. Where the sizes of now are not known, blocks that were allocated one after the other, outlive the
    window and add up to the sum are taken.
    """
    tagged = _tag_sizes(lifetimes, hidden.first, hidden.tag)
    if hidden.current is not None:
        _tag_sizes(lifetimes, hidden.current, hidden.tag)
    elif any(life.end is not None for life in tagged):
        _tag_run(lifetimes, sum(hidden.first), hidden.tag)


def tag_workspaces(lifetimes: Sequence[Lifetime], sizes: Sequence[int], streams: Sequence[StreamMemory] = ()) -> None:
    """Tags the blocks that cuBLAS keeps.

    A block is one of them where nobody claims it, it outlives the window and it has the size of one: at most one block
    for each size listed, on each stream, so that a leak of that size still shows. The oldest are taken. On another
    stream than that which most memory is for, only blocks that were there before the window: there a batch is fetched
    ahead, which outlives a window, and not two.

    Args:
        lifetimes: the blocks of a window, after all else was tagged.
        sizes: of the workspaces that there can be on a stream, in bytes; see `memtrace.sources.cuda.cublas`.
        streams: which memory is for which stream, where it is for several.
    """
    lasting = [life for life in lifetimes if life.end is None and life.tag is None and life.nbytes in sizes]
    main = main_stream(streams)
    by_stream: dict[int, list[Lifetime]] = {}
    for life in lasting:
        stream = stream_of(life.address, streams)
        if stream == main or life.begin < 0:
            by_stream.setdefault(stream, []).append(life)
    for candidates in by_stream.values():
        _tag_sizes(candidates, sizes, WORKSPACE)


def main_stream(streams: Sequence[StreamMemory]) -> int:
    """Returns the stream that most memory is for: that of the training."""
    sizes: Counter[int] = Counter()
    for begin, end, stream in streams:
        sizes[stream] += end - begin
    return max(sizes, key=sizes.__getitem__, default=_DEFAULT_STREAM)


def stream_of(address: int, streams: Sequence[StreamMemory]) -> int:
    """Returns the stream that the memory at an address is for; the main one where nobody tells."""
    index = bisect_right(streams, address, key=_begin) - 1
    if index >= 0 and address < streams[index].end:
        return streams[index].stream
    return main_stream(streams)


def known_hidden(owners: Sequence[HiddenBuffers]) -> list[TagEvent]:
    """Returns the buffers of now as blocks at made-up addresses, for a source that cannot list what exists.

    Without those that are about to be replaced: the source would not tell that they are given back.
    """
    kept = [hidden for hidden in owners if hidden.settled]
    known = [(size, hidden.tag) for hidden in kept for size in hidden.current or hidden.first]
    return [TagEvent(0, -1 - position, size, tag) for position, (size, tag) in enumerate(known)]


def _tag_sizes(lifetimes: Sequence[Lifetime], sizes: Sequence[int], tag: Tag) -> list[Lifetime]:
    tagged = []
    for size in sizes:
        candidates = [life for life in lifetimes if life.tag is None and life.nbytes == size]
        if candidates:
            longest = max(candidates, key=_age)
            longest.tag = tag
            tagged.append(longest)
    return tagged


def _tag_run(lifetimes: Sequence[Lifetime], total: int, tag: Tag) -> None:
    lasting = [life for life in lifetimes if life.tag is None and life.end is None and life.begin >= 0]
    for start in range(len(lasting)):
        reached = 0
        for stop in range(start, len(lasting)):
            reached += lasting[stop].nbytes
            if reached == total:
                for life in lasting[start : stop + 1]:
                    life.tag = tag
                return
            if reached > total:
                break


def _age(life: Lifetime) -> tuple[float, int]:
    """Orders by how long a block lived; of those that outlive the window the oldest comes last."""
    return (float("inf") if life.end is None else life.end - life.begin), -life.begin
