"""Files of snapshots: what is read, what is refused and why; nothing of them is run, and memory is bounded."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import tracemalloc
from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from memtrace.errors import LogFormatError, OutputError
from memtrace.forensics import plain_pickle
from memtrace.forensics.loader import load_snapshot
from memtrace.forensics.plain_pickle import PlainPickle
from memtrace.forensics.rows import Rows
from memtrace.forensics.trace import Frame
from tests.forensics.snapshots import ACTIONS, BASE, SEGMENT, VERSIONS, parts, snapshot


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_action_and_field_of_a_version_is_read(tmp_path, version, protocol):
    """Actions, sizes, times, stacks, notes, segments and settings, whatever torch and protocol wrote them."""
    found = load_snapshot(write(tmp_path / "s.pickle", snapshot(version), protocol))
    entries = [*found.trace(0)]
    expected = [row for row in ACTIONS if row[0] != "annotate" or version in ("2.14", "2.15")]
    assert [(entry.action, entry.address, entry.size) for entry in entries[:-1]] == expected
    assert (entries[-1].action, entries[-1].size, entries[-1].device_free) == ("oom", 3 << 30, 1 << 20)
    assert entries[0].time_us == (-1 if version == "2.1" else 1_000_000)
    assert {entry.note for entry in entries} == ({"", "weights"} if version in ("2.14", "2.15") else {""})
    assert [*found.stacks] == [
        (Frame("train.py", 7, "forward"), Frame("torch/nn/modules/module.py", 1700, "_call_impl"))
    ]
    (segment,) = found.segments
    assert (segment.device, segment.address, segment.size, segment.expandable) == (0, BASE, SEGMENT, False)
    assert [(block.address, block.requested, block.live) for block in segment.blocks] == [
        (BASE, 0, False), (BASE + 1024, 512, True), (BASE + 1536, 0, False),
    ]  # fmt: skip
    assert found.settings["max_split_size"] == -1
    assert found.devices == [0]


def test_a_compressed_snapshot_and_one_without_a_memo_are_read(tmp_path):
    """As gzip writes it, and as a pickler in its fast mode does, which says everything anew."""
    packed = write(tmp_path / "s.pickle.gz", gzip.compress(pickle.dumps(snapshot())))
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.fast = True
    pickler.dump(snapshot())
    for path in (packed, write(tmp_path / "fast.pickle", buffer.getvalue())):
        found = load_snapshot(path)
        assert len(found.trace(0)) == len(ACTIONS)
        assert len(found.stacks) == 1


def test_added_fields_and_unknown_actions_are_no_mistake(tmp_path):
    """What a later torch may add is passed over, whatever plain data it is."""
    content: dict[str, Any] = snapshot()
    content["new"] = {"a": [1.5, None, (True, b"bytes"), {"b": {1: 2**70}}]}
    content["device_traces"][0].append({"action": "trim", "addr": "nowhere", "size": None, "why": [[]]})
    content["segments"][0]["new"] = content["new"]
    found = load_snapshot(write(tmp_path / "s.pickle", content))
    assert [*found.trace(0)][-1].action == "trim"


def test_histories_beyond_one_batch_keep_what_they_share(tmp_path):
    """Frames, stacks and names that entries of other batches refer to are those that were meant."""
    frames = [{"filename": f"f{number}.py", "line": number, "name": "call"} for number in range(50)]
    stacks = [[frames[number], frames[(number * 7) % 50]] for number in range(50)]
    trace = [
        {"action": "alloc", "addr": number, "size": 1, "frames": stacks[number * 13 % 50], "time_us": number}
        for number in range(5000)
    ]
    traces = [trace, [dict(row) for row in trace[:3]]]
    found = load_snapshot(write(tmp_path / "s.pickle", {"segments": [], "device_traces": traces}))
    for entry, row in zip(found.trace(0), trace, strict=True):
        assert [frame._asdict() for frame in found.stacks[entry.stack]] == row["frames"]
    assert len(found.stacks) == 50
    assert [*found.trace(1)] == [*found.trace(0)][:3]


class Runs:
    """Would make a file if a reader ran it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self._path),))


