"""A fault in every function of memtrace that runs during training, one after the other: training goes on bit for bit.

The functions are found by watching a run, so that a new hook is covered as soon as it is called.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from adapters.test_hf_trainer import make_model, make_trainer
from faults.fault_training import assert_same, batches, make, run_steps, state_of, train
from nothing_left import recorders_of_torch
from transformers import TrainerCallback

import memtrace
from memtrace import MemoryTracer, MemTraceCallback, TracerConfig
from memtrace.guard import ask
from memtrace.sources.termination import TERMINATION

PACKAGE = str(Path(memtrace.__file__).parent)

SHELLS = frozenset(
    {
        # What stands between the user or torch and the guard: one call of what is guarded, where no fault can be.
        "Guard.run",
        "Guard.finish",
        "Guard.set_up",
        "Guard._fail",
        "SkippedSteps._before_forward.<locals>.hook",
        "SkippedSteps._after_forward.<locals>.hook",
        "_told_apart.<locals>.ended",
        "SkippedSteps.before_optimizer.<locals>.hook",
        "SkippedSteps.after_optimizer.<locals>.hook",
        "_Pair.pack",
        "_Pair.unpack",
        "after_backward.<locals>.end",
        "_WeakHook.__call__",
        "TraceWindow._gradient_comes",
        "TraceWindow._any_steps",
        "unless_whole.<locals>.heard",
        "BeforeAnyStep.__call__",
        "Tracer.attach",
        "Tracer.attached",
        "Tracer.detach",
        "MemoryTracer.attach",
        "MemoryTracer.detach",
        # Called by Python when a storage dies: it prints an exception there, which reaches nobody.
        "Ledger.__init__.<locals>.forget",
        "Ledger._forget",
        "_Pair._forgotten",
        "compiles_backward",
        "_Pair.pop",
        "_Pair._can_be_popped",
        "BeforeAnyStep.take_off",
        "BeforeAnyStep.__init__.<locals>.<lambda>",
        "Asides._leaves",
        "around_compilation.<locals>.end",
        "around_forbidding.<locals>.end",
        "_Owner.__del__",
        "CpuEvents.__del__",
    }
)
STEPS = 4


class Fault(Exception):
    """What memtrace would not expect."""


OnCall = Callable[[str, FrameType], None]


@contextmanager
def watched(on_call: OnCall) -> Iterator[None]:
    """Calls `on_call(name, frame)` as each function of memtrace begins; what that raises, the function raises."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            on_call(frame.f_code.co_qualname, frame)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def run(log_dir: Path, on_call: OnCall) -> list[torch.Tensor]:
    """Trains traced and counted steps with a tracer, watched from attach to detach."""
    model, optimizer = make()
    config = TracerConfig(port=None, log_dir=log_dir, trace_every=2, run_name="fault", device_poll_seconds=0)
    tracer = MemoryTracer(model, optimizer, config)
    files: list[Any] = []
    with watched(on_call):
        tracer.attach()
        if tracer._exports is not None:
            claim = tracer._exports._claim
            files = [tracer._exports._log, None if claim is None else claim._lock]
        run_steps(model, optimizer, batches(STEPS))
        tracer.detach()
    tracer._until_end.close()  # a fault in detaching leaves these to the collector: pytest keeps the log's tracebacks
    TERMINATION._subscribers.clear()
    TERMINATION._end()  # a fault in taking this off leaves it to the end of the process
    for file in files:  # and a fault in closing those to the end of the process
        if file is not None:
            file.close()
    return state_of(model)


