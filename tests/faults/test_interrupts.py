"""Ctrl-C inside memtrace's own code: it reaches the user's loop, and what is watched goes on or comes off as ever.

Raised as the interpreter raises it, at the begin of functions of memtrace that a step calls: never by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from faults.fault_training import batches, make, run_steps
from faults.test_injected_faults import watched
from laws.surroundings import hooks_of
from nothing_left import global_hooks_of_torch, memtrace_threads, recorders_of_torch
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
