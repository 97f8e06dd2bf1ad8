"""Real failing allocations on the CPU, under the tracer's context and under the wrapper."""

from __future__ import annotations

import contextlib
import math
import weakref
from pathlib import Path

import pytest
import torch
from greedy_training import HUGE, PLACES, Training, ask_for_too_much, reports_in

from memtrace import Category, MemoryTracer, MemTraceOptimizer, TracerConfig
from memtrace.record.categories import Phase
from memtrace.record.oom.report import OomReport, Witness
from memtrace.sources.failures import FAILURES

PHASES = {"forward": Phase.FORWARD, "backward": Phase.BACKWARD, "optimizer": Phase.OPTIMIZER}


def settings(tmp_path: Path, **changes) -> dict:
    return {"port": None, "strict": True, "log_dir": tmp_path, "run_name": "greedy", "trace_every": 0} | changes


def run_out(training: Training, place: str, steps: int = 3) -> pytest.ExceptionInfo[RuntimeError]:
    """Trains some steps and one that fails."""
    for _ in range(steps):
        training.step()
    training.fail(place)
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        training.step()
    training.fail(None)
    return caught


def report_of_context(tmp_path: Path, place: str, steps: int = 3, **changes) -> OomReport:
    """Returns the one report of a run whose exception leaves the tracer's `with` block."""
    training = Training()
    tracer = MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path, **changes)))
    with pytest.raises(RuntimeError, match="can't allocate memory"), tracer:
        for _ in range(steps):
            training.step()
        training.fail(place)
        training.step()
    (report,) = reports_in(tmp_path)
    return report


@pytest.mark.parametrize("place", PLACES)
def test_exception_that_leaves_the_context_is_reported(tmp_path: Path, place: str) -> None:
    """The report has the request, the phase, the step, the batch and who holds the memory."""
    report = report_of_context(tmp_path, place)
    assert report.request.witness is Witness.EXCEPTION
    assert report.request.phase is PHASES[place]
    assert report.request.requested_bytes == HUGE
    assert report.request.module == ("greedy" if place == "forward" else None)
    assert report.step == 4
    assert report.batch.shape == (8, 32)
    assert (report.run_name, report.rank, report.device) == ("greedy", 0, "cpu")
    assert report.holders[0].name == "layers.*"
    assert report.holders[0].modules == 4
    assert report.remedies


