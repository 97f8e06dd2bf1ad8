"""Memory that `memtrace read` takes for files that were made to take the most.

usage: python -m benchmarks.hostile_snapshots [PART_OF_A_NAME]

Writes each file into a temporary directory, compressed: most are a few operations that are repeated until the reader's
bound of 1 GiB is passed, others stay below it and have what takes the most afterwards. Reads each with the whole
command in a process of its own. Prints the processor time, the largest resident set and the last line that the command
said; the exit status is 1 where a command ends otherwise than it should, or takes more than 2 GB.
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

from benchmarks.read_snapshot import BOUND_BYTES, read

_LIST, _DICTIONARY, _MARK, _ENTRIES, _ITEMS = b"]", b"}", b"(", b"u", b"e"
_REMEMBER, _TUPLE, _STOP = b"\x94", b"t", b"."
_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileFile:
    """A pickle, as pieces of which each is compressed once and repeated."""

    pieces: Callable[[], Iterable[tuple[bytes, int]]]
    """Operations, and how often they come."""
    status: int = 2
    """Exit status of the command: 2 where it refuses the file, 0 where it can be read."""
    says: str = "holds more than"
    """A part of what the command prints."""

    def write(self, path: Path) -> None:
        """Writes the file, gzip'ed: members that follow each other are one content."""
        with path.open("wb") as file:
            for content, count in chain([(b"\x80\x04", 1)], self.pieces()):
                packer = zlib.compressobj(1, wbits=31)
                packed = packer.compress(content) + packer.flush()
                for _ in range(count):
                    file.write(packed)


