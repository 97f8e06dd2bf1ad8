"""The benchmark of allocator settings, with a history that fits a test."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.allocator import SETTINGS, history, main


def test_the_result_says_what_was_replayed(tmp_path: Path) -> None:
    """So many events under eight settings that differ; the history frees nothing twice and is the same each time."""
    assert main(["--events", "3000", "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu-allocator.json").read_text(encoding="utf-8"))
    assert result["events"] == 3000 and len(set(result["settings"])) == SETTINGS == 8
    made = history(3000)
    freed = [event for event in made.events if event < 0]
    assert len(made.events) == 3000 and len(set(freed)) == len(freed) > 1000
    assert made == history(3000)
