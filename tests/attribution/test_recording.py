"""A traced step as a recording of the allocator: from a real training, to its file, its report and back."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from greedy_training import Training, reports_in
from small_training import make, step

from memtrace import Category, MemoryTracer, Moment, TracerConfig
from memtrace.allocator.recording import AllocatorRecording
from memtrace.attribution import curve, recording
from memtrace.exporters.run_directory.allocator_file import allocator_path, read_recording
from memtrace.oom import allocator_answer, watch
from memtrace.oom.markdown import render_markdown
from memtrace.record.oom.document import encode, parse_report
from memtrace.sources.cuda.settings_variable import variable_for


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes the place of a device: its events are as good."""
    monkeypatch.setattr(curve, "RECORDED", "cpu")


def settings(tmp_path: Path, **changes: object) -> TracerConfig:
    common = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "log_dir": tmp_path}
    return TracerConfig(**common | changes)


def requested(found: AllocatorRecording) -> list[int]:
    """Bytes in use at the begin and after each event, counted from the blocks."""
    sizes = [*found.sizes_at_begin, *(event for event in found.events if event > 0)]
    changes = (event if event > 0 else -sizes[-event - 1] for event in found.events)
    return [*accumulate(changes, initial=sum(found.sizes_at_begin))]


@pytest.mark.usefixtures("recorded")
def test_a_run_leaves_what_its_highest_step_asked_for(tmp_path: Path) -> None:
    """Of three steps the second: its file has each block once, what it was for, and the peak of the step."""
    model, optimizer = make()
    with MemoryTracer(model, optimizer, settings(tmp_path, allocator_recording=True)) as tracer:
        for rows in (6, 48, 6):
            step(model, optimizer, rows)
        history, kept = tracer.history, tracer.allocator_recording
    highest = max(history, key=lambda record: record.moments[Moment.PEAK].total_bytes)
    found = read_recording(allocator_path(tmp_path, 0))
    assert kept is not None
    assert [*found.events] == [*kept.events]
    assert found.origin == f"step {highest.step} of rank 0 on cpu"
    assert 0 not in found.events
    totals = requested(found)
    assert max(totals) == highest.moments[Moment.PEAK].total_bytes
    peak, live = totals.index(max(totals)), {*range(len(found.sizes_at_begin))}
    sizes = [*found.sizes_at_begin]
    for event in found.events[:peak]:
        if event > 0:
            live.add(len(sizes))
            sizes.append(event)
        else:
            live.remove(-event - 1)
    by_category: dict[str, int] = {}
    for block in live:
        category = found.name(block).split(" ")[0]
        by_category[category] = by_category.get(category, 0) + sizes[block]
    expected = {category.value: size for category, size in highest.moments[Moment.PEAK].by_category().items()}
    assert by_category == expected


def test_without_the_setting_there_is_no_file(tmp_path: Path, recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept for a report all the same; a step that allocates too often, and one of a CPU, is not."""
    model, optimizer = make()
    with MemoryTracer(model, optimizer, settings(tmp_path)) as tracer:
        step(model, optimizer)
        kept = tracer.allocator_recording
        assert kept is not None
        monkeypatch.setattr(recording, "MAX_EVENTS", 3)
        step(model, optimizer, 48)
        assert tracer.allocator_recording is kept
    monkeypatch.setattr(curve, "RECORDED", "cuda")
    with MemoryTracer(model, optimizer, settings(tmp_path, allocator_recording=True)) as tracer:
        step(model, optimizer)
        assert tracer.allocator_recording is None
    assert not allocator_path(tmp_path, 0).exists()


def fail(tmp_path: Path, **changes: object) -> None:
    """Trains two steps and fails in two more, each caught and reported by the loop."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, settings(tmp_path, **changes)) as tracer:
        training.step()
        training.step()
        training.fail("optimizer")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
                training.step()
            tracer.report_failure(caught.value)


@pytest.mark.usefixtures("recorded")
def test_a_report_ends_with_what_other_settings_would_have_reserved(tmp_path: Path) -> None:
    """Once for a recording, which is left beside the report; a loop that fails again is not held up again."""
    fail(tmp_path)
    first, second = sorted(reports_in(tmp_path), key=lambda report: report.unix_seconds)
    answer = first.allocator_answer
    assert answer is not None
    assert second.allocator_answer is None
    assert answer.variable == variable_for(torch.__version__)
    assert {"", "expandable_segments:True"} <= {outcome.settings for outcome in answer.outcomes}
    assert sum(outcome.in_force for outcome in answer.outcomes) == 1
    assert parse_report(json.loads(encode(first)), "a test") == first
    text = render_markdown(first).splitlines()
    section = text[text.index("## Other settings of the allocator") :]
    assert not any(line.startswith("## ") for line in section[1:])
    assert any("defaults (in force)" in line for line in section)
    assert read_recording(allocator_path(tmp_path, 0)).origin == answer.origin


@pytest.mark.usefixtures("recorded")
def test_a_failing_process_replays_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long step is held against expandable segments alone, one that is too long against nothing."""
    monkeypatch.setattr(allocator_answer, "MAX_REPLAYED", 1)
    fail(tmp_path / "long")
    answer = min(reports_in(tmp_path / "long"), key=lambda report: report.unix_seconds).allocator_answer
    assert answer is not None
    assert {outcome.settings for outcome in answer.outcomes} == {"", "expandable_segments:True"}
    monkeypatch.setattr(allocator_answer, "MAX_EVENTS", 1)
    fail(tmp_path / "longer")
    assert all(report.allocator_answer is None for report in reports_in(tmp_path / "longer"))


@pytest.mark.usefixtures("recorded")
def test_settings_that_are_not_modelled_have_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is there without it."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    fail(tmp_path)
    reports = reports_in(tmp_path)
    assert len(reports) == 2
    assert all(report.allocator_answer is None for report in reports)
    assert reports[0].composition.by_category()[Category.WEIGHTS]


@pytest.mark.usefixtures("recorded")
def test_a_fault_in_the_replay_costs_the_answer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of the failure is there; memtrace is switched off, and the user's error is the user's."""

    def runs_out(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(watch, "answer", runs_out)
    fail(tmp_path, strict=False)
    (report,) = reports_in(tmp_path)
    assert report.allocator_answer is None
    assert report.remedies