HOSTILE = {
    "a global": parts(b"cos\nsystem\n."),
    "a global by the stack": parts(b"\x8c\x02os\x8c\x06system\x93."),
    "a call": parts(b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R."),
    "an extension": parts(b"\x82\x01."),
    "an instance": parts(b"(ios\nsystem\n."),
    "an object": parts(b"(cos\nsystem\no."),
    "a persistent id": parts(b"Pnowhere\n."),
    "a build": parts(b"}}b."),
    "deep marks": parts(b"(" * 100_000),
    "deep lists": parts(b"]" * 300_000, b"a" * 299_999, b"."),
    "deep tuples as a key": parts(b"}", b")" + b"\x85" * 200_000, b"Ns."),
    "a list as a key": parts(b"}]Ns."),
    "one huge number in the memo": parts(b"Nr\xff\xff\xff\x7f."),
    "a text that claims 4 GB": parts(b"X\xff\xff\xff\xffabc."),
    "a text that claims 2**64 bytes": parts(b"\x8d" + b"\xff" * 8 + b"abc."),
    "an integer of 255 bytes": parts(b"\x8a\xff" + b"\x7f" * 255 + b"."),
    "text that is not UTF-8": parts(b"\x8c\x01\xff."),
    "nothing on the stack": parts(b"a."),
    "a mark that nobody set": parts(b"e."),
    "a tuple of more than there is": parts(b"N\x87."),
    "items for a number": parts(b"K\x01Na."),
    "entries for a list": parts(b"]NNs."),
    "odd entries": parts(b"}(NNNu."),
    "an unknown number of the memo": parts(b"h\x05."),
    "two values": parts(b"NN."),
    "no value": parts(b"."),
    "an empty file": b"",
    "protocol 0": b"(dp0\n.",
    "protocol 6": b"\x80\x06}.",
    "text": b"not a pickle at all, but a longer text",
    "a zip file": b"PK\x03\x04....",
    "a cut gzip file": gzip.compress(pickle.dumps(snapshot()))[:-20],
    "a broken gzip file": b"\x1f\x8bgarbage",
    "a list that has itself": parts(b"]\x94h\x00a."),
    "an item for a list that was complete": parts(b"]\x94]h\x00Naa."),
    "an entry for a dictionary that was complete": parts(b"(}\x94}h\x00K\x01Nst."),
    "an item for one that a tuple has": parts(b"]\x94\x85(h\x00Nae."),
    "a number of the memo that is taken": parts(b"Nq\x00Nq\x00."),
    "entries of a history after other values": parts(b"]Na(}\x8c\x06action\x8c\x05allocse."),
    "other values after entries of a history": parts(
        b"](}(\x8c\x06action\x8c\x05alloc\x8c\x04addrK\x01\x8c\x04sizeK\x01ueNa."
    ),
    "histories of 2,000 devices": pickle.dumps(
        {
            **snapshot(),
            "device_traces": [snapshot()["device_traces"][0][:1]]
            + [[dict(entry)] for entry in snapshot()["device_traces"][0][:1] * 2000],
        }
    ),
    "a stack of a million frames": parts(
        b"}(\x8c\x06action\x8c\x05alloc\x8c\x04addrK\x01\x8c\x04sizeK\x01\x8c\x06frames](" + b"N" * 1_000_000 + b"eu"
        b"\x94](h\x00e."
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(tmp_path, name):
    """Each ends in the one error that says which file and what was wrong."""
    path = write(tmp_path / "s.pickle", HOSTILE[name])
    with pytest.raises(LogFormatError, match=r"s\.pickle: \w.{12,}"):
        load_snapshot(path)


def test_what_a_file_names_is_never_run(tmp_path):
    """A value that calls a function when it is read is refused before the call."""
    for place in ("settings", "entry", "key"):
        content: dict[Any, Any] = snapshot()
        trap = Runs(tmp_path / "made")
        if place == "settings":
            content["allocator_settings"] = trap
        elif place == "entry":
            content["device_traces"][0][0]["frames"] = trap
        else:
            content["more"] = [trap]
        with pytest.raises(LogFormatError, match="memtrace runs nothing that a file brings"):
            load_snapshot(write(tmp_path / "s.pickle", content))
    assert not (tmp_path / "made").exists()


def changed(path: str, value: object) -> dict[str, Any]:
    """A snapshot with one field at a path such as `segments/0/address` replaced, or removed where it is None."""
    content: Any = snapshot()
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = content
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("segments", None, "must be a dictionary with 'segments' and 'device_traces'"),
        ("segments", 7, "segments must be a list, got int"),
        ("device_traces", {}, "device_traces must be a list, got dict"),
        ("segments/0", "x", "segment 0 must be a dictionary, got str"),
        ("segments/0/address", None, "segment 0 has address = None"),
        ("segments/0/total_size", -1, "segment 0 has total_size = -1"),
        ("segments/0/total_size", True, "segment 0 has total_size = True"),
        ("segments/0/device", 5000, "device 5000"),
        ("segments/0/blocks", 1, "'blocks' of segment 0 must be a list"),
        ("segments/0/blocks/1/size", 2**64, "block 1 of segment 0 has size"),
        ("segments/0/blocks/1/state", "gone", "block 1 of segment 0 has state = 'gone'"),
        ("segments/0/blocks/1/frames", 3, "'frames' must be a list of frames"),
        ("segments/0/blocks/1/frames", [3], "a frame must be a dictionary"),
        ("device_traces/0/0/action", 3, "must be a dictionary with an action"),
        ("device_traces/0/2/addr", None, "'alloc' must have 'addr' and 'size'"),
        ("device_traces/0/2/size", -5, "'alloc' has size = -5"),
        ("device_traces/0/2/size", 2**60, "'alloc' has size = 1152921504606846976, which must be an integer, 0 to"),
        ("device_traces/0/2/time_us", 2**62, "'alloc' has time_us"),
        ("device_traces/0/2/addr", 1.5, "'alloc' has addr = 1.5"),
        ("device_traces/0/2/frames", [{"line": 1}], "a frame must be a dictionary with filename, line and name"),
    ],
)  # fmt: skip
def test_a_field_that_is_used_must_have_its_form(tmp_path, path, value, said):
    """The message names the place, what was found and what it must be."""
    with pytest.raises(LogFormatError, match=re.escape(said)):
        load_snapshot(write(tmp_path / "s.pickle", changed(path, value)))


def test_a_file_that_is_not_there_is_another_error(tmp_path):
    """As every file that is asked for and cannot be opened."""
    with pytest.raises(OutputError, match="cannot be read"):
        load_snapshot(tmp_path / "none.pickle")
    with pytest.raises(OutputError, match="cannot be read"):
        load_snapshot(tmp_path)


def test_two_thousand_spoiled_files_are_read_or_refused(tmp_path):
    """Cut off, with bytes changed, removed, doubled or swapped: no other error, and no wrong kind of value."""
    chosen = random.Random(21)
    sources = [pickle.dumps(snapshot(version), protocol) for version in VERSIONS for protocol in (2, 4)]
    path, read = tmp_path / "s.pickle", 0
    for number in range(2000):
        data = bytearray(sources[number % len(sources)])
        if number % 4 == 0:
            del data[chosen.randrange(len(data)) :]
        for _ in range(chosen.randrange(1, 6) if number % 4 else 0):
            at = chosen.randrange(len(data))
            part = bytes(data[at : at + chosen.randrange(1, 40)])
            kind = chosen.randrange(4)
            if kind == 0:
                data[at] = chosen.randrange(256)
            elif kind == 1:
                del data[at : at + len(part)]
            elif kind == 2:
                data[at:at] = part
            else:
                data[at : at + len(part)] = part[::-1]
        path.write_bytes(bytes(data))
        try:
            found = load_snapshot(path)
        except LogFormatError:
            continue
        read += 1
        assert all(isinstance(entry.address, int) for trace in found.traces for entry in trace)
    assert 0 < read < 1500


def _text(length: int, mark: int) -> bytes:
    return b"X" + length.to_bytes(4, "little") + bytes([97 + mark % 26]) * length


def _entry(number: int, more: bytes) -> bytes:
    return (
        b"}(\x8c\x06action\x8c\x05alloc\x8c\x04addrJ"
        + number.to_bytes(4, "little")
        + b"\x8c\x04sizeK\x01"
        + more
        + b"u"
    )


def _failures(batch: int) -> bytes:
    entries = (_entry(100 * batch + number, b"\x8c\x0bdevice_freeJ\xff\xff\xff\x7f") for number in range(100))
    return b"(" + b"".join(entries).replace(b"\x05alloc", b"\x03oom") + b"e"


def _frames(number: int) -> bytes:
    frame = b"}\x94(\x8c\x08filename\x8c\x01f\x8c\x04lineJ" + number.to_bytes(4, "little") + b"\x8c\x04name\x8c\x01nu"
    return b"\x8c\x06frames]\x94" + frame + b"a"


def _batches(more: Any) -> Iterable[bytes]:
    """Entries of a history without end, in batches of 100."""
    for batch in range(10**9):
        yield b"(" + b"".join(_entry(100 * batch + number, more(100 * batch + number)) for number in range(100)) + b"e"


ENDLESS: dict[str, Any] = {
    "constants": lambda: repeat(b"N" * 4096),
    "dictionaries": lambda: repeat(b"}" * 4096),
    "memorised lists": lambda: repeat(b"]\x94" * 4096),
    "a memo": lambda: chain([b"N"], repeat(b"\x94" * 4096)),
    "integers": lambda: repeat(b"J\xff\xff\xff\x7f" * 1000),
    "large integers": lambda: repeat((b"\x8a\x09" + b"\x7f" * 9) * 500),
    "one list that grows": lambda: chain([b"]\x94"], repeat(b"(" + b"h\x00" * 2000 + b"e")),
    "long texts": lambda: (_text(100_000, number) for number in range(10**9)),
    "wide texts": lambda: repeat(b"\x8c\xf8" + "\U0001f600".encode() + b"a" * 244),
    "tuples": lambda: chain([b"N"], repeat(b"\x85" * 4096)),
    "entries": lambda: chain([b"]"], _batches(lambda _: b"")),
    "entries with notes": lambda: chain(
        [b"]"], _batches(lambda number: b"\x8c\x0duser_metadata\x8c\xf0" + b"%0240d" % number + _PADDING)
    ),
    "entries with stacks": lambda: chain([b"]"], _batches(_frames)),
    "values on the stack": lambda: chain([b"("], repeat(b"N" * 4096)),
    "lists of one item": lambda: repeat(b"]Na" * 1000),
    "dictionaries of one number": lambda: repeat(b"}K\x01Ns" * 1000),
    "gaps in the memo": lambda: chain([b"N"], (b"r" + (101 * number).to_bytes(4, "little") for number in range(10**6))),
    "one entry again and again": lambda: chain([_entry(1, b"") + b"\x94]"], repeat(b"(" + b"h\x00" * 1000 + b"e")),
    "one entry again and again, one by one": lambda: chain([_entry(1, b"") + b"\x94]"], repeat(b"h\x00a" * 1000)),
    "entries with pools": lambda: chain(
        [b"]"], _batches(lambda number: b"\x8c\x07pool_idK\x07J" + number.to_bytes(4, "little") + b"\x86\x94")
    ),
    "failed requests": lambda: chain([b"]"], (_failures(batch) for batch in range(10**9))),
    "entries with ballast": lambda: chain([b"]"], _batches(lambda _: b"\x8c\x01x(" + b"]\x94" * 20 + b"t\x94")),
}
_PADDING = b"".join(b"\x8c\x01" + bytes([97 + number]) + b"N" for number in range(6))


@pytest.mark.parametrize("name", ENDLESS)
def test_memory_is_bounded_whatever_a_file_says(monkeypatch, name):
    """A pickle without an end is refused once it holds too much, and what it took is at most 1.6 times the bound."""
    bound = 3 << 20
    monkeypatch.setattr(plain_pickle, "MAX_HELD", bound)
    monkeypatch.setattr(plain_pickle, "MAX_READ", 16 << 20)
    monkeypatch.setattr(plain_pickle, "_CHUNK", 1 << 16)
    pieces = chain([b"\x80\x04"], ENDLESS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(LogFormatError, match=r"holds more than|is longer than"):
            PlainPickle(lambda _: next(pieces), Rows()).load()
        assert tracemalloc.get_traced_memory()[1] < 1.6 * bound
    finally:
        tracemalloc.stop()


def test_reading_tells_how_far_it_is(tmp_path, monkeypatch):
    """Progress ascends and ends with the size of the file."""
    monkeypatch.setattr(plain_pickle, "_CHUNK", 1000)
    path, seen = write(tmp_path / "s.pickle", snapshot()), []
    load_snapshot(path, seen.append)
    assert seen == sorted(seen)
    assert abs(seen[-1] - path.stat().st_size) < 1000
