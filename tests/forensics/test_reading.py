"""What a snapshot says: histories that are cut off, notes, stacks, moments, holders, and what memory_viz is given."""

from __future__ import annotations

import json
import pickle
import pickletools
import random
from pathlib import Path
from typing import Any

import pytest

from memtrace.errors import LogFormatError
from memtrace.exporters.reading_table import reading_table
from memtrace.exporters.table import plain_text
from memtrace.forensics import history
from memtrace.forensics.annotated import write_annotated
from memtrace.forensics.attribution.by_note import note_of, parse_note
from memtrace.forensics.attribution.by_stack import RULES
from memtrace.forensics.attribution.expected import sizes_of
from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.history import History, read_history
from memtrace.forensics.loader import load_snapshot
from memtrace.forensics.reading import read_snapshot
from memtrace.record.categories import Category
from memtrace.record.readings.document import document_of
from memtrace.record.readings.snapshot_reading import DeviceReading, SnapshotMoment, Source
from tests.forensics.snapshots import BASE, VERSIONS, snapshot

TRACES = sorted((Path(__file__).parents[1] / "fixtures" / "gpu" / "traces").glob("*.json"))
KIB = 1024


def dumped(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def history_of(tmp_path: Path, content: object) -> History:
    return read_history(load_snapshot(dumped(tmp_path, content)), 0)


def device_of(tmp_path: Path, content: object) -> DeviceReading:
    return read_snapshot(load_snapshot(dumped(tmp_path, content)), "s").devices[0]


def event(action: str, block: int, kib: int = 1, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": BASE + block * 4096, "size": kib * KIB, "stream": 0, **more}


def allocated(block: int, kib: int = 1, **more: Any) -> dict[str, Any]:
    return event("alloc", block, kib, **more)


def freed(block: int, kib: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [event("free_requested", block, kib, **more), event("free_completed", block, kib, **more)]


def content_of(trace: list[dict[str, Any]], live: dict[int, int], **segment: Any) -> dict[str, Any]:
    """A snapshot of one segment with blocks in use at its end, by number, with their KiB."""
    blocks = [
        {"address": BASE + block * 4096, "size": 4096, "requested_size": kib * KIB, "state": "active_allocated"}
        for block, kib in live.items()
    ]
    whole = {"device": 0, "address": BASE, "total_size": 1 << 20, "stream": 0, **segment, "blocks": blocks}
    return {"segments": [whole], "device_traces": [trace]}


def test_what_was_there_before_a_ring_begins_is_found_backwards(tmp_path):
    """Blocks that it frees without an allocation, and blocks at the end that it never allocated."""
    found = history_of(
        tmp_path, content_of([*freed(1, 2), allocated(2, 3), *freed(2, 3), allocated(1, 1)], {1: 1, 7: 5})
    )
    assert found.complete
    assert [total // KIB for total in found.timeline.totals] == [7, 5, 8, 5, 6]
    assert [(life.nbytes // KIB, life.begin, life.end) for life in found.timeline.lifetimes] == [
        (2, -1, 0), (5, -1, None), (3, 1, 2), (1, 3, None),
    ]  # fmt: skip


def test_entries_that_were_lost_are_noticed(tmp_path):
    """A free that is missing between two allocations of one address is put in; the end tells of others."""
    doubled = history_of(tmp_path, content_of([allocated(1, 2), allocated(1, 3)], {1: 3}))
    assert [total // KIB for total in doubled.timeline.totals] == [0, 2, 0, 3]
    assert doubled.complete
    assert not history_of(tmp_path, content_of([allocated(1, 2)], {})).complete
    again = history_of(tmp_path, content_of([*freed(1), *freed(1)], {}))
    assert [total // KIB for total in again.timeline.totals] == [1, 0]
    requested_only = history_of(tmp_path, content_of([allocated(1), event("free_requested", 1)], {}))
    assert requested_only.complete


def test_of_a_history_that_is_too_long_the_newest_entries_are_replayed(tmp_path, monkeypatch):
    """As of a ring that lost the others; the reading says how many, and blocks keep the places of their allocation."""
    monkeypatch.setattr(history, "MAX_REPLAYED", 3)
    content = content_of([allocated(1, 9), *freed(1, 9), allocated(2, 3), *freed(2, 3), allocated(1, 1)], {1: 1, 7: 5})
    found = history_of(tmp_path, content)
    assert found.complete
    assert [total // KIB for total in found.timeline.totals] == [8, 5, 6]
    assert [*found.rows] == [-1, -2, 6]
    assert "its oldest 4 entries are left out" in device_of(tmp_path, content).notes[0]


def test_what_was_reserved_is_counted_backwards(tmp_path):
    """From the segments at the end, over segments that came, went, grew and shrank."""
    trace = [
        allocated(1),
        event("segment_alloc", 100, 64),
        allocated(2),
        event("segment_free", 100, 64),
        event("segment_map", 200, 16),
        *freed(2),
        event("segment_unmap", 200, 8),
    ]
    found = history_of(tmp_path, content_of(trace, {1: 1}))
    assert [size // KIB for size in found.reserved] == [1016, 1080, 1032, 1024]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_recordings_of_an_h200_are_read(tmp_path, path):
    """The history leads to the blocks that were in use, with what the allocator's own counter said at the end."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    device = device_of(tmp_path, recorded["snapshot"])
    end = device.moments[SnapshotMoment.END]
    assert end.total_bytes == recorded["counters"]["requested_bytes"]
    assert (
        max(device.moments[SnapshotMoment.PEAK].reserved_bytes, end.reserved_bytes)
        <= (recorded["counters"]["peak_reserved_bytes"])
    )
    assert not any("missing" in note for note in device.notes)
    assert device.steps >= 1
    assert device.curve is not None
    assert [*map(sum, zip(*device.curve.by_category.values(), strict=True))][-1] == end.total_bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_a_snapshot_of_each_version_gives_every_moment(tmp_path, version):
    """Peak, end and the failed request, with its place, what was free, and the notes of 2.14 and later."""
    device = device_of(tmp_path, snapshot(version))
    assert {moment: row.total_bytes for moment, row in device.moments.items()} == {
        SnapshotMoment.PEAK: 1512, SnapshotMoment.END: 512, SnapshotMoment.FAILURE: 512,
    }  # fmt: skip
    assert device.failure is not None
    assert (device.failure.requested_bytes, device.failure.free_bytes) == (3 << 30, 1 << 20)
    assert device.failure.place == "train.py:7 forward"
    assert device.holders[0].place == "train.py:7 forward"
    sources = {key.source for key in device.moments[SnapshotMoment.PEAK].entries}
    assert (Source.ANNOTATION in sources) == (version in ("2.14", "2.15"))


def test_without_a_history_the_end_is_all_that_is_known(tmp_path):
    """As a snapshot has it that was taken without recording; and one without anything has no device."""
    device = device_of(tmp_path, content_of([], {1: 1, 2: 2}))
    assert device.moments[SnapshotMoment.END].total_bytes == 3 * KIB
    assert "No history was recorded" in device.notes[0]
    assert device.curve is None
    assert (
        read_snapshot(load_snapshot(dumped(tmp_path, {"segments": [], "device_traces": [[], []]})), "s").devices == []
    )


def test_notes_on_blocks_are_believed_first(tmp_path):
    """Of the user, of torch's own categories, and of memtrace; what names no category is passed over."""
    trace = [
        allocated(1, 1, user_metadata="Weights"),
        allocated(2, 2, category="activation"),
        allocated(3, 3, user_metadata="my cache"),
        allocated(4, 4),
        event("annotate", 4, user_metadata="memtrace: optimizer_state exp_avg float32"),
        *freed(4, 4),
        allocated(4, 5),
    ]
    peak = device_of(tmp_path, content_of(trace, {1: 1, 2: 2, 3: 3, 4: 5})).moments[SnapshotMoment.PEAK]
    noted = {key: size // KIB for key, size in peak.entries.items() if key.source is Source.ANNOTATION}
    assert {key.category: size for key, size in noted.items()} == {Category.WEIGHTS: 1, Category.ACTIVATIONS: 2}
    assert peak.total_bytes == 11 * KIB


@pytest.mark.parametrize("category", [category for category in Category if category is not Category.UNATTRIBUTED])
def test_a_note_of_memtrace_says_what_it_was_made_from(category):
    """Category, component and element type come back as they were."""
    for component, dtype in (("", ""), ("exp_avg", "float32"), ("state 4", "16-bit"), ("trainable", "")):
        label = Label(category, component.replace(" ", "_"), dtype, Source.ANNOTATION)
        assert parse_note(note_of(label)) == label


@pytest.mark.parametrize("text", ["", "memtrace:", "memtrace: ", "weights of my model", "unattributed", "unknown", "7"])
def test_a_note_that_names_no_category_says_nothing(text):
    """A sentence is nobody's category."""
    assert parse_note(text) is None


def test_stacks_tell_where_nothing_better_does(tmp_path):
    """Each rule is met by a stack that is made after it; the user's own file names the place."""
    own = {"filename": "/home/me/train.py", "line": 3, "name": "main"}
    for rule in RULES:
        file = f"/site-packages/{rule.file or 'aten/src/ATen/x.cpp'}"
        frame = {"filename": file + ("adamw.py" if file.endswith("/") else ""), "line": 1, "name": rule.function or "f"}
        kept = rule.lasting.value != "of a step"
        humps = [
            part
            for _ in range(3)
            for part in (allocated(2, 40), allocated(3, 1, frames=[frame, own]), *freed(3), *freed(2, 40))
        ]
        trace = [allocated(1, 1, frames=[frame, own]) if kept else allocated(1, 1), *humps]
        peak = device_of(tmp_path, content_of(trace, {1: 1}))
        entries = peak.moments[SnapshotMoment.PEAK if not kept else SnapshotMoment.END].entries
        assert any(key[:2] == (rule.category, rule.component) and key.source is Source.STACK for key in entries), rule
        assert rule.seen
    assert any(holder.place == "train.py:3 main" for holder in peak.holders)


def test_a_steps_blocks_are_told_by_their_lives(tmp_path):
    """Kept from the rise to the fall: activations; made and freed on the way: temporaries; the rest is unattributed."""
    step = [
        *(allocated(number, 4) for number in range(10, 19)),
        allocated(30, 1), *freed(30, 1),
        allocated(19, 4),
        *(part for number in reversed(range(10, 20)) for part in freed(number, 4)),
    ]  # fmt: skip
    device = device_of(tmp_path, content_of([allocated(1, 3), *step, *step, *step], {1: 3}))
    assert device.steps == 3
    peak = device.moments[SnapshotMoment.PEAK].by_category()
    assert peak == {Category.ACTIVATIONS: 40 * KIB, Category.UNATTRIBUTED: 3 * KIB}
    assert device.curve is not None
    assert max(device.curve.by_category[Category.TEMPORARIES]) == KIB


def test_memory_viz_is_given_categories_in_the_form_that_it_reads(tmp_path):
    """Protocol 4 with its operations, `unknown` among the categories, an allocation for each block, and read back."""
    path, out = dumped(tmp_path, snapshot("2.15")), tmp_path / "out.pickle"
    write_annotated(load_snapshot(path), None, out)
    data = out.read_bytes()
    assert data[:2] == b"\x80\x04"
    assert {operation.name for operation, _, _ in pickletools.genops(data)} <= MEMORY_VIZ_READS
    written = pickle.loads(data)
    entries = written["device_traces"][0]
    assert "unknown" in {entry.get("category") for entry in entries}
    assert {entry["category"] for entry in entries if entry["action"] == "alloc"} >= {"weights"}
    assert len(written["segments"]) == 1
    before, after = (read_snapshot(load_snapshot(file), "s").devices[0] for file in (path, out))
    for moment, row in before.moments.items():
        assert after.moments[moment].by_category() == row.by_category()


MEMORY_VIZ_READS = {
    "APPEND", "APPENDS", "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINPUT", "LONG_BINPUT",
    "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LONG1", "MARK", "MEMOIZE",
    "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
"""Operations of its own reader, by their names in Python's pickletools."""


def test_blocks_from_before_a_history_are_given_an_allocation(tmp_path):
    """memory_viz takes no category from segments: such blocks would all be unknown."""
    path, out = dumped(tmp_path, content_of([*freed(1, 2), allocated(2, 3)], {2: 3, 7: 5})), tmp_path / "out.pickle"
    write_annotated(load_snapshot(path), None, out)
    entries = pickle.loads(out.read_bytes())["device_traces"][0]
    assert [(entry["action"], entry["size"] // KIB) for entry in entries] == [
        ("snapshot", 0), ("alloc", 2), ("alloc", 5), ("free_requested", 2), ("free_completed", 2), ("alloc", 3),
    ]  # fmt: skip


def test_histories_that_make_no_sense_are_read_or_refused(tmp_path):
    """Entries with any address, size, time, action and order: each reading, table and annotated pickle is made."""
    chosen = random.Random(7)
    model, path, out, read = sizes_of([(10, 100), (25,), (512,)], [64]), tmp_path / "s.pickle", tmp_path / "o.pickle", 0
    numbers = [0, 1, 1 << 40, (1 << 63) - 1, BASE, BASE + 1024, BASE + 4096]
    values: dict[str, list[Any]] = {
        "addr": numbers, "size": numbers[:3], "time_us": numbers[:3], "stream": numbers,
        "action": ["alloc", "free_completed", "free_requested", "oom", "segment_free", "segment_map", "other"],
        "user_metadata": ["weights", "memtrace: optimizer_state x", "a b"], "category": ["unknown", "gradient"],
    }  # fmt: skip
    for number in range(300):
        content = snapshot(chosen.choice(VERSIONS))
        trace = [dict(entry) for entry in content["device_traces"][0]]
        for _ in range(chosen.randrange(1, 30)):
            name = chosen.choice([*values])
            chosen.choice(trace)[name] = chosen.choice(values[name])
        if number % 3 == 0:
            chosen.shuffle(trace)
        content["device_traces"][0] = trace * (1 + number % 2)
        path.write_bytes(pickle.dumps(content))
        try:
            loaded = load_snapshot(path)
        except LogFormatError:
            continue
        reading = read_snapshot(loaded, "s", model)
        json.dumps(document_of([reading]), allow_nan=False)
        plain_text(reading_table(reading))
        for device in reading.devices:
            assert all(size >= 0 for row in device.moments.values() for size in row.entries.values())
        write_annotated(loaded, model, out)
        load_snapshot(out)
        read += 1
    assert read > 100
