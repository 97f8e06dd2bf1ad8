"""A reader of pickles that are plain data: dictionaries, lists, tuples, strings, numbers.

A pickle is a program, and one from elsewhere may be anybody's. Python's own reader runs what it names, keeps every
object for later reference, and trusts each length. This one knows no operation that names code, and bounds what it
holds. A list of history entries is handed to its `Rows` batch by batch, so that it takes columns and not dictionaries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pickletools import opcodes
from sys import getsizeof
from typing import Any, NoReturn

from memtrace.errors import LogFormatError
from memtrace.forensics.footprint import (
    CONTAINER,
    FIRST_ITEM,
    FLOAT,
    INTEGER,
    ITEM,
    LONG_INTEGER,
    MEMO_PLACE,
    PLACE,
    SIZE_CLASSES,
    TEXT,
    dictionary_growth,
)
from memtrace.forensics.rows import GONE, ROW_BYTES, Rows

MAX_HELD = 1 << 30
"""Bytes that the values of a file may take in this process, as they are counted here: with Python itself below 2 GB."""
MAX_READ = 16 << 30
"""Bytes of a pickle that are read at most: a compressed one may go on for ever."""
MAX_TEXT = 16 << 20
MAX_INTEGER_BYTES = 16
MAX_DEPTH = 100
"""Open marks at most. torch's snapshots have eight."""

_CHUNK = 1 << 18
"""Bytes between two looks at what is held; some operations of one byte take a hundred."""
_SPARE = 512
"""Bytes beyond the operation at hand that are always there: the longest short one has 257."""
_LARGEST_KEY = 1 << 60
"""Integers below hash to themselves, so that nobody can choose many with one hash."""

_uint4, _int4, _double = (struct.Struct(form).unpack_from for form in ("<I", "<i", ">d"))

Read = Callable[[int], bytes]
Progress = Callable[[int], None]


