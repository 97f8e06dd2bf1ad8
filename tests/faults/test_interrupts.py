"""Ctrl-C inside memtrace's own code: it reaches the user's loop, and what is watched goes on or comes off as ever.

Raised as the interpreter raises it, at the begin of functions of memtrace that attach, steps and detach call: never by
chance.
"""

from __future__ import annotations

import gc
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from faults.fault_training import assert_same, batches, make, run_steps, train
from faults.test_injected_faults import OnCall, watched
from laws.surroundings import hooks_of, open_files
from nothing_left import forbids_hooks, global_hooks_of_torch, memtrace_threads, recorders_of_torch, takes_no_hooks
from torch import nn
from torch.optim import Optimizer

from memtrace import MemoryTracer, TracerConfig

STEPS = 3
"""Steps in which an interrupt is raised: traced and counted ones."""


@dataclass
class Training:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    masters: tuple[()] = ()


class Interrupt:
    """Raises once, as a function is called for the first time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.raised = False

    def __call__(self, name: str, frame: FrameType) -> None:
        if name == self._name and not self.raised:
            self.raised = True
            raise KeyboardInterrupt


def interrupted(log_dir: Path, interrupt: Interrupt) -> None:
    """Trains on after an interrupt in a step, detaches, and looks at what is left."""
    training = Training(*make())
    rows = batches(STEPS)
    before, registries = hooks_of(training), global_hooks_of_torch()
    config = TracerConfig(
        port=None, log_dir=log_dir, trace_every=2, run_name="interrupts", device_poll_seconds=0, quiet=True
    )
    tracer = MemoryTracer(training.model, training.optimizer, config)
    tracer.attach()
    reached = 0
    with watched(interrupt):
        for row in rows:
            try:
                run_steps(training.model, training.optimizer, [row])
            except KeyboardInterrupt:
                reached += 1
    assert reached == interrupt.raised == 1, "it reaches the loop"
    done = tracer.snapshot().totals.steps
    for row in batches(4):
        run_steps(training.model, training.optimizer, [row])
        assert recorders_of_torch() == {}, "no window is left open"
    assert tracer.snapshot().up
    assert tracer.snapshot().totals.steps == done + 4
    assert any(record.traced for record in tracer.history[-4:])
    tracer.detach()
    assert (hooks_of(training), global_hooks_of_torch()) == (before, registries)
    assert (recorders_of_torch(), memtrace_threads()) == ({}, [])


PLACES = (
    "Watch._on_forward",
    "TraceWindow.open",
    "TraceWindow._install",
    "TraceWindow.forward_begins",
    "TraceWindow.close",
    "CpuEvents.close",
    "stop_memory_profiler",
    "Watch._on_optimizer_end",
    "Publication.publish",
)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_reaches_the_loop_and_leaves_nothing(tmp_path: Path, place: str) -> None:
    """The next steps are counted and traced as before; after `detach()` all of it is off."""
    interrupted(tmp_path, Interrupt(place))


CALLED_BY_PYTHON = frozenset(
    {
        "Ledger.__init__.<locals>.forget",
        "Ledger._forget",
        "_Pair._forgotten",
        "compiles_backward",
        "_Pair.pop",
        "_Owner.__del__",
        "CpuEvents.__del__",
        "BeforeAnyStep.__init__.<locals>.<lambda>",
        "Asides.subscribe.<locals>.<lambda>",
    }
)
"""What Python calls as something dies: it prints an exception there, which reaches nobody."""


def functions_of_others() -> tuple[Any, ...]:
    """Returns what memtrace stands in for while it is attached, and who hears of torch's compiler."""
    return sys.exit, sys.excepthook, signal.getsignal(signal.SIGTERM), takes_no_hooks(), forbids_hooks()


def played(log_dir: Path, on_call: OnCall) -> int:
    """Attaches, trains and detaches, with the table at the end; returns how many interrupts have reached the loop.

    The loop goes on after each, and at last it detaches once more, as a notebook does.
    """
    training = Training(*make())
    before, registries, files = hooks_of(training), global_hooks_of_torch(), open_files()
    functions = functions_of_others()
    settings = {"port": None, "log_dir": log_dir, "textfile_dir": log_dir, "run_name": "sweep", "quiet": False}
    config = TracerConfig.from_settings(settings | {"trace_every": 2, "device_poll_seconds": 0, "timelines": True})
    tracer = MemoryTracer(training.model, training.optimizer, config)
    steps = [partial(run_steps, training.model, training.optimizer, [row]) for row in batches(STEPS)]
    reached = 0
    with watched(on_call):
        for part in (tracer.attach, *steps, tracer.detach):
            try:
                part()
            except KeyboardInterrupt:
                reached += 1
    tracer.detach()
    assert not tracer.attached
    assert (hooks_of(training), global_hooks_of_torch(), recorders_of_torch()) == (before, registries, {})
    del tracer, part  # with which goes what an output has open that was interrupted as it closed
    if open_files() != files:
        gc.collect()
    assert memtrace_threads() == []
    assert functions_of_others() == functions
    assert open_files() == files
    return reached


@pytest.mark.long
def test_an_interrupt_in_any_function_reaches_the_loop_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in `attach()`, `detach()`, exporters and hooks: what is trained next, alone, has the bits of ever."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    expected, seen = train(steps=2), dict[str, None]()
    assert played(tmp_path / "watched", lambda name, _: seen.setdefault(name)) == 0
    names = [name for name in seen if name not in CALLED_BY_PYTHON and "<genexpr>" not in name]
    assert {"attach", "detach"} <= {name.rpartition(".")[2] for name in names}
    assert len(names) > 500
    wrong = []
    for number, name in enumerate(names):
        interrupt = Interrupt(name)
        try:
            assert played(tmp_path / str(number), interrupt) == interrupt.raised
            assert_same(train(steps=2), expected)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)
