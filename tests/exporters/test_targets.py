"""The target files by which Prometheus finds the ranks."""

from __future__ import annotations

import json
import os
import socket

import pytest

from memtrace.errors import OutputError
from memtrace.exporters.targets import TargetFile, clear_stale, target_path

URL = "http://127.0.0.1:16369/metrics"


def test_a_target_file_names_the_endpoint(tmp_path):
    """One target with scheme and path, in the form of file_sd."""
    target = TargetFile(target_path(tmp_path / "run", 1), URL)
    assert target.path.name == "target-rank1.json"
    (group,) = json.loads(target.path.read_text())
    assert group["targets"] == ["127.0.0.1:16369"]
    labels = {name: text for name, text in group["labels"].items() if not name.startswith("__meta_memtrace_")}
    assert labels == {"__scheme__": "http", "__metrics_path__": "/metrics"}
    assert group["labels"]["__meta_memtrace_pid"] == str(os.getpid())


def test_targets_of_processes_that_are_gone_are_cleared(tmp_path):
    """That of a live process stays, and one that nobody can judge."""
    for rank in range(4):
        TargetFile(target_path(tmp_path, rank), URL)
    gone, reused, elsewhere = (target_path(tmp_path, rank) for rank in (1, 2, 3))
    for path, label, text in (
        (gone, "pid", "4194305"),  # above the highest number that a process can have
        (reused, "process_start", "1.0"),
        (elsewhere, "host", "another-machine"),
    ):
        groups = json.loads(path.read_text())
        groups[0]["labels"][f"__meta_memtrace_{label}"] = text
        path.write_text(json.dumps(groups))
    (tmp_path / "target-rank9.json").write_text("[]")
    clear_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "target-rank0.json",
        "target-rank3.json",
        "target-rank9.json",
    ]


def test_it_goes_with_the_endpoint(tmp_path):
    """A clean end leaves nothing behind, and may be said twice."""
    target = TargetFile(target_path(tmp_path, 0), URL)
    target.close()
    target.close()
    assert list(tmp_path.iterdir()) == []


def test_a_restart_takes_over_the_file_of_a_killed_run(tmp_path):
    """The file at the path is replaced; the earlier run's late close does not remove the new one."""
    killed = TargetFile(target_path(tmp_path, 0), URL)
    restarted = TargetFile(target_path(tmp_path, 0), "http://127.0.0.1:16370/metrics")
    killed.close()
    assert "16370" in restarted.path.read_text()
    restarted.close()
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_ipv6_keeps_its_brackets(tmp_path):
    """Prometheus wants them."""
    target = TargetFile(target_path(tmp_path, 0), "https://[::1]:9/metrics")
    (group,) = json.loads(target.path.read_text())
    assert group["targets"] == ["[::1]:9"]
    assert group["labels"]["__scheme__"] == "https"


def test_an_endpoint_that_listens_everywhere_is_found_by_its_machine(tmp_path):
    """Nobody can scrape 0.0.0.0."""
    target = TargetFile(target_path(tmp_path, 0), "http://0.0.0.0:9/metrics")
    (group,) = json.loads(target.path.read_text())
    assert group["targets"] == [f"{socket.gethostname()}:9"]


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    """The message names the file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"target file .*target-rank0\.json cannot be written"):
        TargetFile(target_path(tmp_path / "file", 0), URL)
