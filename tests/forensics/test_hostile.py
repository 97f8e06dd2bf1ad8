"""The whole command on the files that take the most memory, at the bound it really has."""

from __future__ import annotations

import pytest

from benchmarks.hostile_snapshots import FILES
from benchmarks.read_snapshot import BOUND_BYTES, read

WORST = ("long wide texts", "ballast between kept texts", "lists", "rows at once")
"""Those that took most of `python -m benchmarks.hostile_snapshots` and take few seconds."""


@pytest.mark.long
@pytest.mark.parametrize("name", WORST)
def test_no_file_takes_two_gigabytes(tmp_path, name):
    """Each is refused with its reason and status 2, and the largest resident set of the process stays below."""
    path = tmp_path / "hostile.pickle.gz"
    FILES[name].write(path)
    found = read(path)
    assert (found.status, found.resident_bytes < BOUND_BYTES) == (FILES[name].status, True)
    assert FILES[name].says in found.said
    assert "Traceback" not in found.said
