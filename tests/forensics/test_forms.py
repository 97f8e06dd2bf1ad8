"""Each action, field and state that torch 2.1 to 2.15 write, one by one: it is read, or refused with a reason."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memtrace.errors import LogFormatError
from memtrace.forensics.loader import load_snapshot
from memtrace.forensics.reading import read_snapshot
from memtrace.forensics.rows import ADDRESSED
from memtrace.forensics.trace import UNKNOWN
from memtrace.record.readings.snapshot_reading import SnapshotMoment
from tests.forensics.snapshots import BASE, SEGMENT, VERSIONS, entry, snapshot, without

ACTIONS = (
    *sorted(ADDRESSED),
    "snapshot",
    "annotate",  # from 2.14 on
    "oom",
    "user_defined",  # 2.4 and 2.5: what a profiler's range said
    "workspace_snapshot",  # none has it: as any that is to come
)
STATES = ("active_allocated", "active_pending_free", "active_awaiting_free", "inactive")
"""What torch's C++ writes, and what its documentation says for the second of them."""
NO_NUMBERS = ("x", -1, 2**70, 1.5, [], {})


def made(action: str, version: str) -> dict[str, Any]:
    """An entry as a version of torch writes it."""
    torch = tuple(map(int, version.split(".")))
    found = entry((torch[0], torch[1]), action, BASE, 512, 1_000_000)
    return {**without(found, "addr"), "device_free": 1 << 20} if action == "oom" else found


def read(tmp_path: Path, found: dict[str, Any], version: str) -> Any:
    """The one entry of a history, or why it is refused."""
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({**snapshot(version), "device_traces": [[found]]}, protocol=4))
    try:
        (read,) = load_snapshot(path).trace(0)
    except LogFormatError as refused:
        return str(refused)
    return read


@pytest.mark.parametrize("version", VERSIONS)
def test_an_entry_of_each_action_without_each_of_its_fields(tmp_path, version):
    """Only what names a block or a segment must say where it is and how large; the rest is then unknown."""
    for action in ACTIONS:
        whole = made(action, version)
        entry_read = read(tmp_path, whole, version)
        assert (entry_read.action, entry_read.size) == (action, 512)
        assert entry_read.address == (UNKNOWN if action == "oom" else BASE)
        assert entry_read.device_free == ((1 << 20) if action == "oom" else UNKNOWN)
        for field in whole:
            found = read(tmp_path, without(whole, field), version)
            if field == "action":
                assert "an entry of a history must be a dictionary with an action" in found
            elif action in ADDRESSED and field in ("addr", "size"):
                assert f"entry 0 of a history: '{action}' must have 'addr' and 'size'" in found
            else:
                assert found.action == action, (action, field)


def test_an_entry_of_each_action_with_other_values_in_each_of_its_fields(tmp_path):
    """A number that is used must be one; where nothing is done with it, and in fields for people, it is unknown."""
    for action in ACTIONS:
        whole = made(action, "2.15")
        for field in ("addr", "size", "stream", "time_us"):
            for value in NO_NUMBERS:
                found = read(tmp_path, {**whole, field: value}, "2.15")
                if action in ADDRESSED:
                    assert f"an entry '{action}' has {field} = {value!r:.40}, which must be an integer" in found
                else:
                    assert found.action == action
        for field in ("device_free", "user_metadata", "pool_id", "compile_context", "internal_metadata"):
            for value in NO_NUMBERS:
                found = read(tmp_path, {**whole, field: value}, "2.15")
                assert (found.action, found.pool) == (action, "")
                note = whole["user_metadata"] if field != "user_metadata" else "x" if value == "x" else ""
                assert found.note == note
        for value in ("x", 7, [7], [[]], [{"filename": 1, "line": 2, "name": "f"}]):
            assert "frame" in read(tmp_path, {**whole, "frames": value}, "2.15")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_block_that_waits_for_another_stream_is_in_use(tmp_path, version):
    """Its free was asked for and has not come: it counts until then, in the segments and in the history."""
    torch = tuple(map(int, version.split(".")))
    actions = [("alloc", number) for number in range(4)]
    actions += [("free_requested", 3), ("free_completed", 3), ("free_requested", 1), ("free_requested", 2)]
    trace = [
        entry((torch[0], torch[1]), action, BASE + 4096 * number, 1000, 1_000_000 + place)
        for place, (action, number) in enumerate(actions)
    ]
    content = snapshot(version)
    block = {"size": 4096, "frames": []}
    content["segments"][0]["blocks"] = [
        {**block, "address": BASE + 4096 * number, "state": state, "requested_size": 0 if state == "inactive" else 1000}
        for number, state in enumerate(STATES)
    ]
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({**content, "device_traces": [trace]}, protocol=4))
    found = load_snapshot(path)
    assert [part.live for part in found.segments[0].blocks] == [True, True, True, False]
    (device,) = read_snapshot(found, "s").devices
    assert device.moments[SnapshotMoment.PEAK].total_bytes == 4000
    assert device.moments[SnapshotMoment.END].total_bytes == 3000
    assert device.fragmentation.free_bytes == 4096
    assert not [note for note in device.notes if "entries of it are missing" in note]


class CppPickler:
    """Writes as torch's own pickler (`_memory_snapshot_pickled`): protocol 2, and each value is named at its end."""

    def __init__(self) -> None:
        self._named: dict[object, int] = {}

    def dump(self, value: Any) -> bytes:
        return b"\x80\x02" + b"".join(self._value(value)) + b"."

    def _value(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, bool):
            yield b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            yield b"K%c" % value if 0 <= value < 256 else b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
        elif isinstance(value, tuple):
            yield from (b"(", *(part for item in value for part in self._value(item)), b"t")
        elif id(value) in self._named or (isinstance(value, str) and value in self._named):
            yield b"j" + self._named[value if isinstance(value, str) else id(value)].to_bytes(4, "little")
        else:
            if isinstance(value, str):
                yield b"X" + len(value).to_bytes(4, "little") + value.encode()
            elif isinstance(value, dict):
                yield from (
                    b"}",
                    b"(",
                    *(p for pair in value.items() for item in pair for p in self._value(item)),
                    b"u",
                )
            else:
                yield from (b"]", b"(", *(part for item in value for part in self._value(item)), b"e")
            number = self._named[value if isinstance(value, str) else id(value)] = len(self._named)
            yield b"r" + number.to_bytes(4, "little")


@pytest.mark.parametrize("version", VERSIONS)
def test_what_torch_writes_without_python_is_read_alike(tmp_path, version):
    """The pickle of a process without an interpreter, which names its values in another order."""
    content = without(snapshot(version), "external_annotations")
    python, other = tmp_path / "python.pickle", tmp_path / "cpp.pickle"
    python.write_bytes(pickle.dumps(content, protocol=4))
    other.write_bytes(CppPickler().dump(content))
    expected, found = load_snapshot(python), load_snapshot(other)
    assert [*found.trace(0)] == [*expected.trace(0)]
    assert found.segments == expected.segments
    assert [*found.stacks] == [*expected.stacks]
    assert found.settings == expected.settings
    assert found.segments[0].size == SEGMENT