def _repeated(piece: bytes, head: bytes = b"", tail: bytes = b"", nbytes: int = 1 << 30) -> HostileFile:
    """Operations that are repeated for so many bytes of the pickle, a MiB at a time."""
    block = piece * ((1 << 20) // len(piece))
    return HostileFile(pieces=lambda: [(head, 1), (block, nbytes // len(block)), (tail, 1)])


def _text(text: str | bytes) -> bytes:
    content = text if isinstance(text, bytes) else text.encode()
    return b"X" + len(content).to_bytes(4, "little") + content


def _number(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little")


def _address(number: int) -> bytes:
    return b"\x8a\x06" + number.to_bytes(6, "little")


def _entry(number: int, more: bytes = b"", action: str = "alloc", size: int = 512) -> bytes:
    fields = _text("action") + _text(action) + _text("addr") + _address(512 * number) + _text("size") + _number(size)
    return _DICTIONARY + _MARK + fields + more + _ENTRIES


def _batches(entry: Callable[[int], bytes], count: int, head: bytes = _LIST) -> Iterator[tuple[bytes, int]]:
    yield head, 1
    for first in range(0, count, _BATCH):
        yield _MARK + b"".join(map(entry, range(first, first + _BATCH))) + _ITEMS, 1


def _frame(number: int) -> bytes:
    fields = _text("filename") + _text(f"f{number}") + _text("line") + _number(number) + _text("name") + _text("n")
    return _DICTIONARY + _REMEMBER + _MARK + fields + _ENTRIES


def _with_stack(number: int) -> bytes:
    return _entry(number, _text("frames") + _LIST + _REMEMBER + _frame(number) + b"a")


def _with_note(number: int) -> bytes:
    return _entry(number, _text("user_metadata") + _text(f"note {number}"))


def _with_pool(number: int) -> bytes:
    return _entry(number, _text("pool_id") + _number(number) + _number(number) + b"\x86" + _REMEMBER)


def _failed(number: int) -> bytes:
    return _entry(number, _text("device_free") + _address(number), "oom")


def _rows() -> Iterator[tuple[bytes, int]]:
    """One entry that is remembered and comes again and again."""
    yield _entry(1) + _REMEMBER + _LIST, 1
    yield (_MARK + b"h\x00" * _BATCH + _ITEMS) * 100, 300


def _rows_at_once() -> Iterator[tuple[bytes, int]]:
    yield _entry(1) + _REMEMBER + _LIST + _MARK, 1
    yield b"h\x00" * (1 << 19), 62
    yield _ITEMS, 1


def _pools() -> Iterator[tuple[bytes, int]]:
    """Batches whose ballast has one size each, and of which one text in each pool of Python's objects is kept."""
    yield _LIST, 1
    for length in range(16, 440, 16):
        text = _text(b"a" * length)
        many = (16 << 10) // (64 + length)
        ballast = (text + _REMEMBER + text * (many - 1)) * 1900
        yield _MARK + _entry(1, _text("x") + _MARK + ballast + _TUPLE) + _ITEMS, 1


def _older(batch: bytes) -> Iterator[tuple[bytes, int]]:
    """Batches that put their ballast into what is older than they are."""
    yield _LIST + _REMEMBER + _LIST, 1
    yield (_MARK + _entry(1, _text("x") + batch) + _ITEMS) * 10, 100_000


_BALLAST = _LIST * 1000


def _snapshot(blocks: Iterable[bytes], traces: Iterable[Iterable[tuple[bytes, int]]]) -> Iterator[tuple[bytes, int]]:
    """A whole snapshot with blocks in one segment of device 0."""
    yield _DICTIONARY + _MARK + _text("x") + _entry(1 << 30, action="free_completed") + _REMEMBER + _text("segments"), 1
    yield _LIST + _DICTIONARY + _MARK, 1
    yield _text("address") + _number(0) + _text("total_size") + _address(1 << 46) + _text("blocks") + _LIST, 1
    for block in blocks:
        yield block, 1
    yield _ENTRIES + b"a" + _text("device_traces") + _LIST, 1
    for trace in traces:
        yield from trace
        yield b"a", 1
    yield _ENTRIES + _STOP, 1


def _blocks(count: int) -> Iterator[bytes]:
    fields = _text("size"), _text("state") + _text("active_allocated") + _text("address")
    for first in range(0, count, _BATCH):
        rows = (
            _DICTIONARY
            + _MARK
            + fields[0]
            + _number(512 + number % 99)
            + fields[1]
            + _address((1 << 40) + 1024 * number)
            for number in range(first, first + _BATCH)
        )
        yield _MARK + b"".join(row + _ENTRIES for row in rows) + _ITEMS


def _timed(number: int) -> bytes:
    return _entry(number, _text("time_us") + _number(number))


def _long_trace() -> Iterator[tuple[bytes, int]]:
    """As many entries as the bound allows, the newest million of which are blocks that stay."""
    yield _LIST, 1
    again = _MARK + b"h\x00" * _BATCH + _ITEMS
    yield again * 100, 50
    yield from _batches(_timed, 1_000_000, head=b"")


FILES: dict[str, HostileFile] = {
    "values on the stack": _repeated(b"N", b"(", b"t."),
    "lists": _repeated(_LIST),
    "lists of one item": _repeated(b"]Na", b"("),
    "lists in lists": _repeated(b"]]a", b"("),
    "dictionaries of one entry": _repeated(b"}K\x01Ns", b"("),
    "dictionaries of six entries": _repeated(b"}(K\x01NK\x02NK\x03NK\x04NK\x05NK\x06Nu", b"("),
    "tuples": _repeated(b"N\x85", b"("),
    "tuples in a tuple": _repeated(b"\x85", b"N"),
    "a memo": _repeated(_REMEMBER, b"N"),
    "integers of 16 bytes": _repeated(b"\x8a\x10" + b"\x7f" * 16, b"("),
    "short texts": _repeated(b"\x8c\x02ab", b"("),
    "wide texts": _repeated(b"\x8c\x08" + "\U0001f600".encode() + b"aaaa", b"("),
    "long wide texts": HostileFile(
        pieces=lambda: repeat((_text("\U0001f600".encode() + b"a" * ((16 << 20) - 4)), 1), 20)
    ),
    "one list that grows": _repeated(b"(" + b"N" * 2000 + b"e", _LIST),
    "one dictionary that grows": HostileFile(
        pieces=lambda: (
            (b"}" * (not first) + b"(" + b"".join(_number(n) + b"N" for n in range(first, first + 10_000)) + b"u", 1)
            for first in range(0, 9_000_000, 10_000)
        )
    ),
    "rows": HostileFile(pieces=_rows),
    "rows at once": HostileFile(pieces=_rows_at_once),
    "rows one by one": _repeated(b"h\x00a", _entry(1) + _REMEMBER + _LIST),
    "rows with notes": HostileFile(pieces=lambda: _batches(_with_note, 4_000_000)),
    "rows with stacks": HostileFile(pieces=lambda: _batches(_with_stack, 1_000_000)),
    "rows with pools": HostileFile(pieces=lambda: _batches(_with_pool, 4_000_000)),
    "failed requests": HostileFile(pieces=lambda: _batches(_failed, 5_000_000)),
    "histories": _repeated(b"]h\x00a", _entry(1) + _REMEMBER, nbytes=1 << 21),
    "ballast between kept texts": HostileFile(pieces=_pools, says="ends in the middle"),
    "ballast in an older list": HostileFile(pieces=lambda: _older(b"h\x00" + _BALLAST + b"a" * 1000), says="complete"),
    "ballast in an older number": HostileFile(pieces=lambda: _older(_BALLAST + b"a" * 999 + b"q\x00"), says="number 0"),
    "many blocks and two long histories": HostileFile(
        pieces=lambda: _snapshot(_blocks(499_000), (_long_trace(), _batches(_timed, 1_000_000))),
        status=0,
        says="device 1",
    ),
}
FILES["histories"] = HostileFile(pieces=FILES["histories"].pieces, says="more devices")


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for name, hostile in FILES.items():
            if wanted not in name:
                continue
            path = Path(directory) / "hostile.pickle.gz"
            hostile.write(path)
            found = read(path)
            wrong = found.status != hostile.status or hostile.says not in found.said
            failed |= wrong or found.resident_bytes > BOUND_BYTES
            print(
                f"{name:40} {found.seconds:5.0f} s {found.resident_bytes / 1e6:6,.0f} MB  status {found.status}"
                f"{' WRONG' if wrong else ''}  {found.said.splitlines()[-1][-110:]}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
