"""docs/frameworks.md and its configurations, against what the frameworks' runs have noted: versions/frameworks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from versions import frameworks
from versions.frameworks import FRAMEWORKS, PAGE, ROOT, Wrong, checked

CONFIGURATIONS = ROOT / frameworks.EXAMPLES


def test_the_page_is_what_the_runs_have_noted() -> None:
    """Each framework was run, in the version that the list has."""
    assert PAGE.read_text() == frameworks.page()
    noted = {name: found["version"] for name, found in frameworks.results().items()}
    assert noted == {one.name: one.version for one in FRAMEWORKS}


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda one: one.name)
def test_a_configuration_asks_for_memtrace_in_one_way(framework: frameworks.Framework) -> None:
    """By a plugin, or by `memtrace run`, with which the configuration has no word of memtrace's."""
    settings = yaml.safe_load((CONFIGURATIONS / framework.configuration).read_text())
    assert framework.has_plugin == bool(settings.keys() & set(frameworks.OUR_KEYS))
    first, *_ = (CONFIGURATIONS / framework.configuration).read_text().splitlines()
    run = [] if framework.has_plugin else ["memtrace", "run"]
    assert first == "# " + " ".join([*run, *framework.command, f"{frameworks.EXAMPLES}/{framework.configuration}"])


def log_of(directory: Path, *records: dict[str, object]) -> Path:
    path = directory / "steps-rank0.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(step: int, *, total: int) -> dict[str, object]:
    entries = [{"category": "weights", "bytes": 3}, {"category": "inputs", "bytes": 4}]
    return {"step": step, "traced": True, "moments": {"peak": {"allocated_bytes": total, "entries": entries}}}


def test_a_log_is_checked(tmp_path: Path) -> None:
    """A step that is missing, a log without a traced step, and one that does not add up are refused."""
    counted = {"step": 1, "traced": False, "moments": {}}
    found = checked(log_of(tmp_path, counted, record(2, total=7)), 2)
    expected = {"steps": 2, "traced": 1, "peak_bytes": 7, "categories": {"inputs": 4, "weights": 3}}
    assert found == expected
    with pytest.raises(Wrong, match="expected steps 1 to 2, found"):
        checked(log_of(tmp_path, record(2, total=7)), 2)
    with pytest.raises(Wrong, match="no step was traced"):
        checked(log_of(tmp_path, counted), 1)
    with pytest.raises(Wrong, match="peak: 7 of 8 bytes"):
        checked(log_of(tmp_path, record(1, total=8)), 1)
    with pytest.raises(Wrong, match="expected steps 1 to 1, found"):
        checked(tmp_path / "none.jsonl", 1)
