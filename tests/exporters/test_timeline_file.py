"""The timeline of the fullest step: written by a real tracer, read back, and refused where it is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import traced_step
from small_training import make, step

from memtrace import MemoryTracer, TracerConfig
from memtrace.errors import LogFormatError, OutputError
from memtrace.exporters.run_directory.timeline_file import (
    read_timeline,
    read_timelines,
    timeline_path,
    timelines_path,
    write_timeline,
)
from memtrace.record.breakdown import StepCurve
from memtrace.record.categories import Category, Moment

CURVE = StepCurve(
    seconds=(0.0, 0.5), by_category={Category.WEIGHTS: (4, 4), Category.TEMPORARIES: (0, 2)}, moments={Moment.PEAK: 0.5}
)


def test_a_run_leaves_the_timeline_of_its_fullest_step(tmp_path: Path) -> None:
    """Of steps on 6, 48 and 6 rows the second one is kept, and the highest point of its curve is its peak."""
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "log_dir": tmp_path}
    with MemoryTracer(model, optimizer, TracerConfig(**settings)) as tracer:
        for rows in (6, 48, 6):
            step(model, optimizer, rows)
        history = tracer.history
    found = read_timeline(timeline_path(tmp_path, 0))
    assert found is not None
    fullest = history[found.step - 1]
    assert fullest.moments[Moment.PEAK].total_bytes == max(r.moments[Moment.PEAK].total_bytes for r in history)
    totals = [sum(sizes) for sizes in zip(*found.curve.by_category.values(), strict=True)]
    assert max(totals) == fullest.moments[Moment.PEAK].total_bytes
    assert set(found.curve.moments) == set(Moment)
    assert 0 <= found.curve.seconds[0] <= found.curve.seconds[-1] <= fullest.step_seconds
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_every_traced_step_leaves_one_where_that_is_set(tmp_path: Path) -> None:
    """One line each, rotated as the step log is; the file of the highest peak is as without the setting."""
    model, optimizer = make()
    settings = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "log_dir": tmp_path}
    with MemoryTracer(model, optimizer, TracerConfig(timelines=True, quiet=True, **settings)) as tracer:
        for rows in (6, 48, 6):
            step(model, optimizer, rows)
        history = {record.step: record for record in tracer.history if record.traced}
    path = timelines_path(tmp_path, 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.with_name(path.name + ".1").write_bytes(lines[0] + b"{torn")
    path.write_bytes(b"".join(lines[1:]) + lines[-1][:50])
    highest, *found = read_timelines(tmp_path, 0)
    assert [timeline.step for timeline in found] == list(history)
    assert highest in found
    for timeline in found:
        totals = [sum(sizes) for sizes in zip(*timeline.curve.by_category.values(), strict=True)]
        assert max(totals) == history[timeline.step].moments[Moment.PEAK].total_bytes
    assert highest.step == max(history, key=lambda number: history[number].moments[Moment.PEAK].total_bytes)
    path.write_text('{"schema": "else"}')
    with pytest.raises(LogFormatError, match=r"timelines-rank0.jsonl:1: schema must be"):
        list(read_timelines(tmp_path, 0))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Step and curve come back equal; a record without a curve leaves the file as it is."""
    write_timeline(tmp_path, traced_step(curve=CURVE))
    write_timeline(tmp_path, replace(traced_step(), step=99))
    found = read_timeline(timeline_path(tmp_path, traced_step().rank))
    assert found is not None
    assert (found.step, found.curve) == (traced_step().step, CURVE)


def test_no_timeline_is_none(tmp_path: Path) -> None:
    """A run of an older memtrace has no such file."""
    assert read_timeline(timeline_path(tmp_path, 0)) is None


def test_a_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    """What cannot be written is one error with the reason."""
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        write_timeline(tmp_path / "gone", traced_step(curve=CURVE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "memtrace.step/1"}, "schema must be"),
        ({"seconds": [0.5, 0.0]}, "seconds must ascend"),
        ({"seconds": ["soon", 0]}, r"seconds\[0\] must be a number"),
        ({"seconds": [0.0]}, "one size for each of the 1 seconds"),
        ({"categories": {"love": [1, 2]}}, "each field of categories must be one of weights"),
        ({"categories": {"weights": [1, -2]}}, r"categories.weights\[1\] must be an integer"),
        ({"moments": {"peak": None}}, "moments.peak must be a number"),
    ],
)
def test_a_spoilt_timeline_is_an_error_with_a_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A wrong value raises LogFormatError, which names file and field."""
    write_timeline(tmp_path, traced_step(curve=CURVE))
    path = timeline_path(tmp_path, traced_step().rank)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LogFormatError, match=message):
        read_timeline(path)