@pytest.mark.parametrize("place", PLACES)
def test_step_that_is_not_traced_shows_what_the_ledger_knows(tmp_path: Path, place: str) -> None:
    """Weights, gradients of that moment and state are there to the byte, and the report says that more is not known."""
    report = report_of_context(tmp_path, place)
    weights = sum(parameter.nbytes for parameter in Training().model.parameters())
    sizes = report.composition.by_category()
    assert not report.composition.complete
    assert sizes[Category.WEIGHTS] == weights
    assert sizes[Category.OPTIMIZER_STATE] == 2 * weights + 8 * 4
    assert Category.ACTIVATIONS not in sizes
    # In the backward pass the layer behind the failure has its gradient already.
    assert sizes.get(Category.GRADIENTS, 0) == {"forward": 0, "backward": weights // 4, "optimizer": weights}[place]


@pytest.mark.parametrize("place", PLACES)
def test_traced_step_shows_everything(tmp_path: Path, place: str) -> None:
    """Where a window is open its events tell activations and temporaries too."""
    report = report_of_context(tmp_path, place, trace_every=1)
    sizes = report.composition.by_category()
    assert report.composition.complete
    assert not report.composition.estimated
    assert (sizes.get(Category.ACTIVATIONS, 0) > 0) == (place != "optimizer")
    assert sizes.get(Category.INPUTS, 0) == (0 if place == "optimizer" else 8 * 32 * 4)
    assert report.last_traced_step == 3


PASSED_OVER = {"trace_every": None, "overhead_budget": 0, "max_trace_interval": 10**6}
"""Settings with which every step is too short for a record, after the first 32."""


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine a second would pass, and bring a record."""
    monkeypatch.setattr("memtrace.tracing.schedule._LONGEST_GAP_SECONDS", 1e9)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("place", PLACES)
def test_step_that_is_passed_over_is_named_too(tmp_path: Path, place: str) -> None:
    """Where steps are too short for records a report has number, part and batch of the step all the same."""
    report = report_of_context(tmp_path, place, steps=40, **PASSED_OVER)
    assert report.step == 41
    assert report.request.phase is PHASES[place]
    assert report.batch is not None
    assert report.batch.shape == (8, 32)


@pytest.mark.usefixtures("no_clock")
def test_failures_of_steps_that_are_passed_over_are_told_apart(tmp_path: Path) -> None:
    """The bound on reports is one for each step, not for all that are skipped."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path, **PASSED_OVER))) as tracer:
        for _ in range(5):
            run_out(training, "forward", steps=40)
            training.step()
    assert len(tracer.history) < 50
    assert [report.step for report in reports_in(tmp_path)] == [41, 82, 123, 164, 205]


def test_exception_has_a_note_of_the_report(tmp_path: Path) -> None:
    """Whoever prints the traceback sees what was largest and where the report is."""
    training = Training()
    config = TracerConfig(**settings(tmp_path))
    with pytest.raises(RuntimeError) as caught, MemoryTracer(training.model, training.optimizer, config):
        training.fail("backward")
        training.step()
    (note,) = caught.value.__notes__
    (report,) = tmp_path.glob("oom-rank0-*.md")
    assert note.startswith("memtrace: out of memory at step 1")
    assert str(report) in note


def test_failure_is_counted_and_left_in_the_text_file(tmp_path: Path) -> None:
    """The final state reaches the metrics, also for the textfile collector."""
    training = Training()
    config = TracerConfig(**settings(tmp_path, textfile_dir=tmp_path / "textfile", run_id="1"))
    tracer = MemoryTracer(training.model, training.optimizer, config)
    with tracer:
        run_out(training, "forward")
        assert tracer.snapshot().totals.ooms == 1
        text = (tmp_path / "textfile" / "memtrace-greedy-1-rank0.prom").read_text()
        assert 'memtrace_ooms_total{rank="0",run="greedy",run_id="1"} 1.0' in text
        training.step()
        assert tracer.snapshot().totals.ooms == 1


def test_failures_that_torch_catches_are_told_once_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's word, as a search for a workspace brings it in each step: one report, which is pending. What an
    exception says afterwards counts."""
    monkeypatch.setattr("memtrace.oom.watch.LOOK_SECONDS", math.inf)
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path))) as tracer:
        for _ in range(3):
            training.step()
            for _ in range(10):
                FAILURES._allocation_failed(None, HUGE, HUGE, 0)  # a CPU has no index
        (report,) = reports_in(tmp_path)
        assert report.request.pending
        assert report.request.witness is Witness.ALLOCATOR
        assert tracer.snapshot().totals.ooms == 0
        run_out(training, "forward", steps=0)
        assert tracer.snapshot().totals.ooms == 1
    assert [report.request.pending for report in reports_in(tmp_path)].count(False) == 1


def test_forward_failure_that_the_loop_handles_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    """A loop that skips the batch goes on with its tracer; each failure has its report, once."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path))) as tracer:
        run_out(training, "forward")
        training.step()
        run_out(training, "forward", steps=1)
        training.step()
        assert tracer.attached
        assert tracer.latest.step == 6
    assert [report.step for report in reports_in(tmp_path)] == [4, 6]


def test_optimizer_wrapper_reports_failures_of_its_step(tmp_path: Path) -> None:
    """Under the wrapper a failing optimizer is reported where it fails, handled or not."""
    training = Training()
    training.optimizer = MemTraceOptimizer(training.optimizer, training.model, **settings(tmp_path))
    run_out(training, "optimizer")
    training.step()
    training.optimizer.close()
    (report,) = reports_in(tmp_path)
    assert report.request.phase is Phase.OPTIMIZER


@pytest.mark.parametrize("place", PLACES)
def test_optimizer_wrapper_as_a_context_reports_once(tmp_path: Path, place: str) -> None:
    """An exception that is told twice, by hook or step and by the context, has one report."""
    training = Training()
    training.optimizer = MemTraceOptimizer(training.optimizer, training.model, **settings(tmp_path))
    with pytest.raises(RuntimeError), training.optimizer:
        training.fail(place)
        training.step()
    assert len(reports_in(tmp_path)) == 1


def test_other_exceptions_make_no_report(tmp_path: Path) -> None:
    """An exception that is about something else passes as it is."""
    training = Training()
    with (
        pytest.raises(RuntimeError, match="mat1 and mat2") as caught,
        MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path))),
    ):
        training.model(torch.zeros(2, 5))
    assert reports_in(tmp_path) == []
    assert not hasattr(caught.value, "__notes__")


