"""Law 9: whatever the loop does, a window ends; what it notes is bounded, and one that was in vain is paid for."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws.families import Family
from laws.life import LIVES, Run
from laws.surroundings import unchanged
from laws.ways import WAYS, Way, every_step
from nothing_left import recorders_of_torch

from memtrace.attribution import window
from memtrace.config import TracerConfig
from memtrace.record.limitations import Unseen
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window
from memtrace.tracing import bounds
from memtrace.tracing.tracer import Tracer

QUIET: dict[str, Any] = {"strict": True, "port": None, "step_log": False, "device_poll_seconds": 0}
TRACED = TracerConfig(**QUIET, trace_every=1)
ENDLESS = 3000
"""Forward passes after which a window must have ended, whatever they belong to."""


@pytest.mark.parametrize("family", [LIVES[0], LIVES[1]], ids=lambda family: family.name)
@pytest.mark.parametrize("way", [way for way in WAYS if way.ends and LIVES[0] in way.families], ids=str)
def test_the_next_step_is_over_and_traced(way: Way, family: Family) -> None:
    """However a step was left, without a detach: the next one ends the window, and has a record of its own."""
    run = Run(family, lambda model, optimizer: Tracer(model, optimizer, TRACED))
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        every_step(run)
        with run.catching(KeyboardInterrupt, RuntimeError, LookupError):
            way.play(run)
        run.optimizer.zero_grad()
        run.step()
        assert recorders_of_torch() == {}
        before = tracer.history
        run.step()
        assert recorders_of_torch() == {}
        assert len(tracer.history) == len(before) + 1
        assert tracer.history[-1].traced


@pytest.mark.parametrize("way", [way for way in WAYS if LIVES[0] in way.families], ids=str)
def test_detach_ends_it(way: Way) -> None:
    """However a step was left: nothing records after `detach()`, and the tracer can be attached again."""
    run = Run(LIVES[0], lambda model, optimizer: Tracer(model, optimizer, TRACED))
    tracer = Tracer(run.model, first := run.optimizer, TRACED)
    with unchanged(run):
        tracer.attach()
        with run.catching(KeyboardInterrupt, RuntimeError, LookupError):
            way.play(run)
        tracer.detach()
        assert recorders_of_torch() == {}
        tracer.attach()
        run.optimizer = first
        run.step()
        assert recorders_of_torch() == {}
        assert tracer.history[-1].traced
        tracer.detach()


def micro_batches(run: Run) -> None:
    run.loss().backward()


def discarded(run: Run) -> None:
    run.loss()


def another_optimizer(run: Run) -> None:
    run.loss().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("iteration", [micro_batches, discarded, another_optimizer])
def test_a_step_that_never_ends_is_bounded_and_says_so(
    iteration: Callable[[Run], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The window ends by itself, nothing grows any more, one line says it, and once; training goes on."""
    run = Run(LIVES[0])
    with Tracer(run.model, first := run.optimizer, TRACED) as tracer:
        run.step()
        if iteration is another_optimizer:
            run.optimizer = run.optimizer_of(run.model)
        lasted = 0
        while lasted < ENDLESS:
            iteration(run)
            lasted += 1
            if not recorders_of_torch():
                break
        assert recorders_of_torch() == {}
        for _ in range(50):  # what is made once is made
            iteration(run)
        grown = -python_blocks()
        for _ in range(500):
            iteration(run)
        grown += python_blocks()
        assert grown < 500, "not one object an iteration"
        assert recorders_of_torch() == {}
        first.step()
        first.zero_grad()
        run.optimizer = first
        run.step()
        assert tracer.history[-1].traced
    assert len(warnings_of(caplog)) == 1


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What memtrace has said."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("memtrace") and record.levelno >= logging.WARNING
    ]


def python_blocks() -> int:
    """Blocks of memory that Python's objects have."""
    gc.collect()
    return sys.getallocatedblocks()


