"""Writes large snapshots piece by piece, with the operations that `pickle.dump` writes for torch's dictionaries.

torch names each frame once, and each entry has a list of its own of frames that others have too. Python's pickler would
need ten times the memory of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

_FRAME = 64 << 10
"""Bytes of a frame of a pickle."""
_BATCH = 1000
"""Items that a pickler adds to a list at once."""
_STACKS = 1000
"""Different stacks that a history has."""
_BLOCKS = 2000
"""Blocks that each step makes and frees."""
_KEPT = 300
"""Blocks that are there from before the history to the end."""
_BASE = 0x7F00_0000_0000


class _Entry(NamedTuple):
    action: str
    address: int
    size: int


class _Pickle:
    """Writes operations in frames, and counts what they remember."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._frame = file, bytearray()
        self._remembered = 0
        self._texts: dict[str, bytes] = {}
        self._frames: dict[tuple[str, int, str], bytes] = {}
        self._lists: dict[int, bytes] = {}
        file.write(b"\x80\x04")

    def write(self, *operations: bytes) -> None:
        """Writes operations, each whole."""
        self._frame += b"".join(operations)
        if len(self._frame) >= _FRAME:
            self.flush()

    def flush(self) -> None:
        """Ends the frame."""
        if self._frame:
            self._file.write(b"\x95" + struct.pack("<Q", len(self._frame)) + self._frame)
            self._frame.clear()

    def remembered(self, operations: bytes) -> bytes:
        """Returns operations that end with a new value, which is remembered."""
        self._remembered += 1
        return operations + b"\x94"

    def again(self) -> bytes:
        """Returns the operation that has the value again that was remembered last."""
        number = self._remembered - 1
        return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def text(self, text: str) -> bytes:
        """Returns a text, which is written once."""
        if text in self._texts:
            return self._texts[text]
        written = self.remembered(_text(text))
        self._texts[text] = self.again()
        return written

    def frames(self, number: int, stack: Sequence[tuple[str, int, str]]) -> bytes:
        """Returns a list of frames, of which each is written once; the stack goes by this number."""
        if number in self._lists:
            self._remembered += 1
            return self._lists[number]
        parts = [
            self.remembered(b"]"),
            b"(" if len(stack) > 1 else b"",
            *map(self._one_frame, stack),
            _end(stack, b"ae"),
        ]
        self._lists[number] = b"".join(
            [b"]\x94", b"(" if len(stack) > 1 else b"", *(self._frames[frame] for frame in stack), _end(stack, b"ae")]
        )
        return b"".join(parts)

    def _one_frame(self, frame: tuple[str, int, str]) -> bytes:
        if frame in self._frames:
            return self._frames[frame]
        begin = self.remembered(b"}")
        self._frames[frame] = self.again()
        filename, line, name = frame
        fields = [self.text("name"), self.text(name), self.text("filename"), self.text(filename), self.text("line")]
        return b"".join([begin, b"(", *fields, _integer(line), b"u"])


def write_snapshot(path: Path, nbytes: int, frames: int) -> int:
    """Writes a snapshot of a device that makes and frees blocks step by step.

    Args:
        path: of the file.
        nbytes: which the file has at least; the step at hand is finished.
        frames: of each stack.

    Returns:
        the number of entries in the history.
    """
    stacks = [
        [(f"/site-packages/models/modeling_{line % 7}.py", line, f"forward_{line % 40}") for line in lines]
        for lines in (range(first, first + frames) for first in range(_STACKS))
    ]
    with path.open("wb") as file:
        pickle = _Pickle(file)
        pickle.write(pickle.remembered(b"}"), b"(", pickle.text("segments"), pickle.remembered(b"]"))
        pickle.write(_segment(pickle), b"a")
        pickle.write(pickle.text("device_traces"), pickle.remembered(b"]"), pickle.remembered(b"]"))
        entries = 0
        while file.tell() < nbytes:
            entries = _step(pickle, stacks, entries)
        pickle.write(b"eau.")
        pickle.flush()
    return entries


def _step(pickle: _Pickle, stacks: Sequence[Sequence[tuple[str, int, str]]], entries: int) -> int:
    """Writes the entries of one step; returns how many there are then."""
    for entry in _entries():
        if entries % _BATCH == 0:
            pickle.write(b"e(" if entries else b"(")
        fields = [
            *(pickle.remembered(b"}"), b"(", pickle.text("action"), pickle.text(entry.action)),
            *(pickle.text("addr"), _integer(entry.address), pickle.text("size"), _integer(entry.size)),
            *(
                pickle.text("stream"),
                _integer(0),
                pickle.text("time_us"),
                _integer(1_795_820_593_000_000 + 7 * entries),
            ),
            *(pickle.text("compile_context"), pickle.remembered(_text("N/A"))),
            *(pickle.text("user_metadata"), pickle.text("")),
        ]
        number = entry.address // 512 % len(stacks)
        if stacks[number]:
            fields += [pickle.text("frames"), pickle.frames(number, stacks[number])]
        pickle.write(*fields, b"u")
        entries += 1
    return entries


def _entries() -> Iterator[_Entry]:
    """Yields the entries of a step: blocks are made in order and freed backwards; the last step ends a batch."""
    blocks = [(_BASE + (_KEPT << 20) + number * (1 << 20), 512 * (number % 1999 + 1)) for number in range(_BLOCKS)]
    for address, size in blocks:
        yield _Entry("alloc", address, size)
    for address, size in reversed(blocks):
        yield _Entry("free_requested", address, size)
        yield _Entry("free_completed", address, size)


def _segment(pickle: _Pickle) -> bytes:
    total = (_KEPT + _BLOCKS) << 20
    return b"".join(
        [
            *(
                pickle.remembered(b"}"),
                b"(",
                pickle.text("device"),
                _integer(0),
                pickle.text("address"),
                _integer(_BASE),
            ),
            *(pickle.text("total_size"), _integer(total), pickle.text("blocks"), pickle.remembered(b"]"), b"("),
            *(_block(pickle, _BASE + (number << 20), 1 << 20, "active_allocated") for number in range(_KEPT)),
            _block(pickle, _BASE + (_KEPT << 20), _BLOCKS << 20, "inactive"),
            b"eu",
        ]
    )


def _block(pickle: _Pickle, address: int, size: int, state: str) -> bytes:
    return b"".join(
        [
            *(pickle.remembered(b"}"), b"(", pickle.text("address"), _integer(address)),
            *(pickle.text("size"), _integer(size), pickle.text("requested_size"), _integer(size)),
            *(pickle.text("state"), pickle.text(state), b"u"),
        ]
    )


def _end(items: Sequence[object], codes: bytes) -> bytes:
    return b"" if not items else codes[:1] if len(items) == 1 else codes[1:]


def _text(text: str) -> bytes:
    content = text.encode()
    return b"\x8c" + bytes([len(content)]) + content


def _integer(number: int) -> bytes:
    if number < 256:
        return b"K" + bytes([number])
    if number < 65536:
        return b"M" + struct.pack("<H", number)
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    size = (number.bit_length() >> 3) + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little")
