"""The snapshot that reading is measured with: it is what Python's pickler writes, and memory stays bounded."""

from __future__ import annotations

import pickle
import pickletools

import pytest

from benchmarks.pickled_history import write_snapshot
from benchmarks.read_snapshot import read


def operations(content: bytes) -> list[tuple[str, object]]:
    """All but the frames, whose bounds are the pickler's own."""
    return [
        (operation.name, argument)
        for operation, argument, _ in pickletools.genops(content)
        if operation.name != "FRAME"
    ]


@pytest.mark.parametrize("frames", [0, 1, 30])
def test_the_snapshot_has_the_operations_of_pythons_pickler(tmp_path, frames):
    """Frames of stacks are written once and referred to, as for torch's dictionaries."""
    path = tmp_path / "s.pickle"
    entries = write_snapshot(path, 1000, frames)
    content = path.read_bytes()
    found = pickle.loads(content)
    assert len(found["device_traces"][0]) == entries == 6000
    assert operations(content) == operations(pickle.dumps(found, protocol=4))


@pytest.mark.long
def test_reading_takes_less_than_two_bytes_for_a_byte_of_the_file_beside_python_itself(tmp_path):
    """The whole command on 100 MB, against one on a small file; it says how far it is."""
    small, large = tmp_path / "small.pickle", tmp_path / "large.pickle"
    write_snapshot(small, 1000, 30)
    entries = write_snapshot(large, 100_000_000, 30)
    least, found = read(small), read(large)
    assert least.status == found.status == 0
    assert entries > 400_000
    assert "large.pickle: 64 MiB read" in found.said
    assert found.resident_bytes - least.resident_bytes < 2 * found.file_bytes