class TestThreads:
    """Saved-tensor hooks are a thread's own."""

    @pytest.mark.parametrize("fails", [False, True], ids=["", "raises"])
    def test_a_worker_takes_its_hooks_with_it(self, fails: bool) -> None:
        """Forward pass and loss are made in a thread that is gone when the backward pass begins."""
        run = Run(LIVES[0])

        def work() -> None:
            with run.catching(LookupError), run.failing("forward" if fails else "", lambda: LookupError("in a worker")):
                losses.append(run.loss())

        with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
            for _ in range(3):
                losses: list[torch.Tensor] = []
                in_threads(work)
                assert recorders_of_torch() == {}
                for loss in losses:
                    loss.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                losses.clear()
            run.step()
            assert recorders_of_torch() == {}
            assert tracer.history[-1].traced

    def test_several_workers_at_once(self) -> None:
        """As nn.DataParallel does it: the model is inside its forward pass in two threads, and the loss is made in the
        loop's."""
        run = Run(LIVES[0])
        both, workers = threading.Barrier(2), list[threading.Thread]()

        def meet(*_: object) -> None:
            if threading.current_thread() in workers:
                both.wait()

        run.model.body[0].register_forward_pre_hook(meet)

        def work() -> None:
            outputs.append(run.model(torch.ones(2, 16)).square())
            left.append(recorders_of_torch().get("saved-tensor hooks"))

        with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
            for _ in range(3):
                outputs: list[torch.Tensor] = []
                left: list[object] = []
                workers[:] = [threading.Thread(target=work) for _ in range(2)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                assert left == [None, None]
                torch.stack(outputs).mean().backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
            run.step()
            assert tracer.history[-1].traced
        assert tracer.snapshot().up

    def test_a_thread_that_ends_inside_a_step(self) -> None:
        """The loop's own thread is gone before its step ended; another one goes on."""
        run = Run(LIVES[0])

        def begin() -> None:
            run.loss()

        with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
            in_threads(every_step_of(run))
            in_threads(begin)
            run.step()
            run.step()
            assert recorders_of_torch() == {}
            assert tracer.history[-1].traced


def every_step_of(run: Run) -> Callable[[], None]:
    return lambda: every_step(run)


def in_threads(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_another_tracer_is_not_kept_out() -> None:
    """A cell of a notebook was interrupted inside a traced step; the next one trains a new model with a new tracer."""
    interrupted, run = Run(LIVES[0]), Run(LIVES[0])
    first = Tracer(interrupted.model, interrupted.optimizer, TRACED)
    with unchanged(interrupted), unchanged(run), first:
        every_step(interrupted)
        interrupted.loss()
        with Tracer(run.model, run.optimizer, TRACED) as tracer:
            every_step(run)
        assert tracer.history[-1].traced
        assert recorders_of_torch() == {}


OTHER_STEPS = 16
"""Steps of another optimizer after which a traced step was left."""


def in_forward(run: Run) -> None:
    with run.failing("forward", KeyboardInterrupt):
        run.loss()


def after_forward(run: Run) -> None:
    loss = run.loss()
    raise KeyboardInterrupt(loss)


def in_backward(run: Run) -> None:
    loss = run.loss()
    with run.failing("backward", KeyboardInterrupt):
        loss.backward()


def after_backward(run: Run) -> None:
    loss = run.loss()
    loss.backward()
    raise KeyboardInterrupt(loss)


INTERRUPTS = (in_forward, after_forward, in_backward, after_backward)


def left(run: Run, interrupt: Callable[[Run], None]) -> BaseException:
    """Returns the interrupt that has ended a traced step, as a notebook keeps it: with the frames and the loss."""
    every_step(run)
    with pytest.raises(KeyboardInterrupt) as kept:
        interrupt(run)
    assert recorders_of_torch()
    return kept.value


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_another_model_after_an_interrupt_is_not_recorded_for_long(
    interrupt: Callable[[Run], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It has no tracer, and what the interrupted step has made is kept. One line says it; the first model goes on."""
    run, other = Run(LIVES[0]), Run(LIVES[0])
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        kept = left(run, interrupt)
        for _ in range(OTHER_STEPS):
            assert recorders_of_torch()
            other.step()
        del kept
        assert recorders_of_torch() == {}
        assert tracer.snapshot().not_seen == (Unseen.TRACE,)
        run.optimizer.zero_grad()
        for _ in range(4):
            run.step()
        assert tracer.history[-1].traced
        assert tracer.snapshot().not_seen == ()
    assert ["Ctrl-C" in warning for warning in warnings_of(caplog)] == [True]


def test_another_thread_may_train_a_model_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """However often its optimizer steps within one traced step here: that one goes on, and is traced."""
    run, other = Run(LIVES[0]), Run(LIVES[0])

    def trains() -> None:
        for _ in range(2 * OTHER_STEPS):
            other.step()

    with Tracer(run.model, run.optimizer, TRACED) as tracer:
        every_step(run)
        loss = run.loss()
        in_threads(trains)
        loss.backward()
        run.optimizer.step()
        assert tracer.history[-1].traced
    assert warnings_of(caplog) == []


def test_a_window_has_a_bound_of_time(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes, or eight times the longest step: looked at before steps of others, and before forward passes."""
    now = [0.0]
    monkeypatch.setattr(window, "monotonic", lambda: now[0])
    run, other = Run(LIVES[0]), Run(LIVES[0])
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        for look in (other.step, run.loss):
            kept = left(run, after_forward)
            now[0] += 599
            look()
            assert recorders_of_torch()
            now[0] += 2
            look()
            assert recorders_of_torch() == {}
            del kept
            another_optimizer(run)
            another_optimizer(run)
        assert tracer.history[-1].traced
    assert len(warnings_of(caplog)) == 1


def test_steps_may_take_as_long_as_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced step is left alone for eight times the longest one before."""
    monkeypatch.setattr(bounds, "_SECONDS", 0.0)
    now = [0.0]
    monkeypatch.setattr(window, "monotonic", lambda: now[0])
    run, other = Run(LIVES[0]), Run(LIVES[0])
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        run.step()
        another_optimizer(run)
        longest = max(record.step_seconds or 0.0 for record in tracer.history)
        loss = run.loss()
        now[0] += 7 * longest
        other.step()
        assert recorders_of_torch()
        now[0] += 2 * longest
        other.step()
        assert recorders_of_torch() == {}
        del loss


def test_a_step_with_many_steps_of_others_in_it_is_traced_all_the_same() -> None:
    """After one or two in vain: an inner loop of a part of the training that memtrace was not given."""
    run, other = Run(LIVES[0]), Run(LIVES[0])
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        for _ in range(8):
            loss = run.loss()
            for _ in range(50):
                other.step()
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert not tracer.history[0].traced
        assert tracer.history[-1].traced


def test_others_that_step_inside_a_backward_pass_are_its_own() -> None:
    """One optimizer each parameter, which memtrace was not given: they are parts of the step, however many."""
    run = Run(LIVES[0])
    each = {parameter: torch.optim.SGD([parameter], lr=0.0) for parameter in run.model.parameters()}

    def step_often(parameter: Any) -> None:
        for _ in range(20):
            each[parameter].step()

    hooks = [parameter.register_post_accumulate_grad_hook(step_often) for parameter in each]
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED) as tracer:
        for _ in range(3):
            another_optimizer(run)
        assert [record.traced for record in tracer.history] == [True] * 3
    for hook in hooks:
        hook.remove()


class Incomplete(CpuEvents):
    """A source whose windows always come back without some events, as a ring that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0

    def open(self, expected_allocations: int | None = None) -> bool:
        opened = super().open()
        self.opened += opened
        return opened

    def close(self) -> Window:
        return replace(super().close(), complete=False)


def test_a_window_in_vain_is_tried_again_ever_less(caplog: pytest.LogCaptureFixture) -> None:
    """With the default budget: few in many steps, since each is paid for before the next."""
    run, source = Run(LIVES[0]), Incomplete()
    with Tracer(run.model, run.optimizer, TracerConfig(**QUIET), source=source) as tracer:
        for _ in range(300):
            another_optimizer(run)
        assert 1 <= source.opened <= 8
        opened = source.opened
        for _ in range(300):
            another_optimizer(run)
        assert source.opened <= opened + 1
    assert not any(record.traced for record in tracer.history)
    assert warnings_of(caplog) == []


def test_windows_in_vain_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """With a number of steps: after 1, 2, 4, ... of them, then no more, with one line that says why."""
    run, source = Run(LIVES[0]), Incomplete()
    with Tracer(run.model, run.optimizer, TracerConfig(**QUIET, trace_every=1), source=source) as tracer:
        for _ in range(2**8 + 100):
            another_optimizer(run)
        assert source.opened == 8
        assert tracer.snapshot().not_seen == (Unseen.TRACE,)
    assert len(warnings_of(caplog)) == 1


EXITS = {
    "": 0,
    "raise ValueError('of the user')": 1,
    "raise SystemExit(3)": 3,
    "os._exit(4)": 4,
    "model.register_forward_pre_hook(lambda *_: sys.exit(5)); loss()": 5,
    "kept.register_hook(lambda _: sys.exit(6)); kept.backward()": 6,
    "threading.Thread(target=train, args=(3,)).start()": 0,
    "worker = threading.Thread(target=loss); worker.start(); worker.join()": 0,
    "threading.Thread(target=in_a_step_for_ever, daemon=True).start(); begun.wait()": 0,
}
"""What a script does last, inside a step, and the status that it ends with."""

SCRIPT = """
import gc, json, os, signal, sys, threading
import torch
from laws.life import LIVES
from memtrace import MemTraceOptimizer

rows, settings = json.loads(sys.argv[1])
families, statuses = {family.name: family for family in LIVES}, []
torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # loads what the first optimizer loads
for family in {row[0] for row in rows}:
    families[family].build()  # loads what the first one loads
gc.freeze()  # what is loaded is not gone through at the end of each child
for family, name, last in rows:
    child = os.fork()
    if not child:
        break
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(statuses))
    os._exit(0)

signal.alarm(100)  # a child that hangs ends by this
sys.stderr = open(os.devnull, "w")
family = families[family]
model = family.build()
optimizer = torch.optim.AdamW(model.parameters())
settings, steps = settings[name]
optimizer = MemTraceOptimizer(optimizer, model, port=None, step_log=False, oom_reports=0, **settings)
begun = threading.Event()

def loss():
    return family.loss(model, family.batch())

def train(steps):
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

def in_a_step_for_ever():
    loss()
    begun.set()
    threading.Event().wait()

train(steps)
kept = loss()
assert torch.autograd._profiler_enabled() == (name == "traced")
exec(last)
"""


SETTINGS_AT_EXIT: dict[str, tuple[dict[str, int], int]] = {"traced": ({}, 1), "counted": ({"trace_every": 0}, 2)}
"""Settings, and the steps before the last one. By default the second is traced, as the first with optimizer state."""
EXIT_ROWS = [(family.name, name, last) for family in LIVES for name in SETTINGS_AT_EXIT for last in EXITS]


def statuses_of(rows: list[tuple[str, str, str]]) -> list[int]:
    """Returns how scripts end. One process has loaded torch, each row is a child of it."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([rows, SETTINGS_AT_EXIT])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_script_that_ends_inside_a_traced_step_ends_as_without_memtrace() -> None:
    """Each way out of a process: its exit status, and no signal."""
    rows = [row for row in EXIT_ROWS if row[:2] == (LIVES[0].name, "traced")]
    assert statuses_of(rows) == [EXITS[last] for _, _, last in rows]


@pytest.mark.long
@pytest.mark.parametrize("family", LIVES, ids=lambda family: family.name)
def test_every_model_ends_inside_a_step_in_every_way_as_without_memtrace(family: Family) -> None:
    """Traced and counted; one of the models has a head that nothing uses."""
    rows = [row for row in EXIT_ROWS if row[0] == family.name]
    assert len(rows) == 2 * len(EXITS)
    assert statuses_of(rows) == [EXITS[last] for _, _, last in rows]
