"""From a snapshot to a recording of what the allocator was asked for, with what each block was for."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memtrace.allocator.blocks import segment_size
from memtrace.allocator.caching_allocator import round_size
from memtrace.allocator.settings import INTERVALS, AllocatorSettings, parse_settings
from memtrace.errors import ConfigError, LogFormatError
from memtrace.forensics.snapshot import AllocatorSnapshot, Segment
from memtrace.forensics.trace import UNKNOWN, Frame, Stacks, Trace
from memtrace.record.allocator_recording import MAX_BLOCK, MAX_STREAMS, AllocatorRecording, label_columns

_BEFORE = 1 << 48
"""Added to the number of a block that was there before the history, until it is known how many there were."""
_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_LIBRARY = ("/torch/", "\\torch\\")
"""In the path of a file that belongs to torch: whoever called it is meant."""
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
        LogFormatError: there is no history at all.
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
    trace, segments = snapshot.trace(index), snapshot.segments_of(index)
    return _Reading(trace, segments, snapshot.stacks).recording(
        settings=_settings(snapshot.settings, segments),
        origin=f"{origin}, device {index}" if origin else f"device {index}",
    )


@dataclass(slots=True)
class _Columns:
    """What is known of each block."""

    sizes: array[int] = field(default_factory=lambda: array("q"))
    addresses: array[int] = field(default_factory=lambda: array("q"))
    streams: array[int] = field(default_factory=lambda: array("q"))
    labels: list[str] = field(default_factory=list)

    def add(self, address: int, size: int, stream: int, label: str) -> int:
        """Adds a block and returns its number."""
        self.sizes.append(size)
        self.addresses.append(address)
        self.streams.append(stream)
        self.labels.append(label)
        return len(self.sizes) - 1


class _Reading:
    """One pass over a history."""

    def __init__(self, trace: Trace, segments: Sequence[Segment], stacks: Stacks) -> None:
        self._trace, self._stacks = trace, stacks
        self._segments = [segment for segment in segments if not segment.pool]
        self._private = sorted((segment.address, segment.size) for segment in segments if segment.pool)
        self._private_begins = [address for address, _ in self._private]
        self._words = [*trace.words]
        self._code = {word: number for number, word in enumerate(self._words)}
        self._failed_row = self._last("oom")
        self._events = array("q")
        self._made, self._before = _Columns(), _Columns()
        self._live: dict[int, int] = {}
        """Number of the block at each address: of one made, or `_BEFORE` and more."""
        self._top: dict[int, str] = {}

    def recording(self, *, settings: str, origin: str) -> AllocatorRecording:
        """Returns what was read."""
        limit, peak, begun = self._reserved()
        self._read(emptied=self._emptied(every=limit is None))
        self._add_the_untouched()
        order = sorted(range(len(self._before.sizes)), key=self._before.addresses.__getitem__)
        place = {number: at for at, number in enumerate(order)}
        count = len(order)
        events = array("q", (self._numbered(event, count, place) for event in self._events))
        before, made = self._before, self._made
        names, labels = label_columns([*(before.labels[number] for number in order), *made.labels])
        streams = [*(before.streams[number] for number in order), *made.streams]
        first = self._trace.streams[self._failed_row] if self._failed_row is not None else streams[0] if streams else 0
        numbers = {first: 0}
        streams = [numbers.setdefault(stream, len(numbers)) for stream in streams]
        if len(numbers) > MAX_STREAMS:
            raise LogFormatError(
                f"{origin}: the history has {len(numbers):,} streams; up to {MAX_STREAMS:,} are replayed"
            )
        failed = None if self._failed_row is None else self._trace.sizes[self._failed_row]
        return AllocatorRecording(
            sizes_at_begin=array("q", (before.sizes[number] for number in order)),
            events=events,
            settings=settings,
            origin=origin,
            from_the_start=not begun and not count,
            limit_bytes=limit,
            peak_reserved_bytes=peak,
            failed_bytes=failed if failed is not None and 0 < failed < MAX_BLOCK else None,
            names=names,
            labels=labels,
            addresses=array("q", [*(before.addresses[number] for number in order), *made.addresses]),
            streams=array("q", streams) if len(numbers) > 1 else (),
        )

    def _numbered(self, event: int, count: int, place: Mapping[int, int]) -> int:
        if event >= 0:
            return event
        number = -event - 1
        return -1 - (place[number - _BEFORE] if number >= _BEFORE else count + number)

    def _read(self, *, emptied: frozenset[int]) -> None:
        """Goes through the history, to its end: what is freed later was there before, too."""
        trace, events = self._trace, self._events
        alloc = self._code.get("alloc", UNKNOWN)
        freed = self._code.get("free_completed", self._code.get("free_requested", UNKNOWN))
        end = len(trace) if self._failed_row is None else self._failed_row
        columns = (trace.actions, trace.addresses, trace.sizes, trace.streams, trace.stacks)
        for row, (action, address, size, stream, stack) in enumerate(zip(*columns, strict=True)):
            if row == end:
                events = array("q")  # what comes after a failure is not replayed
            if row in emptied:
                events.append(0)
            if action == alloc:
                if not 0 < size < MAX_BLOCK or self._is_private(row, address):
                    continue
                if address in self._live:  # its free was lost
                    events.append(-self._live[address] - 1)
                if row < end:
                    self._live[address] = self._made.add(address, size, stream, self._label(row, stack))
                    events.append(size)
                else:
                    self._live[address] = 0
            elif action == freed and not self._is_private(row, address):
                number = self._live.pop(address, None)
                if number is None and 0 < size < MAX_BLOCK:
                    number = _BEFORE + self._before.add(address, size, stream, self._label(row, stack))
                if number is not None:
                    events.append(-number - 1)

    def _add_the_untouched(self) -> None:
        """Adds the blocks that were there before the history and after it."""
        for segment in self._segments:
            for block in segment.blocks:
                if block.live and block.address not in self._live and 0 < block.requested < MAX_BLOCK:
                    self._before.add(block.address, block.requested, segment.stream, self._frame(block.stack))

    def _reserved(self) -> tuple[int | None, int, int]:
        """Returns what could be reserved, the most that was, and what was at the begin of the history."""
        trace, changes = self._trace, {self._code[word]: sign for word, sign in _GROWS.items() if word in self._code}
        end = len(trace) if self._failed_row is None else self._failed_row
        moved = highest = then = 0
        for row, action in enumerate(trace.actions):
            sign = changes.get(action)
            if row == end:
                then = moved
            if sign is not None and not self._is_private(row, trace.addresses[row]):
                moved += sign * trace.sizes[row]
                if row < end:
                    highest = max(highest, moved)
        begun = max(sum(segment.size for segment in self._segments) - moved, 0)
        if self._failed_row is None:
            return None, begun + highest, begun
        free = trace.device_free.get(self._failed_row, UNKNOWN)
        wanted = segment_size(round_size(max(trace.sizes[self._failed_row], 1)))
        if free == UNKNOWN:
            return None, begun + highest, begun
        # A device that has enough, and is not asked: set_per_process_memory_fraction is the limit.
        return begun + then + (free if free < wanted else 0), begun + highest, begun

    def _emptied(self, *, every: bool) -> frozenset[int]:
        """Returns the rows at which segments were given back for no request: `torch.cuda.empty_cache()`.

        Args:
            every: whether also those that may have been given back for one, where no limit tells the model to.
        """
        gives = {self._code.get(word, UNKNOWN) for word in ("segment_free", "segment_unmap")}
        takes = {self._code.get(word, UNKNOWN) for word in ("segment_alloc", "segment_map", "oom")}
        silent = {self._code.get(word, UNKNOWN) for word in ("snapshot", "annotate")}
        found, first = [], UNKNOWN
        for row, action in enumerate(self._trace.actions):
            if action in gives:
                first = row if first == UNKNOWN else first
            elif action not in silent:
                if first != UNKNOWN and (every or action not in takes):
                    found.append(first)
                first = UNKNOWN
        return frozenset(found)

    def _is_private(self, row: int, address: int) -> bool:
        if row in self._trace.pools:
            return True
        if not self._private:
            return False
        at = bisect_right(self._private_begins, address) - 1
        return at >= 0 and address < sum(self._private[at])

    def _last(self, word: str) -> int | None:
        code = self._code.get(word)
        rows = range(len(self._trace) - 1, -1, -1)
        return None if code is None else next((row for row in rows if self._trace.actions[row] == code), None)

    def _label(self, row: int, stack: int) -> str:
        for texts in (self._trace.categories, self._trace.notes):
            if row in texts:
                return self._words[texts[row]]
        return self._frame(stack)

    def _frame(self, stack: int) -> str:
        """Returns the innermost frame that is the user's, else the innermost one in Python; empty for none."""
        if stack == UNKNOWN:
            return ""
        known = self._top.get(stack)
        if known is None:
            known = self._top[stack] = _innermost(self._stacks[stack])
        return known


def _innermost(frames: Sequence[Frame]) -> str:
    python = [frame for frame in frames if frame.filename.endswith(".py")]
    own = [frame for frame in python if not any(part in frame.filename for part in _LIBRARY)]
    for frame in (*own, *python, *frames):
        name = frame.filename.replace("\\", "/").rpartition("/")[2]
        return f"{name}:{frame.line} {frame.name}"
    return ""


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
