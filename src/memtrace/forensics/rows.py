"""Takes the entries of histories while a pickle is read: they become columns, and each stack is kept once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from sys import getsizeof
from typing import Any, Final

from memtrace.errors import LogFormatError
from memtrace.forensics.trace import UNKNOWN, Frame, Stacks, Trace

GONE: Final = object()
"""In place of a value that a pickle may not refer to again."""
ADDRESSED = frozenset(
    {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap"}
)
"""Actions that name a block or a segment."""

_LARGEST = (1 << 63) - 1
_MOST = {"size": 1 << 50, "time_us": 1 << 53}
"""What no device has and no clock reads."""
MAX_DEVICES = 1024
MAX_FRAMES = 100_000
"""Of one stack."""
ROW_BYTES = 64
"""Bytes of an entry, as it is kept."""
_TRACE_BYTES = 4000
_FRAME_BYTES = 800
_STACK_BYTES, _PLACE_BYTES = 600, 24
_PAIR_BYTES = 250
_SPARSE_BYTES = 160
"""Bytes of what only some entries have, and of a text beside itself: tables double, and are copied meanwhile."""
_RARER = frozenset({"user_metadata", "category", "pool_id"})
_NO_ENTRY = "an entry of a history must be a dictionary with an action"
_NO_ENTRIES: tuple[object, ...] = ([], ())
_NO_FRAMES: tuple[object, ...] = (None, [], ())


class Rows:
    """Takes the entries of histories while they are read, and lets go of what they were made of."""

    def __init__(self) -> None:
        self.stacks = Stacks()
        self._traces: dict[int, tuple[object, Trace]] = {}
        """By the identity of the list that the entries were to be added to, which is kept."""
        self._frame_numbers: dict[int, int] = {}
        self._frames: dict[int, Mapping[str, Any]] = {}
        """The one dictionary that is kept of each frame, and by its identity the number of it."""
        self._stack_numbers: dict[int, int] = {}
        self._lists: dict[int, Sequence[Any]] = {}
        """The same for lists of frames."""
        self._pairs: dict[tuple[int, int], tuple[int, int]] = {}
        """Ids of pools, each once."""
        self._nothing: list[Any] = []
        self._recent: dict[int, int] = {}
        """Numbers of the lists of frames that the entries at hand have: an allocation and its free share one."""
        self._new_bytes = 0

    def trace_of(self, found: object) -> Trace:
        """Returns the history that was read as this list; an empty one where it had no entries.

        Raises:
            LogFormatError: it is no list, or has something else than entries.
        """
        known = self._traces.get(id(found))
        if known is None and found not in _NO_ENTRIES:
            raise LogFormatError(_NO_ENTRY)
        return Trace() if known is None else known[1]

    def took(self, target: object) -> bool:
        """Returns whether entries were to be added to this list."""
        return id(target) in self._traces

    def add(self, target: list[Any], entries: Sequence[Any]) -> int:
        """Adds entries of one history; returns the bytes that are kept.

        Raises:
            LogFormatError: one of them has not the form of an entry, or there are histories of too many devices.
        """
        known = self._traces.get(id(target))
        if known is None:
            if len(self._traces) > MAX_DEVICES:
                raise LogFormatError(f"has histories of more devices than the {MAX_DEVICES:,} that are read")
            known = self._traces[id(target)] = target, Trace()
            self._new_bytes += _TRACE_BYTES
        self._recent.clear()
        for entry in entries:
            self._add(known[1], entry)
        return self.new_bytes() + ROW_BYTES * len(entries)

    def new_bytes(self) -> int:
        """Returns the bytes that are kept since this was asked last."""
        found, self._new_bytes = self._new_bytes, 0
        return found

    def stack_of(self, frames: object) -> int:
        """Returns the number of a stack, given as a list of dictionaries; `UNKNOWN` for none.

        Raises:
            LogFormatError: a frame has not the form of one.
        """
        known = self._stack_numbers.get(id(frames))
        if known is not None:
            return known
        if not isinstance(frames, list | tuple) or not frames:
            if frames in _NO_FRAMES:
                return UNKNOWN
            raise LogFormatError(f"'frames' must be a list of frames, got {type(frames).__name__}")
        if len(frames) > MAX_FRAMES:
            raise LogFormatError(f"has a stack of {len(frames):,} frames; up to {MAX_FRAMES:,} are read")
        known_frames = tuple(map(self._frame_numbers.get, map(id, frames)))
        number = self.stacks.stack(
            tuple(map(self._frame, frames)) if None in known_frames else known_frames  # type: ignore[arg-type]
        )
        if number not in self._lists:
            kept = frames if isinstance(frames, list) else [*frames]
            kept[:] = [self._frames[frame] for frame in self.stacks.numbers(number)]
            self._lists[number] = kept
            self._stack_numbers[id(kept)] = number
            self._new_bytes += _STACK_BYTES + _PLACE_BYTES * len(kept)
        return number

    def forget(self, memo: list[Any], begin: int) -> int:
        """Lets go of what entries were made of; returns the bytes that are kept.

        Args:
            memo: what a pickle may refer to. From `begin` on, only texts, frames and stacks stay in it.
            begin: the first that the entries brought.
        """
        kept = 0
        for index in range(begin, len(memo)):
            value = memo[index]
            kind = type(value)
            if kind is str:
                kept += getsizeof(value) + 16
            elif kind is list and value:
                number = self._stack_numbers.get(id(value), UNKNOWN)
                if number == UNKNOWN and type(value[0]) is dict and "filename" in value[0]:
                    number = self.stack_of(value)
                memo[index] = GONE if number == UNKNOWN else self._lists[number]
            elif kind is dict and "filename" in value:
                memo[index] = self._frames[self._frame(value)]
            elif kind is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
                memo[index] = self._pairs.setdefault(value, value)
                kept += _PAIR_BYTES
            else:
                memo[index] = self._nothing if kind is list and not value else GONE
        return kept + self.new_bytes()

    def _frame(self, found: object) -> int:
        known = self._frame_numbers.get(id(found))
        if known is not None:
            return known
        frame = _frame(found)
        number = self.stacks.frame(frame)
        if number not in self._frames:
            assert isinstance(found, dict)
            found.clear()  # what else torch says of a frame can be long
            found.update(frame._asdict())
            self._frames[number] = found
            self._frame_numbers[id(found)] = number
            self._new_bytes += _FRAME_BYTES + getsizeof(frame.filename) + getsizeof(frame.name)
        return number

    def _add(self, trace: Trace, entry: Any) -> None:
        if type(entry) is not dict or type(action := entry.get("action")) is not str:
            raise LogFormatError(_NO_ENTRY)
        row = len(trace.actions)
        number = _number if action in ADDRESSED else _number_if_any
        address, size = number(entry, "addr", action), number(entry, "size", action)
        if action in ADDRESSED and UNKNOWN in (address, size):
            raise LogFormatError(f"entry {row:,} of a history: {action!r} must have 'addr' and 'size'")
        trace.addresses.append(address)
        trace.sizes.append(size)
        trace.streams.append(number(entry, "stream", action))
        trace.times_us.append(number(entry, "time_us", action))
        frames = entry.get("frames")
        stack = self._recent.get(id(frames))
        if stack is None:
            stack = self._recent[id(frames)] = self.stack_of(frames)
        trace.stacks.append(stack)
        trace.actions.append(self._word(trace, action))
        if not _RARER.isdisjoint(entry):
            self._add_rarer(trace, row, entry)
        if action == "oom":
            trace.device_free[row] = _number_if_any(entry, "device_free", action)
            self._new_bytes += _SPARSE_BYTES

    def _add_rarer(self, trace: Trace, row: int, entry: Mapping[str, Any]) -> None:
        for name, column in (("user_metadata", trace.notes), ("category", trace.categories)):
            text = entry.get(name)
            if text and type(text) is str:
                column[row] = self._word(trace, text)
                self._new_bytes += _SPARSE_BYTES
        pool = entry.get("pool_id")
        if pool and (name := pool_name(pool)):
            trace.pools[row] = self._word(trace, name)
            self._new_bytes += _SPARSE_BYTES

    def _word(self, trace: Trace, text: str) -> int:
        known = trace.words.get(text)
        if known is None:
            known = trace.words[text] = len(trace.words)
            self._new_bytes += _SPARSE_BYTES + getsizeof(text)
        return known


def pool_name(found: object) -> str:
    """Returns the id of a private pool as text; empty for the allocator's own pools, and for what is no id."""
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(type(part) is int for part in found):
        return ""
    return "" if found[0] == found[1] == 0 else f"{found[0]}.{found[1]}"


_parts = itemgetter("filename", "line", "name")


def _frame(found: Any) -> Frame:
    try:
        filename, line, name = _parts(found)
    except (KeyError, TypeError, IndexError) as error:
        raise LogFormatError("a frame must be a dictionary with filename, line and name") from error
    if type(filename) is not str or type(line) is not int or type(name) is not str:
        raise LogFormatError("a frame must have a text as filename and name, and a number as line")
    return Frame(filename, line, name)


def _number(entry: Mapping[str, Any], name: str, action: str) -> int:
    value = entry.get(name)
    if value is None:
        return UNKNOWN
    most = _MOST.get(name, _LARGEST)
    if type(value) is not int or not 0 <= value <= most:
        raise LogFormatError(f"an entry {action!r} has {name} = {value!r:.40}, which must be an integer, 0 to {most}")
    return value


def _number_if_any(entry: Mapping[str, Any], name: str, _: str) -> int:
    value = entry.get(name)
    return value if type(value) is int and 0 <= value <= _LARGEST else UNKNOWN
