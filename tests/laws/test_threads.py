"""Laws 8, 9 and 12 where a step runs on several threads: what is not recorded is said, and no thread harms another."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws.life import LIVES, Run
from laws.surroundings import unchanged
from nothing_left import recorders_of_torch
from torch import nn

from memtrace.attribution.garbage import uncollected
from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.record.limitations import Unseen
from memtrace.tracing.tracer import Tracer

TRACED = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)

Does = Callable[[Callable[[], Any]], Any]
"""Calls a function on some thread, and returns what it returns."""


def here(function: Callable[[], Any]) -> Any:
    return function()


def on_a_new_thread(function: Callable[[], Any]) -> Any:
    returned: list[Any] = []
    thread = threading.Thread(target=lambda: returned.append(function()))
    thread.start()
    thread.join()
    return returned[0]


@contextmanager
def workers() -> Iterator[dict[str, Does]]:
    """The threads of a loop, by name: its own, two that stay, and one that is new each time."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        yield {
            "here": here,
            "one": lambda function: one.submit(function).result(),
            "other": lambda function: other.submit(function).result(),
            "new": on_a_new_thread,
        }


def step(run: Run, forward: Does, backward: Does, update: Does) -> None:
    loss = forward(run.loss)
    backward(loss.backward)
    del loss
    update(run.optimizer.step)
    run.optimizer.zero_grad()


ON_SEVERAL = [
    ("here", "here", "one"),
    ("here", "here", "new"),
    ("one", "one", "here"),
    ("new", "new", "here"),
    ("one", "here", "one"),
    ("here", "one", "here"),
    ("here", "one", "other"),
]
"""Where forward pass, backward pass and step of the optimizer run."""