def test_each_shell_is_there() -> None:
    """A function that is renamed is renamed in the table."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(PACKAGE).rglob("*.py"))
    parts = {part for name in SHELLS for part in name.split(".") if not part.startswith("<")}
    assert {part for part in parts if not re.search(rf"(def|class) {part}\b", code)} == set()


def functions_that_run(tmp_path: Path) -> list[str]:
    """Returns the functions of memtrace that a training calls, in the order of their first calls."""
    found: dict[str, None] = {}
    run(tmp_path, lambda name, frame: found.setdefault(name))
    return [name for name in found if name not in SHELLS and "<genexpr>" not in name]


class Injection:
    """Raises one fault: when a function is called for the n-th time, or within a method of the callback."""

    def __init__(self, *, name: str | None = None, at: int = 1, within: str | None = None) -> None:
        self._name, self._left, self._within = name, at, within
        self._generators: list[FrameType] = []
        self.raised = False

    def __call__(self, name: str, frame: FrameType) -> None:
        if self.raised or name in SHELLS or (self._name is not None and name != self._name):
            return
        if is_asked(frame) or (self._within is not None and not is_within(frame, self._within)):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            if any(frame is known for known in self._generators):
                return  # it goes on, or is being closed
            self._generators.append(frame)
        self._left -= 1
        if self._left == 0:
            self.raised = True
            raise Fault(name)


def is_asked(frame: FrameType | None) -> bool:
    """Whether the frame was called for what is the user's and may raise anything: that is no fault of memtrace."""
    while frame is not None and frame.f_code is not ask.__code__:
        frame = frame.f_back
    return frame is not None


def is_within(frame: FrameType | None, name: str) -> bool:
    """Whether the frame was called, directly or not, from a function under the guard that was called from `name`."""
    guarded = False
    while frame is not None:
        code = frame.f_code
        guarded = guarded or (code.co_filename.startswith(PACKAGE) and code.co_qualname in SHELLS)
        if guarded and code.co_qualname == name:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize(
    "at", [pytest.param(1, id="first call"), pytest.param(4, id="fourth call", marks=pytest.mark.long)]
)
def test_fault_in_any_function_never_reaches_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Final weights are those without memtrace, the log has the traceback, nothing is left in torch, and no finalizer
    of what was half made raises."""
    unraisable: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: unraisable.append(f"{told.object}: {told.exc_value!r}"))
    expected = train(steps=STEPS)
    names = functions_that_run(tmp_path / "watched")
    assert len(names) > 150, "the run is watched"
    caplog.set_level(logging.WARNING, logger="memtrace")
    for number, name in enumerate(names):
        caplog.clear()
        injection = Injection(name=name, at=at)
        state = run(tmp_path / str(number), injection)
        assert_same(state, expected)
        assert recorders_of_torch() == {}, f"a fault in {name} leaves something behind"
        assert not injection.raised or f"Fault: {name}" in caplog.text, f"a fault in {name} is silent"
        assert [told for told in unraisable if f"Fault('{name}')" not in told] == [], f"after a fault in {name}"


CALLBACK_METHODS = sorted(
    name for name in vars(MemTraceCallback) if name.startswith("on_") and hasattr(TrainerCallback, name)
)


def test_every_method_of_the_callback_is_in_the_table() -> None:
    """The table follows the class: these are the events that it handles."""
    assert {"on_train_begin", "on_step_begin", "on_step_end", "on_train_end"} <= set(CALLBACK_METHODS)


@pytest.mark.parametrize("method", CALLBACK_METHODS)
def test_fault_in_a_method_of_the_callback_never_reaches_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Trainer ends with the weights that it has without the callback."""
    bare = make_trainer(tmp_path, max_steps=3, model=make_model())
    bare.train()
    caplog.set_level(logging.WARNING, logger="memtrace")
    injection = Injection(within=f"MemTraceCallback.{method}")
    callback = MemTraceCallback(port=None, step_log=False, device_poll_seconds=0)
    trainer = make_trainer(tmp_path, callback, max_steps=3, model=make_model())
    with watched(injection):
        trainer.train()
    assert injection.raised
    assert "Fault" in caplog.text
    assert_same(state_of(trainer.model), state_of(bare.model))
    with contextlib.suppress(AttributeError):  # no tracer where on_train_begin has failed
        assert not callback.tracer.attached
