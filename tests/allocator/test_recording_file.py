"""A recording of the allocator as a file: written and read again, and refused where its events do not fit together."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from memtrace.allocator.recording import AllocatorRecording, parse_recording, recording_document
from memtrace.errors import LogFormatError, OutputError
from memtrace.exporters.run_directory import allocator_file
from memtrace.exporters.run_directory.allocator_file import allocator_path, read_recording, write_recording

RECORDING = AllocatorRecording(
    sizes_at_begin=[1000, 512],
    events=[4096, -1, 0, 2048, -3],
    settings="expandable_segments:True",
    torch="2.13.0",
    origin="step 3",
    rank=1,
    limit_bytes=1 << 34,
    peak_reserved_bytes=2 << 20,
    failed_bytes=7,
    names=["weights trainable bfloat16", ""],
    labels=[0, 0, 1, 1],
    addresses=[512, 2048, 4096, 8192],
    streams=[0, 0, 1, 1],
)


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    """All fields, in a file named after the rank, whole or not at all."""
    path = write_recording(tmp_path, RECORDING)
    assert path == allocator_path(tmp_path, 1)
    found = read_recording(path)
    assert recording_document(found) == recording_document(RECORDING)
    assert (found.blocks, found.name(0), found.name(3)) == (4, "weights trainable bfloat16", "")
    assert [file.name for file in tmp_path.iterdir()] == ["allocator-rank1.json.gz"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_recording(tmp_path / "none", RECORDING)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "memtrace.step/1"}, "schema"),
        ({"events": [-9]}, r"events\[0\] frees block 8"),
        ({"events": [-1, -1]}, r"events\[1\] frees block 0"),
        ({"events": [4096.5]}, "events must be integers"),
        ({"events": [True]}, "events must be integers"),
        ({"events": [1 << 60]}, "events must be integers"),
        ({"events": {}}, "events must be an array"),
        ({"sizes_at_begin": [0, 5]}, "above 0"),
        ({"sizes_at_begin": [-5, 5]}, "sizes_at_begin must be integers"),
        ({"labels": [0]}, "one number for each block"),
        ({"labels": [0, 0, 2, 1]}, "labels must be integers"),
        ({"addresses": [-1, 0, 0, 0]}, "addresses"),
        ({"streams": [0, 0]}, "one number for each block"),
        ({"streams": [0, 0, 0, 5000]}, "streams must be integers"),
        ({"failed_bytes": 0}, "failed_bytes"),
        ({"rank": -1}, "rank"),
        ({"from_the_start": 1}, "from_the_start"),
        ({"settings": None}, "settings"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], said: str) -> None:
    """The message names the file and the field."""
    with pytest.raises(LogFormatError, match=said) as caught:
        parse_recording(recording_document(RECORDING) | change, "a file")
    assert str(caught.value).startswith("a file: ")


def test_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is cut off, turned over or too large: one error, no other."""
    whole = write_recording(tmp_path, RECORDING).read_bytes()
    chosen = random.Random(1)
    path = tmp_path / "damaged.json.gz"
    for _ in range(200):
        data = bytearray(whole)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data[: chosen.randrange(len(data) + 1)])
        try:
            read_recording(path)
        except LogFormatError as error:
            assert str(path) in str(error)
    for content in (b"", b"{}", gzip.compress(b"{}"), gzip.compress(b"[" * 100_000), gzip.compress(b"NaN")):
        path.write_bytes(content)
        with pytest.raises(LogFormatError):
            read_recording(path)
    with pytest.raises(LogFormatError, match="cannot be read"):
        read_recording(tmp_path / "none.json.gz")
    monkeypatch.setattr(allocator_file, "MAX_UNPACKED", 1 << 20)
    path.write_bytes(gzip.compress(json.dumps("a" * (2 << 20)).encode()))
    with pytest.raises(LogFormatError, match="at most 1 MiB"):
        read_recording(path)
