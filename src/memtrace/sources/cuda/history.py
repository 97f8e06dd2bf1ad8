"""The history of CUDA's caching allocator: from the entries of its ring to a window of events on our clock.

The time of an event is the processor's counter, which torch scales to microseconds by one line from its import to the
snapshot: right at the snapshot, and off by more, the longer ago the event was. Listing segments writes an entry
`snapshot` into the ring. Such an entry, with our clock beside it, tells how far off events are at that instant; from
there to the snapshot it is a straight line. What came after the beginning is told by its place in the ring, not by its
time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import itemgetter
from typing import Any, NamedTuple

from memtrace.errors import LogFormatError
from memtrace.sources.cuda.allocator import live_blocks, segments, stream_memory
from memtrace.sources.events import Block, Events, Window

MARKS = 2
"""Entries that say the time of a beginning: the first one's call may have been interrupted."""

_US = 1000
_TAIL_NS = 40_000
"""What torch takes, at most, from writing an entry to the end of a call that lists nothing: more than 10 us on the
H200's machine. Before writing it measures its clock for 0.1 ms: the end of the call is near the entry, the begin is
not. Events that come out too early by so much meet their tags all the same; any that came out late would not."""
_FAR_NS = 50_000_000
"""An entry that is this far from a mark is another's: in the time of one step the clocks do not part so much."""
_NO_POOL_HAS_THIS = (1, 1)
"""An id that torch never gives: it counts its own pools and the user's in one half each, with 0 in the other."""

_SNAPSHOT = "snapshot"
_CHANGES = frozenset({"alloc", "free_completed"})
_action = itemgetter("action")
_fields = itemgetter("time_us", "addr", "size")

History = Sequence[Mapping[str, Any]]


class Beginning(NamedTuple):
    """What wrote into the ring when a window began: marks, if torch can list nothing, and then the list of blocks."""

    begin_ns: int
    """Before the first of them."""
    marks_ns: tuple[int, ...]
    """When each mark had been written, each within `_TAIL_NS` unless the thread was interrupted."""


class _Place(NamedTuple):
    """Where in the ring a window begins."""

    start: int
    """Index of the first entry after the beginning."""
    time_us: int
    offset_ns: int
    """What is added to the time of an event there. With it, none is later than it was."""


def mark_beginning(*, empty: bool) -> Beginning:
    """Writes marks into the ring; the caller lists the blocks next, on the same thread.

    Args:
        empty: whether the ring has nothing in it yet.
    """
    begin_ns = time.time_ns()
    listed = (segments(_NO_POOL_HAS_THIS, empty_history=empty) for _ in range(MARKS))
    marks = [time.time_ns() for found in listed if found is not None]
    return Beginning(begin_ns, tuple(marks))


def parse_window(
    snapshot: Mapping[str, Any],
    device_index: int,
    begin_ns: int,
    end_ns: int,
    live_at_begin: Sequence[Block],
    *,
    beginning: Beginning | None = None,
) -> Window:
    """Returns the window that a snapshot with history describes.

    The history must reach back to the beginning, and lead from the blocks live then to those live in the snapshot;
    where it does not, events were lost and `complete` is False.

    Args:
        snapshot: what `torch.cuda.memory._snapshot()` returns.
        device_index: the device whose history is read.
        begin_ns: when `live_at_begin` had been listed. Tells what came after in a history without `snapshot` entries.
        end_ns: when the snapshot had been taken.
        live_at_begin: the blocks that were live at the beginning.
        beginning: what was written into the ring then; None where that is not known.

    Raises:
        LogFormatError: this is not a snapshot.
    """
    history, actions = _readable(history_of(snapshot, device_index))
    lists = [*compress(range(len(actions)), [action == _SNAPSHOT for action in actions])]
    place = None if beginning is None else _place(history, lists, beginning)
    lost = place is None and beginning is not None and bool(lists)
    start = _since(history, begin_ns) if place is None else place.start
    actions = actions[start:]
    wanted = [action in _CHANGES for action in actions]
    rows = [*map(_fields, compress(history[start:], wanted))]
    freed = [action != "alloc" for action in compress(actions, wanted)]
    events = Events(
        _times(rows, place, end_ns),
        [address for _, address, _ in rows],
        [-size if free else size for (_, _, size), free in zip(rows, freed, strict=True)],
    )
    live = dict(live_at_begin)
    for address, delta in zip(events.addresses, events.deltas, strict=True):
        if delta > 0:
            live[address] = delta
        else:
            live.pop(address, None)
    segments_now = snapshot.get("segments", ())
    return Window(
        begin_ns=begin_ns,
        end_ns=end_ns,
        events=events,
        live_at_begin=tuple(live_at_begin),
        resolution_ns=_US if place is None or not place.offset_ns else _TAIL_NS + 3 * _US,
        streams=stream_memory(segments_now, device_index),
        complete=not lost and live == dict(live_blocks(segments_now, device_index)),
    )