@pytest.mark.parametrize("threads", ON_SEVERAL, ids="-".join)
def test_a_step_on_several_threads_is_counted_and_said(
    threads: tuple[str, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """torch records one thread of a CPU, so that such a step has no trace, and never a wrong one: one line, one series.

    Training is as without memtrace, nothing is left on any of the threads, and steps on one thread are traced again.
    """
    weights = []
    for watched in (False, True):
        run = Run(LIVES[0])
        tracer = Tracer(run.model, run.optimizer, TRACED)
        with unchanged(run), workers() as on, tracer if watched else nullcontext():
            for _ in range(4):
                step(run, *(on[name] for name in threads))
            weights.append([parameter.detach().clone() for parameter in run.model.parameters()])
            if watched:
                assert [record.traced for record in tracer.history] == [False] * 4
                assert tracer.snapshot().not_seen == (Unseen.TRACE,)
                assert tracer.snapshot().up
            on[threads[0]](run.loss)
            for name in ("one", "other", "here"):
                on[name](run.loss)
                step(run, *[on[name]] * 3)
                tracer.trace_next()
                step(run, *[on[name]] * 3)
                assert on[name](recorders_of_torch) == {}
                assert not watched or tracer.history[-1].traced
            assert tracer.snapshot().not_seen == ()
    assert all(map(torch.equal, *weights))
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["on one thread to have its steps traced" in line for line in told] == [True]


@pytest.mark.parametrize("thread", ["one", "new"])
def test_a_loop_on_another_thread_is_traced(thread: str) -> None:
    """Each step of it, and not the first alone: the categories are what was allocated."""
    run = Run(LIVES[0])
    with unchanged(run), workers() as on, Tracer(run.model, run.optimizer, TRACED) as tracer:
        for _ in range(4):
            on[thread](lambda: step(run, here, here, here))
            assert on[thread](recorders_of_torch) == {}
    assert [record.traced for record in tracer.history] == [True] * 4
    for record in tracer.history:
        assert record.moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0
        assert all(each.total_bytes == each.allocated_bytes for each in record.moments.values())
    assert tracer.snapshot().not_seen == ()


def test_what_a_worker_had_to_leave_comes_off_with_the_next_forward_pass() -> None:
    """Also with one that belongs to no step."""
    run = Run(LIVES[0])
    with unchanged(run), workers() as on, Tracer(run.model, run.optimizer, TRACED) as tracer:
        step(run, here, here, here)
        tracer.trace_next()
        loss = run.loss()
        loss.backward()
        on["one"](run.optimizer.step)
        assert recorders_of_torch()
        with torch.no_grad():
            run.loss()
        assert recorders_of_torch() == {}


def test_a_window_whose_thread_does_not_come_back_notes_nothing() -> None:
    """The loop goes on for days on another thread, and what is noted of it would be in vain."""
    run = Run(LIVES[0])
    with unchanged(run), workers() as on, Tracer(run.model, run.optimizer, TRACED) as tracer:
        run.loss()
        assert tracer._watch is not None
        assert tracer._watch._ledger.journal_length > 0
        on["one"](lambda: step(run, here, here, here))
        assert recorders_of_torch()
        assert tracer._watch._ledger.journal_length == 0


class Worker(threading.Thread):
    """A thread that keeps what it has made."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._made = run.loss
        self.loss: torch.Tensor | None = None

    def run(self) -> None:
        self.loss = self._made()
        self.loss.backward()


def test_a_thread_and_what_it_has_made_are_let_go() -> None:
    """At once, as without memtrace, though a step that is over ran on it."""
    run = Run(LIVES[0])
    with unchanged(run), Tracer(run.model, run.optimizer, TRACED):
        for _ in range(2):
            worker = Worker(run)
            worker.start()
            worker.join()
            run.optimizer.step()
            run.optimizer.zero_grad()
            thread, loss = weakref.ref(worker), weakref.ref(worker.loss)
            del worker
            assert (thread(), loss()) == (None, None)


def test_detach_on_another_thread() -> None:
    """Nothing of memtrace runs any more, and what this thread alone can end, it does with the next forward pass."""
    run = Run(LIVES[0])
    with unchanged(run):
        tracer = Tracer(run.model, run.optimizer, TRACED)
        tracer.attach()
        step(run, here, here, here)
        loss = run.loss()
        on_a_new_thread(tracer.detach)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        del loss
        run.loss()
        assert recorders_of_torch() == {}
    assert tracer.snapshot().up
    assert len(tracer.history) == 1


def test_a_model_is_let_go_at_once_after_detach_on_another_thread() -> None:
    """What is left for its next forward pass does not keep it, where there is none."""
    model = nn.Linear(4, 4)
    tracer = Tracer(model, torch.optim.SGD(model.parameters(), lr=0.1), TRACED)
    tracer.attach()
    with uncollected():
        model(torch.ones(2, 4)).sum().backward()
        on_a_new_thread(tracer.detach)
        assert recorders_of_torch()
        alive = weakref.ref(model)
        del model
        assert alive() is None
    gc.collect()
    assert recorders_of_torch() == {}


def test_threads_that_train_side_by_side_have_no_hooks_on_saved_tensors() -> None:
    """torch raises where one changes a parameter that a hook of another has. Activations are known by their life."""
    run = Run(LIVES[0])
    heard: list[object] = []
    seldom = replace(TRACED, trace_every=0)
    with unchanged(run), workers() as on, Tracer(run.model, run.optimizer, seldom) as tracer:
        for _ in range(2):
            step(run, here, here, here)
        on["one"](run.loss)
        step(run, here, here, here)
        tracer.trace_next()
        handle = run.model.register_forward_hook(lambda *_: heard.append(recorders_of_torch().keys()))
        step(run, here, here, here)
        handle.remove()
    assert heard == [{"profiler"}]
    assert tracer.history[-1].traced
    assert tracer.history[-1].moments[Moment.FORWARD_END][Category.ACTIVATIONS] > 0


def test_an_evaluation_on_another_thread_is_no_part_of_the_step() -> None:
    """However many forward passes it has: the step goes on, and is traced."""
    run = Run(LIVES[0])

    def evaluate() -> None:
        with torch.no_grad():
            for _ in range(100):
                run.loss()

    with unchanged(run), workers() as on, Tracer(run.model, run.optimizer, TRACED) as tracer:
        for _ in range(2):
            loss = run.loss()
            on["one"](evaluate)
            loss.backward()
            del loss
            on["one"](evaluate)
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert [record.traced for record in tracer.history] == [True] * 2
    assert tracer.snapshot().not_seen == ()
