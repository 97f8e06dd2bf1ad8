"""A snapshot of an allocator: its segments, its history of each device, and the settings it had.

It is read by the fields that are used, with those that torch 2.1 to 2.15 give them; what is added is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memtrace.errors import LogFormatError
from memtrace.forensics.rows import MAX_DEVICES, Rows, pool_name
from memtrace.forensics.trace import UNKNOWN, Stacks, Trace

MAX_BLOCKS = 500_000
"""Blocks and segments. A device of 144 GB with nothing but small blocks of 300 KB has as many."""

_BLOCK_BYTES = 250
_LARGEST = (1 << 63) - 1
_LIVE = frozenset({"active_allocated", "active_awaiting_free", "active_pending_free"})
_FREE = "inactive"


class SegmentBlock(NamedTuple):
    """A part of a segment: a block in use, or free memory between blocks."""

    address: int
    size: int
    requested: int
    """Bytes as requested; 0 for free memory."""
    live: bool
    """In use, or waiting for another stream before it can be used again."""
    stack: int
    """Index into the stacks of the snapshot; -1 where none was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What the allocator got from the device in one piece."""

    device: int
    address: int
    size: int
    stream: int = 0
    expandable: bool = False
    pool: str = ""
    """The private pool that it belongs to; empty for the allocator's own."""
    blocks: Sequence[SegmentBlock] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSnapshot:
    """What `torch.cuda.memory._snapshot()` said, as far as it is used."""

    segments: Sequence[Segment] = ()
    traces: Sequence[Trace] = ()
    """The history of each device, by its index; empty where none was recorded."""
    stacks: Stacks = field(default_factory=Stacks)
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of the allocator, by name; empty where the file does not say."""

    @property
    def devices(self) -> Sequence[int]:
        """Indices of the devices of which anything is known."""
        recorded = {index for index, trace in enumerate(self.traces) if len(trace)}
        return sorted(recorded | {segment.device for segment in self.segments})

    def trace(self, device: int) -> Trace:
        """Returns the history of a device; an empty one where none was recorded."""
        return self.traces[device] if device < len(self.traces) else Trace()

    def segments_of(self, device: int) -> Sequence[Segment]:
        """Returns the segments of a device."""
        return [segment for segment in self.segments if segment.device == device]


def parse_snapshot(found: object, rows: Rows, room: int) -> AllocatorSnapshot:
    """Returns a snapshot.

    Args:
        found: the dictionary, with the histories in `rows`.
        rows: what has taken them.
        room: bytes that blocks and their stacks may take.

    Raises:
        LogFormatError: a field that is used is absent or has another form, or there is too much of something.
    """
    if not isinstance(found, dict) or "segments" not in found:
        raise LogFormatError("must be a dictionary with 'segments' and 'device_traces', as torch's snapshots are")
    traces = [rows.trace_of(trace) for trace in _items(found.get("device_traces", []), "device_traces")]
    if len(traces) > MAX_DEVICES:
        raise LogFormatError(f"has histories of {len(traces):,} devices; up to {MAX_DEVICES} are read")
    settings = found.get("allocator_settings")
    return AllocatorSnapshot(
        segments=_segments(_items(found["segments"], "segments"), rows, room),
        traces=traces,
        stacks=rows.stacks,
        settings=settings if isinstance(settings, dict) else {},
    )


def _segments(items: Sequence[object], rows: Rows, room: int) -> list[Segment]:
    segments, budget = [], _Budget(rows, room)
    for number, item in enumerate(items):
        fields = _Fields(item, f"segment {number:,}")
        segment = Segment(
            device=fields.number("device", 0),
            address=fields.number("address"),
            size=fields.number("total_size"),
            stream=fields.number("stream", 0),
            expandable=fields.value("is_expandable") is True,
            pool=pool_name(fields.value("segment_pool_id")),
            blocks=tuple(_blocks(fields, rows.stack_of, budget)),
        )
        if segment.device >= MAX_DEVICES:
            raise LogFormatError(f"segment {number:,} is on device {segment.device}; devices have indices below 1024")
        budget.take()
        segments.append(segment)
    return segments


class _Budget:
    """Refuses more blocks and segments than are read, and what takes too much memory with their stacks."""

    def __init__(self, rows: Rows, room: int) -> None:
        self._rows, self._room, self._count = rows, room, 0

    def take(self) -> None:
        self._count += 1
        if self._count > MAX_BLOCKS:
            raise LogFormatError(f"has more than {MAX_BLOCKS:,} segments and blocks")
        self._room -= _BLOCK_BYTES + self._rows.new_bytes()
        if self._room < 0:
            raise LogFormatError("has blocks with stacks that take more memory than a snapshot of this form does")


def _blocks(segment: _Fields, stack_of: Callable[[object], int], budget: _Budget) -> Iterator[SegmentBlock]:
    address = segment.number("address")
    items = _items(segment.value("blocks"), f"'blocks' of {segment.name}")
    for number, item in enumerate(items):
        fields = _Fields(item, f"block {number:,} of {segment.name}")
        size, state = fields.number("size"), fields.value("state")
        live = isinstance(state, str) and state in _LIVE
        if not live and state != _FREE:
            raise LogFormatError(
                f"{fields.name} has state = {state!r:.40}; it must be inactive or one of {sorted(_LIVE)}"
            )
        first = fields.first_of_history()
        address = fields.number("address", address)
        stack = stack_of(fields.value("frames") or first.get("frames")) if live else UNKNOWN
        requested = fields.number("requested_size", first.get("real_size", size)) if live else 0
        budget.take()
        yield SegmentBlock(address, size, requested, live, stack)
        address += size


class _Fields:
    """The fields of a part of a snapshot."""

    def __init__(self, found: object, name: str) -> None:
        if not isinstance(found, dict):
            raise LogFormatError(f"{name} must be a dictionary, got {type(found).__name__}")
        self._found, self.name = found, name

    def value(self, field: str) -> Any:
        return self._found.get(field)

    def number(self, field: str, default: Any = None) -> int:
        value = self._found.get(field, default)
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise LogFormatError(f"{self.name} has {field} = {value!r:.40}, which must be an integer from 0 on")
        return value

    def first_of_history(self) -> Mapping[str, Any]:
        """Returns what torch up to 2.0 says of a block in its place."""
        history = self._found.get("history")
        first = history[0] if isinstance(history, list) and history else None
        return first if isinstance(first, dict) else {}


def _items(found: object, name: str) -> Sequence[object]:
    if not isinstance(found, list | tuple):
        raise LogFormatError(f"{name} must be a list, got {type(found).__name__}")
    return found