def history_of(snapshot: object, device_index: int) -> Sequence[Any]:
    """Returns the entries of one device's history, oldest first; none where the snapshot does not know the device.

    Raises:
        LogFormatError: this is not a snapshot.
    """
    traces = snapshot.get("device_traces") if isinstance(snapshot, Mapping) else None
    if not isinstance(traces, Sequence):
        raise LogFormatError("a CUDA snapshot must have a list 'device_traces', got none: is it from _snapshot()?")
    history = traces[device_index] if device_index < len(traces) else ()
    return history if isinstance(history, Sequence) else ()


def _readable(history: Sequence[Any]) -> tuple[History, list[Any]]:
    """Returns the entries that have the form that is known, and their actions.

    They are looked at one by one only where one of them has another: fields come and go between versions of torch.
    """
    try:
        actions = [*map(_action, history)]
        rows = [*map(_fields, compress(history, [action in _CHANGES for action in actions]))]
        if not {type(part) for row in rows for part in row} - {int} and all(size > 0 for _, _, size in rows):
            return history, actions
    except (KeyError, TypeError, IndexError):
        pass
    known = [*_known(history)]
    return known, [*map(_action, known)]


def _known(history: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    for entry in history:
        action = entry.get("action") if isinstance(entry, Mapping) else None
        if action == _SNAPSHOT:
            yield entry
        elif isinstance(action, str) and action in _CHANGES:
            time_us, address, size = entry.get("time_us"), entry.get("addr"), entry.get("size")
            if isinstance(time_us, int) and isinstance(address, int) and isinstance(size, int) and size > 0:
                yield entry


def _place(history: History, lists: Sequence[int], beginning: Beginning) -> _Place | None:
    """Returns where the marks of a beginning and the list after them are; None where they are not.

    Of several that could be them, those nearest in time are: a user's history has those of earlier windows.
    """
    marks, around, nearest = len(beginning.marks_ns), beginning.begin_ns, None
    for last in range(marks, len(lists)):
        entries = [history[index] for index in lists[last - marks : last + 1]]
        times = [time_us for entry in entries if isinstance(time_us := entry.get("time_us"), int)]
        if len(times) < len(entries) or any(entry.get("size") != 0 for entry in entries[:marks]):
            continue
        if abs(times[0] * _US - around) > (_FAR_NS if nearest is None else abs(nearest.time_us * _US - around)):
            continue
        ends = zip(beginning.marks_ns, times, strict=False)
        offset = min((end_ns - time_us * _US for end_ns, time_us in ends), default=None)
        nearest = _Place(lists[last] + 1, times[0], 0 if offset is None else offset - _TAIL_NS)
    return nearest


def _since(history: History, begin_ns: int) -> int:
    """Returns how many entries at the front are from before an instant; its microsecond is after it."""
    for index, entry in enumerate(history):
        time_us = entry.get("time_us")
        if isinstance(time_us, int) and (time_us + 1) * _US > begin_ns:
            return index
    return len(history)


def _times(rows: Sequence[tuple[int, int, int]], place: _Place | None, end_ns: int) -> list[int]:
    """Returns when each event was, in nanoseconds of our clock."""
    if place is None or not place.offset_ns:
        return [time_us * _US for time_us, _, _ in rows]
    end_us, offset = end_ns // _US, place.offset_ns
    length = max(1, end_us - place.time_us)
    return [(time_us - 1) * _US + offset * max(0, end_us - time_us) // length for time_us, _, _ in rows]
