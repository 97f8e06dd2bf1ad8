"""From a snapshot to a recording of what the allocator was asked for, with what each block was for."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set

from memtrace.allocator.blocks import segment_size
from memtrace.allocator.caching_allocator import round_size
from memtrace.allocator.recording import MAX_BLOCK, MAX_STREAMS, AllocatorRecording, label_columns
from memtrace.allocator.settings import INTERVALS, AllocatorSettings, parse_settings
from memtrace.errors import ConfigError, LogFormatError
from memtrace.forensics.attribution.joined import attribute
from memtrace.forensics.history import History, read_history
from memtrace.forensics.places import place_of
from memtrace.forensics.snapshot import AllocatorSnapshot, Segment
from memtrace.forensics.trace import UNKNOWN, Trace
from memtrace.record.readings.snapshot_reading import Source

_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


def as_recording(snapshot: AllocatorSnapshot, device: int | None = None, origin: str = "") -> AllocatorRecording:
    """Returns what the allocator of one device was asked for, as far as the history goes.

    Where a request failed, the history ends there, with the last one that did. What lies in private pools (CUDA graphs)
    is left out: no setting changes it.

    Args:
        snapshot: with a history.
        device: its index; None for the first one with a history.
        origin: what was recorded, for people.

    Raises:
        ConfigError: the snapshot has no history of that device, or is of another allocator.
        LogFormatError: there is no history at all, or it has too many streams.
    """
    recorded = [index for index, trace in enumerate(snapshot.traces) if len(trace)]
    if not recorded:
        raise LogFormatError(
            f"{origin}: the snapshot has no history of what was allocated: call "
            "torch.cuda.memory._record_memory_history() before the model is built"
        )
    if device is not None and device not in recorded:
        known = ", ".join(map(str, recorded))
        raise ConfigError(f"{origin}: the snapshot has no history of device {device}, only of {known}")
    index = recorded[0] if device is None else device
    history, trace = read_history(snapshot, index), snapshot.trace(index)
    settings = _settings(snapshot.settings, history.segments)
    failure = history.failures[-1] if history.failures else None
    end = history.end if failure is None else failure.position
    private = _PrivatePools(history.segments, trace)
    blocks = _blocks(history, private, end)
    limit, peak, begun = _reserved(history.segments, trace, private, history.left_out)
    names, labels = label_columns(_labels(snapshot, history, blocks))
    streams = _streams(history, trace, blocks, origin)
    lives = [history.timeline.lifetimes[number] for number in blocks]
    before = sum(life.begin < 0 for life in lives)
    failed = None if failure is None else failure.requested
    return AllocatorRecording(
        sizes_at_begin=array("q", (life.nbytes for life in lives[:before])),
        events=_events(history, blocks, end, _collected(history, trace, blocks, settings)),
        settings=settings,
        origin=", ".join(_origin(origin, index, history.left_out)),
        from_the_start=not begun and not before and not history.left_out,
        limit_bytes=limit,
        peak_reserved_bytes=peak,
        failed_bytes=failed if failed is not None and 0 < failed < MAX_BLOCK else None,
        names=names,
        labels=labels,
        addresses=array("q", (life.address for life in lives)),
        streams=streams,
    )


def _origin(origin: str, device: int, left_out: int) -> Iterator[str]:
    if origin:
        yield origin
    yield f"device {device}"
    if left_out:
        yield f"without its oldest {left_out:,} entries"


class _PrivatePools:
    """Which addresses belong to private pools: by the entry (torch 2.13), else by the segments at the end."""

    def __init__(self, segments: Sequence[Segment], trace: Trace) -> None:
        self._rows = trace.pools
        self._ranges = sorted((segment.address, segment.size) for segment in segments if segment.pool)
        self._begins = [address for address, _ in self._ranges]

    def have(self, row: int, address: int) -> bool:
        """Returns whether an address is one of theirs."""
        if row in self._rows:
            return True
        at = bisect_right(self._begins, address) - 1
        return at >= 0 and address < sum(self._ranges[at])


def _blocks(history: History, private: _PrivatePools, end: int) -> list[int]:
    """Returns the lifetimes that are replayed: those from before the history by address, then in their order."""
    kept = [
        number
        for number, life in enumerate(history.timeline.lifetimes)
        if life.begin < end and 0 < life.nbytes < MAX_BLOCK and not private.have(history.rows[number], life.address)
    ]
    lifetimes = history.timeline.lifetimes
    return sorted(kept, key=lambda number: (lifetimes[number].begin, lifetimes[number].address))


def _events(history: History, blocks: Sequence[int], end: int, collected: Set[int]) -> Sequence[int]:
    """Returns the events up to a position, with an emptied cache wherever less is reserved than before.

    Args:
        history: of the device.
        blocks: the lifetimes that are replayed, in order.
        end: the position.
        collected: where less may be reserved since the allocator has collected garbage, as its model does.
    """
    at = array("q", bytes(8 * end))
    for number, block in enumerate(blocks):
        life = history.timeline.lifetimes[block]
        if life.begin >= 0:
            at[life.begin] = life.nbytes
        if life.end is not None and life.end < end:
            at[life.end] = -number - 1
    reserved = history.reserved
    events = array("q")
    for position, event in enumerate(at):
        if position and reserved[position] < reserved[position - 1] and position not in collected:
            events.append(0)
        if event:
            events.append(event)
    return events


def _collected(history: History, trace: Trace, blocks: Sequence[int], settings: str) -> Set[int]:
    """Returns the positions of blocks for which a segment was made, where garbage is collected before that."""
    made = trace.words.get("segment_alloc")
    if parse_settings(settings).garbage_collection_threshold is None or made is None:
        return frozenset()
    return {
        history.timeline.lifetimes[block].begin
        for block in blocks
        if (row := history.rows[block]) > 0 and trace.actions[row - 1] == made
    }


def _labels(snapshot: AllocatorSnapshot, history: History, blocks: Sequence[int]) -> Iterator[str]:
    """Yields what each block was for, as far as somebody can tell, and where it was allocated."""
    found, places = attribute(history, snapshot.stacks, None), {UNKNOWN: ""}
    for number in blocks:
        label, stack = found.label(number), history.stacks[number]
        if stack not in places:
            places[stack] = place_of(snapshot.stacks[stack])
        words = "" if label.source is Source.NONE else " ".join(part for part in label[:3] if part)
        yield ", ".join(part for part in (words, places[stack]) if part)


def _streams(history: History, trace: Trace, blocks: Sequence[int], origin: str) -> Sequence[int]:
    """Returns the stream of each block as a small number, 0 for that of the failed request; empty where all are of one.

    Raises:
        LogFormatError: there are more than `MAX_STREAMS`.
    """
    listed = {block.address: segment.stream for segment in history.segments for block in segment.blocks}
    numbers = {trace.streams[row]: 0 for row in [_failed_row(trace, history.left_out)] if row is not None}
    found = array("q")
    for number in blocks:
        row, life = history.rows[number], history.timeline.lifetimes[number]
        stream = trace.streams[row] if row >= 0 else listed.get(life.address)
        found.append(0 if stream is None else numbers.setdefault(stream, len(numbers)))
    if len(numbers) > MAX_STREAMS:
        raise LogFormatError(f"{origin}: the history has {len(numbers):,} streams; up to {MAX_STREAMS:,} are replayed")
    return found if any(found) else ()


def _failed_row(trace: Trace, first: int) -> int | None:
    code = trace.words.get("oom")
    rows = range(len(trace) - 1, first - 1, -1)
    return None if code is None else next((row for row in rows if trace.actions[row] == code), None)


def _reserved(
    segments: Sequence[Segment], trace: Trace, private: _PrivatePools, first: int
) -> tuple[int | None, int, int]:
    """Returns what could be reserved, the most that was before the last failure, and what was at the begin.

    Private pools are left out, and so are entries before the first one that is replayed. What could be is known where
    a request failed.
    """
    signs = {trace.words[word]: sign for word, sign in _GROWS.items() if word in trace.words}
    failed = _failed_row(trace, first)
    end = len(trace) if failed is None else failed
    moved = highest = then = 0
    for row, action in enumerate(memoryview(trace.actions)[first:], first):
        if row == end:
            then = moved
        if action in signs and not private.have(row, trace.addresses[row]):
            moved += signs[action] * trace.sizes[row]
            if row < end:
                highest = max(highest, moved)
    begun = max(sum(segment.size for segment in segments if not segment.pool) - moved, 0)
    free = UNKNOWN if failed is None else trace.device_free.get(failed, UNKNOWN)
    if failed is None or free == UNKNOWN:
        return None, begun + highest, begun
    wanted = segment_size(round_size(max(trace.sizes[failed], 1)))
    # A device that has enough, and is not asked: set_per_process_memory_fraction is the limit.
    return begun + then + (free if free < wanted else 0), begun + highest, begun


def _settings(found: Mapping[str, object], segments: Sequence[Segment]) -> str:
    """Returns the settings that the allocator says it had; where it does not say, what its segments show."""
    text = next((value for name in _CONF if isinstance(value := found.get(name), str) and value), "")
    if text:
        parse_settings(text)
    if "expandable_segments" not in found:
        return text or ("expandable_segments:True" if any(segment.expandable for segment in segments) else "")
    split, threshold = found.get("max_split_size"), found.get("garbage_collection_threshold")
    split = split if type(split) is int and 0 < split < MAX_BLOCK else None
    try:
        return AllocatorSettings(
            expandable_segments=found["expandable_segments"] is True,
            max_split_size=split,
            roundup_power2_divisions=tuple(_divisions(found.get("roundup_power2_divisions"))),
            garbage_collection_threshold=threshold if isinstance(threshold, float) and threshold > 0 else None,
        ).text
    except ValueError as error:
        raise ConfigError(f"the allocator's settings in the snapshot cannot be read: {error}") from error


def _divisions(found: object) -> Iterator[int]:
    for at in range(INTERVALS):
        value = found.get(str(1 << at), 0) if isinstance(found, dict) else 0
        yield value if type(value) is int and value >= 0 else 0