class PlainPickle:
    """Reads one pickle of protocol 2 to 5.

    Args:
        read: returns up to so many bytes more; none at the end.
        rows: takes the entries of histories, and what they refer to.
        progress: is told how many bytes have been read, after each 256 KiB.
    """

    def __init__(self, read: Read, rows: Rows, progress: Progress | None = None) -> None:
        self._read, self._rows, self._progress = read, rows, progress
        self._data = b""
        self._before = 0
        """Bytes of the pickle before `_data`."""
        self._limit = -1
        """Last place in `_data` at which an operation may begin."""
        self._ended = False
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._open: list[int] = []
        """Places on the stack of lists and dictionaries that were made there: only those may grow."""
        self._marks: list[tuple[int, int, int]] = []
        """Of each open mark the length of the stack, the length of the memo and what was held."""
        self._held = 0
        self._largest_batch = 0
        """Bytes that the largest batch of entries took before they became rows."""

    @property
    def held(self) -> int:
        """Bytes that the values take at most, as they are counted here."""
        lists = PLACE * len(self._stack) + MEMO_PLACE * len(self._memo)
        return self._held + lists + SIZE_CLASSES * self._largest_batch

    def load(self) -> object:
        """Returns the value.

        Raises:
            LogFormatError: this is no pickle of plain data, ends early, or takes too much memory.
        """
        self._begin()
        place = 2
        try:
            while True:
                done, place = self._steps(place)
                if done:
                    return self._result()
        except (IndexError, struct.error) as error:
            raise self._mistake(place, "an operation has nothing to work on") from error

    def _begin(self) -> None:
        self._fill(0)
        if self._data[:1] != b"\x80" or not 2 <= self._data[1] <= 5:
            raise LogFormatError(
                "must be a pickle of protocol 2 to 5, as torch.cuda.memory._dump_snapshot() writes it, but begins with "
                f"{self._data[: min(8, self._limit + 1)]!r}"
            )

    def _result(self) -> object:
        if len(self._stack) != 1 or self._marks:
            raise LogFormatError(f"must be one value, but the pickle ends with {len(self._stack)} of them open")
        return self._stack[0]

    def _steps(self, place: int) -> tuple[bool, int]:
        """Does operations up to the next of the rarer ones, with it; returns whether the pickle ended, and where."""
        stack, memo, push = self._stack, self._memo, self._stack.append
        data, limit = self._data, self._limit
        while True:
            if place > limit:
                place = self._fill(place)
                data, limit = self._data, self._limit
            code = data[place]
            place += 1
            if code == _BINGET:
                push(memo[data[place]])
                place += 1
            elif code == _LONG_BINGET:
                push(memo[_uint4(data, place)[0]])
                place += 4
            elif code == _MEMOIZE:
                memo.append(stack[-1])
            elif code == _BININT1:
                push(data[place])
                place += 1
            elif code == _LONG1:
                size = data[place]
                place += size + 1
                if size > MAX_INTEGER_BYTES:
                    raise self._mistake(place, f"an integer of {size} bytes")
                push(int.from_bytes(data[place - size : place], "little", signed=True))
                self._held += LONG_INTEGER
            elif code == _STOP:
                if place > limit + 1:
                    raise self._cut_off(place)
                return True, place
            else:
                work = _RARER.get(code)
                if work is None:
                    self._refuse(code, place - 1)
                return False, work(self, place)

    def _fill(self, place: int, needed: int = 0) -> int:
        """Reads on, so that at least `needed` bytes from `place` on are there; returns the new place, 0."""
        if self._ended and place > self._limit:
            raise self._cut_off(place)
        self._check_held()
        parts = [self._data[place:]]
        missing = needed + _SPARE - len(parts[0])
        self._before += place
        while not self._ended and missing > 0:
            part = self._read(max(_CHUNK, min(missing, MAX_TEXT)))
            self._ended = not part
            missing -= len(part)
            parts.append(part)
        self._data = b"".join(parts)
        self._limit = len(self._data) - _SPARE
        if self._ended:
            self._limit = len(self._data) - 1
            self._data += bytes(_SPARE)  # 0 is no operation
        if self._before + len(self._data) > MAX_READ:
            raise LogFormatError(f"is longer than {MAX_READ >> 30} GiB")
        if self._progress is not None:
            self._progress(self._before + self._limit)
        return 0

    def _check_held(self, more: int = 0) -> None:
        if self.held + more > MAX_HELD:
            raise LogFormatError(f"holds more than {MAX_HELD >> 20} MiB of values, which no snapshot of this form does")

    # Each of the rarer operations takes the place after its code, and returns the place after itself.

    def _mark(self, place: int) -> int:
        if len(self._marks) >= MAX_DEPTH:
            raise self._mistake(place, f"values nested more than {MAX_DEPTH} deep")
        self._marks.append((len(self._stack), len(self._memo), self._held))
        return place

    def _signed4(self, place: int) -> int:
        self._stack.append(_int4(self._data, place)[0])
        self._held += INTEGER
        return place + 4

    def _unsigned2(self, place: int) -> int:
        self._stack.append(self._data[place] | self._data[place + 1] << 8)
        self._held += INTEGER
        return place + 2

    def _float(self, place: int) -> int:
        self._stack.append(_double(self._data, place)[0])
        self._held += FLOAT
        return place + 8

    def _frame(self, place: int) -> int:
        return place + 8

    def _constant(self, place: int) -> int:
        self._stack.append(_CONSTANTS[self._data[place - 1]])
        return place

    def _sized(self, place: int) -> int:
        width, text = _SIZED[self._data[place - 1]]
        return self._bytes(place + width, int.from_bytes(self._data[place : place + width], "little"), text=text)

    def _bytes(self, place: int, size: int, *, text: bool) -> int:
        if size > MAX_TEXT:
            raise self._mistake(place, f"a text of {size:,} bytes")
        if place + size > self._limit:
            place = self._fill(place, size) if not self._ended else place
            if place + size > self._limit:
                raise self._cut_off(place)
        found = self._data[place : place + size]
        value: str | bytes = found
        if text:
            try:
                value = found.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise self._mistake(place, "a text that is not UTF-8") from error
        self._stack.append(value)
        self._held += getsizeof(value) + TEXT
        return place + size

    def _open_value(self, place: int) -> int:
        self._open.append(len(self._stack))
        self._stack.append([] if self._data[place - 1] == _LIST else {})
        self._held += CONTAINER
        return place

    def _close_from(self, begin: int) -> None:
        """Notes that what was on the stack from a place on has been taken."""
        while self._open and self._open[-1] >= begin:
            self._open.pop()

    def _target(self, kind: type, place: int) -> Any:
        """Returns the list or dictionary on top of the stack, to which something is added.

        A pickler fills each where it made it. One that the memo gave back may be older than the batch of entries at
        hand: what it takes would outlive them, uncounted.
        """
        target = self._stack[-1]
        if type(target) is not kind:
            raise self._mistake(place, f"something is added to what is no {kind.__name__}")
        if not self._open or self._open[-1] != len(self._stack) - 1:
            raise self._mistake(place, f"something is added to a {kind.__name__} that was complete")
        return target

    def _put(self, place: int) -> int:
        self._remember(self._data[place], place)
        return place + 1

    def _long_put(self, place: int) -> int:
        self._remember(_uint4(self._data, place)[0], place)
        return place + 4

    def _remember(self, number: int, place: int) -> None:
        memo = self._memo
        if not len(memo) <= number <= len(memo) + MAX_DEPTH:
            raise self._mistake(place, f"number {number} is given to a value, where {len(memo)} comes next")
        if number > len(memo):
            memo.extend([GONE] * (number - len(memo)))
            self._check_held()
        memo.append(self._stack[-1])

    def _append(self, place: int) -> int:
        item = self._stack.pop()
        self._close_from(len(self._stack))
        self._extend([item], place)
        return place

    def _appends(self, place: int) -> int:
        items, memo_begin, held = self._since_mark(place)
        before = self._held
        if self._extend(items, place):
            self._largest_batch = max(self._largest_batch, before - held)
            self._held += held - before + self._rows.forget(self._memo, memo_begin)
        return place

    def _extend(self, items: list[Any], place: int) -> bool:
        """Adds items to a list; returns whether they were entries of a history."""
        target = self._target(list, place)
        if items and type(items[0]) is dict and "action" in items[0]:
            if target:
                raise self._mistake(place, "entries of a history follow other values")
            self._check_held(ROW_BYTES * len(items))
            self._held += self._rows.add(target, items)
            return True
        if items and self._rows.took(target):
            raise self._mistake(place, "another value follows entries of a history")
        self._held += ITEM * len(items) + (0 if target else FIRST_ITEM)
        target += items
        return False

    def _set_item(self, place: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._close_from(len(self._stack))
        return self._update([key, value], place)

    def _set_items(self, place: int) -> int:
        return self._update(self._since_mark(place)[0], place)

    def _update(self, items: list[Any], place: int) -> int:
        target, keys = self._target(dict, place), items[::2]
        if len(items) % 2:
            raise self._mistake(place, "a key without a value")
        for key in keys:
            if type(key) is not str and not (type(key) is int and abs(key) < _LARGEST_KEY):
                raise self._mistake(place, f"a key that is {type(key).__name__}")
        before = len(target)
        target.update(zip(keys, items[1::2], strict=True))
        self._held += dictionary_growth(before, len(keys))
        return place

    def _tuple(self, place: int) -> int:
        return self._pack(self._since_mark(place)[0], place)

    def _small_tuple(self, place: int) -> int:
        count = self._data[place - 1] - _TUPLE1 + 1
        if len(self._stack) < count:
            raise self._mistake(place, "a tuple of more than there is")
        items = self._stack[-count:]
        del self._stack[-count:]
        self._close_from(len(self._stack))
        return self._pack(items, place)

    def _pack(self, items: list[Any], place: int) -> int:
        self._stack.append(tuple(items))
        self._held += CONTAINER + 8 * len(items)
        return place

    def _since_mark(self, place: int) -> tuple[list[Any], int, int]:
        """Returns what was pushed since the last mark, and of then the length of the memo and what was held."""
        if not self._marks:
            raise self._mistake(place, "an operation needs a mark, and there is none")
        begin, memo_begin, held = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        self._close_from(begin)
        return items, memo_begin, held

    def _mistake(self, place: int, what: str) -> LogFormatError:
        if self._ended and place > self._limit:
            return self._cut_off(place)
        return LogFormatError(f"is no snapshot: {what}, at byte {self._before + place:,}")

    def _cut_off(self, place: int) -> LogFormatError:
        return LogFormatError(
            f"ends in the middle, after {self._before + min(place, self._limit + 1):,} bytes: was it written whole?"
        )

    def _refuse(self, code: int, place: int) -> NoReturn:
        if self._ended and place > self._limit:
            raise self._cut_off(place)
        known = next((known.name for known in opcodes if ord(known.code) == code), None)
        name = f"the operation {known}" if known else f"the byte {code:#04x}"
        raise LogFormatError(
            f"must be plain data, but has {name} at byte {self._before + place:,}; memtrace runs nothing that a file "
            "brings"
        )


_BINGET, _LONG_BINGET, _MEMOIZE, _STOP = ord("h"), ord("j"), 0x94, ord(".")
_BININT1, _LONG1, _TUPLE1, _LIST = ord("K"), 0x8A, 0x85, ord("]")
_CONSTANTS: dict[int, object] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_SIZED = {0x8C: (1, True), ord("X"): (4, True), 0x8D: (8, True), ord("C"): (1, False), ord("B"): (4, False)}
"""Of texts and bytes: in how many bytes their length is, and whether they are text."""
_RARER: dict[int, Callable[[PlainPickle, int], int]] = {
    ord("("): PlainPickle._mark,
    ord("J"): PlainPickle._signed4,
    ord("M"): PlainPickle._unsigned2,
    ord("G"): PlainPickle._float,
    0x95: PlainPickle._frame,
    **dict.fromkeys(_CONSTANTS, PlainPickle._constant),
    **dict.fromkeys(_SIZED, PlainPickle._sized),
    **dict.fromkeys((_LIST, ord("}")), PlainPickle._open_value),
    ord("q"): PlainPickle._put,
    ord("r"): PlainPickle._long_put,
    ord("a"): PlainPickle._append,
    ord("e"): PlainPickle._appends,
    ord("s"): PlainPickle._set_item,
    ord("u"): PlainPickle._set_items,
    ord("t"): PlainPickle._tuple,
    **dict.fromkeys((0x85, 0x86, 0x87), PlainPickle._small_tuple),
}
"""What each of the other operations does: all that write plain data, and none that names code."""