def test_failure_that_is_being_handled_is_not_reported_again(tmp_path: Path) -> None:
    """A retry from within the handler of a failure runs forward passes that are all right."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path))):
        training.fail("forward")
        try:
            training.step()
        except RuntimeError:
            training.fail(None)
            training.step()
    assert len(reports_in(tmp_path)) == 1


class Silent(torch.nn.Module):
    """A model that keeps its loss and returns None, as a failing one seems to do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, batch: torch.Tensor) -> None:
        self.loss = self.layer(batch).sum()


@pytest.mark.usefixtures("no_clock")
def test_model_that_returns_none_has_not_failed(tmp_path: Path) -> None:
    """Neither in recorded steps nor in those that are skipped, also while a failure of others is handled."""
    model = Silent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryTracer(model, optimizer, TracerConfig(**settings(tmp_path, **PASSED_OVER))) as tracer:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")
        except RuntimeError:
            for _ in range(40):
                model(torch.ones(2, 4))
                model.loss.backward()
                optimizer.step()
        assert tracer.snapshot().totals.ooms == 0
    assert reports_in(tmp_path) == []


def test_failure_outside_of_a_step_is_reported_as_such(tmp_path: Path) -> None:
    """Evaluation can run out of memory too."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path))):
        training.step()
        training.fail("forward")
        with torch.no_grad(), pytest.raises(RuntimeError):
            training.model(torch.zeros(2, 32))
    (report,) = reports_in(tmp_path)
    assert report.step is None
    assert report.request.phase is Phase.OUTSIDE
    assert report.request.module == "greedy"


def test_number_of_reports_is_bounded(tmp_path: Path) -> None:
    """Of many failures the newest reports are kept."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path, oom_reports=2))) as tracer:
        for _ in range(4):
            run_out(training, "forward", steps=1)
            training.step()
        assert tracer.snapshot().totals.ooms == 4
    assert [report.step for report in reports_in(tmp_path)] == [6, 8]


def test_no_reports_where_none_are_wanted(tmp_path: Path) -> None:
    """The failure is counted and noted all the same."""
    training = Training()
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(tmp_path, oom_reports=0))) as tracer:
        caught = run_out(training, "forward")
        assert tracer.snapshot().totals.ooms == 1
    assert list(tmp_path.glob("oom*")) == []
    assert "Report:" not in caught.value.__notes__[0]


def test_report_that_cannot_be_written_disturbs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A place that cannot be written costs the report and one warning; the exception is the user's own."""
    training = Training()
    log_dir = tmp_path / "run"
    with MemoryTracer(training.model, training.optimizer, TracerConfig(**settings(log_dir))) as tracer:
        training.step()
        for path in log_dir.iterdir():
            path.unlink()
        log_dir.rmdir()
        log_dir.touch()
        run_out(training, "forward", steps=0)
        assert tracer.snapshot().totals.ooms == 1
        assert "OOM report" in caplog.text


def test_nothing_is_kept_alive_by_a_report(tmp_path: Path) -> None:
    """Once the exception is handled, what its frames held is freed."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            alive.append(weakref.ref(y))
            ask_for_too_much()
            return y

    model = Model(32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    with MemoryTracer(model, optimizer, TracerConfig(**settings(tmp_path, trace_every=1))):
        with contextlib.suppress(RuntimeError):
            model(torch.zeros(2, 32))
        assert len(reports_in(tmp_path)) == 1
        assert alive[0]() is None
