"""`memtrace allocator`: from a run's directory and from a snapshot, as a table and as JSON, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from records import traced_step

from memtrace.allocator.recording import recording_document
from memtrace.cli import main
from memtrace.exporters.run_directory.allocator_file import read_recording
from memtrace.exporters.run_directory.steplog import StepLog, step_log_path
from tests.allocator.allocator_histories import second_step
from tests.forensics.snapshots import snapshot

FIXTURE = Path(__file__).parents[1] / "fixtures" / "allocator_recordings" / "allocator-rank0.json.gz"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has failed in its second step, as its directory has it."""
    (tmp_path / "out" / "memtrace").mkdir(parents=True)
    shutil.copy(FIXTURE, tmp_path / "out" / "memtrace")
    return tmp_path / "out"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says of what it cannot do."""
    assert main(["allocator", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_fixture_is_the_history_of_the_tests() -> None:
    """It is made by `write_recording(..., second_step())`."""
    assert recording_document(read_recording(FIXTURE)) == recording_document(second_step())


def test_the_settings_are_ranked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one fits where the one in force does not; the line to export and the pins are there."""
    assert main(["allocator", str(run_dir), "--what-if", "--setting", "max_split_size_mb:256"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if " yes " in line or " no " in line]
    assert rows[0][0] == "expandable_segments:True"
    assert "yes" in rows[0]
    assert any(row[0] == "max_split_size_mb:256" for row in rows)
    assert "a request of 100.00 MiB failed; by the model, too" in shown
    assert "\nexport PYTORCH_ALLOC_CONF=expandable_segments:True\n" in shown
    assert "1.56 GiB free in 40 fragments when the request failed" in shown
    assert "60.00 MiB optimizer_state exp_avg float32 at 0x7f" in shown


def test_without_what_if_there_is_the_setting_in_force(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fragments, and no advice."""
    assert main(["allocator", str(run_dir / "memtrace")]) == 0
    shown = capsys.readouterr().out
    assert "fragments" in shown
    assert "export" not in shown


def test_a_narrow_terminal(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are what is still to be read there."""
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["allocator", str(run_dir), "--what-if"]) == 0
    assert "expandable_segments" in capsys.readouterr().out.partition("export")[0]


def test_json_and_another_limit(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a little more memory the setting in force fits, too; collecting says what it needs."""
    assert main(["allocator", str(run_dir), "--what-if", "--json", "--limit", "12GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "memtrace.allocator/1"
    assert (found["limit_bytes"], found["failed_bytes"], found["events"]) == (12 << 30, 100 << 20, 220)
    assert all(outcome["fits"] for outcome in found["outcomes"])
    assert found["outcomes"][0]["saved_bytes"] > 1 << 30
    assert found["fragments"][0]["pins"][0]["what"].startswith("optimizer_state")


def test_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its version is not known: both names of the variable are said where there is something to set."""
    path = tmp_path / "s.pickle"
    found = snapshot()
    base, grown = 0x7F0000000000, []
    for at in range(12):  # each a little larger than the one before
        entry = {"addr": base + (at << 30), "size": (100 + 2 * at) << 20, "stream": 0, "time_us": at, "frames": []}
        grown += [{**entry, "action": "alloc"}, {**entry, "action": "free_completed"}]
    path.write_bytes(pickle.dumps({**found, "segments": [], "device_traces": [grown]}, protocol=4))
    assert main(["allocator", str(path), "--what-if"]) == 0
    shown = capsys.readouterr().out
    assert "recorded" not in shown  # no segment was
    assert "s.pickle, device 0 · settings: defaults · 24 allocations and frees" in shown
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True  # PYTORCH_CUDA_ALLOC_CONF before torch 2.10" in shown
    assert "no history of device 7" in refused(capsys, path, "--device", 7)


def test_collecting_needs_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the setting in force collects and nobody knows of how much, the command asks for it, and takes it."""
    path = tmp_path / "s.pickle"
    entry = {"addr": 0x7F0000000000, "stream": 0, "time_us": 1, "frames": []}
    pairs = [
        {**entry, "action": action, "size": size << 20} for size in (300, 400) for action in ("alloc", "free_completed")
    ]
    settings = {"expandable_segments": False, "garbage_collection_threshold": 0.2}
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [pairs], "allocator_settings": settings}))
    said = "so the model collects no garbage: give it with --limit"
    assert main(["allocator", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"][0]["reserved_bytes"] == 700 << 20
    assert main(["allocator", str(path)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["allocator", str(path), "--limit", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcomes"][0]["reserved_bytes"] == 400 << 20
    assert main(["allocator", str(path), "--limit", "1GiB"]) == 0
    assert said not in " ".join(capsys.readouterr().out.split())


def test_a_setting_that_saves_nothing_is_not_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is short then is memory."""
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps(snapshot(), protocol=4))
    assert main(["allocator", str(path), "--what-if"]) == 0
    assert "No other setting needs noticeably less" in capsys.readouterr().out


def test_a_run_on_a_cpu_has_no_such_allocator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says so; of a run on a GPU without a recording it says how to get one."""
    with StepLog(step_log_path(tmp_path, 0)) as log:
        log.write(traced_step(device="cpu"))
    assert "a CPU, which has no caching allocator" in refused(capsys, tmp_path, "--what-if")
    with StepLog(step_log_path(tmp_path, 0)) as log:
        log.write(traced_step(device="cuda:0", step=99))
    assert "set allocator_recording=True" in refused(capsys, tmp_path, "--what-if").replace("\n", " ")


def test_what_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with one line that says what is wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "text").write_text("hello")
    assert "there is no recording" in refused(capsys, tmp_path / "empty")
    assert "no recording of rank 3, only of 0" in refused(capsys, run_dir, "--rank", 3)
    assert "--limit must be above 0" in refused(capsys, run_dir, "--limit", 0)
    assert "a size must be" in refused(capsys, run_dir, "--limit", "much")
    assert "key:value" in refused(capsys, run_dir, "--setting", "large")
    assert "cannot be read" in refused(capsys, tmp_path / "other.json.gz")
    assert "cannot be read" in refused(capsys, tmp_path / "none")
    assert "text" in refused(capsys, tmp_path / "text")
