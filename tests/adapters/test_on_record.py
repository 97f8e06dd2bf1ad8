"""`on_record`: a function of the user's that gets each record."""

from __future__ import annotations

import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
from small_training import make, step

from memtrace import ConfigError, MemoryTracer, MemTraceCallback, StepRecord, TracerConfig

SETTINGS: dict[str, Any] = {"port": None, "strict": True, "trace_every": 1, "device_poll_seconds": 0, "quiet": True}


def train(tmp_path: Path, steps: int = 3, **settings: Any) -> MemoryTracer:
    model, optimizer = make()
    with MemoryTracer(model, optimizer, **SETTINGS, log_dir=tmp_path, **settings) as tracer:
        for _ in range(steps):
            step(model, optimizer)
    step(model, optimizer)
    return tracer


def test_each_record_is_handed_over_once(tmp_path: Path) -> None:
    """In order, those of `history`, when the step log has them already, and none after the end."""
    got: list[StepRecord] = []
    lines: list[int] = []

    def note(record: StepRecord) -> None:
        got.append(record)
        lines.append(len((tmp_path / "steps-rank0.jsonl").read_text().splitlines()))

    tracer = train(tmp_path, on_record=note)
    assert tuple(got) == tracer.history
    assert lines == [1, 2, 3]


def test_what_it_raises_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Strict or not: it is the user's, and is called again with each record."""
    calls = []

    def fail(record: StepRecord) -> None:
        calls.append(record.step)
        raise ConnectionError("no route to the tracker")

    with caplog.at_level(logging.ERROR, "memtrace"):
        tracer = train(tmp_path, on_record=fail)
    assert calls == [1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "memtrace: on_record has failed; training goes on, and this is not said again"
    ]
    assert "no route to the tracker" in caplog.text
    assert tracer.snapshot().totals.steps == 3


def test_it_may_use_and_end_the_tracer(tmp_path: Path) -> None:
    """Inside it `latest` is the record that it gets; a detach ends the run there."""
    model, optimizer = make()
    seen = []

    def ends(record: StepRecord) -> None:
        seen.append((tracer.latest is record, bool(tracer.figures())))
        tracer.trace_next()
        if record.step == 2:
            tracer.detach()

    tracer = MemoryTracer(model, optimizer, **SETTINGS, log_dir=tmp_path, on_record=ends)
    with tracer:
        for _ in range(4):
            step(model, optimizer)
    assert seen == [(True, True)] * 2
    assert not tracer.attached


def test_it_keeps_no_dropped_run_alive(tmp_path: Path) -> None:
    """A function that refers to the model, of a tracer that a cell has dropped, goes with both."""

    class Run:
        def __init__(self) -> None:
            self.model, optimizer = make()
            self.tracer = MemoryTracer(self.model, optimizer, **SETTINGS, log_dir=tmp_path, on_record=self.note)
            self.tracer.attach()

        def note(self, record: StepRecord) -> None:
            self.last = record

    run = Run()
    dropped = weakref.ref(run.model)
    del run
    gc.collect()
    assert dropped() is None


def test_settings_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of a module is pickled with the settings; no text is a function, and no log of settings shows one."""
    callback = pickle.loads(pickle.dumps(MemTraceCallback(on_record=print)))
    assert callback._config.on_record is print
    assert "on_record" not in repr(TracerConfig(on_record=print))
    monkeypatch.setenv("MEMTRACE_ON_RECORD", "print")
    assert TracerConfig().on_record is None
    with pytest.raises(ConfigError, match="on_record must be a function that takes a StepRecord, got 'print'"):
        TracerConfig(on_record="print")  # type: ignore[arg-type]
