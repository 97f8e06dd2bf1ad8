"""Law 4: attach and detach together change nothing, wherever the loop was when it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws.families import FAMILIES, Combination, Recipe, Way
from laws.loop import Loop
from laws.surroundings import hooks_of, unchanged

from memtrace.config import TracerConfig
from memtrace.sources.cpu import CpuEvents
from memtrace.sources.events import Window
from memtrace.tracing.tracer import Tracer

TRACED = TracerConfig(strict=True, port=None, step_log=False, trace_every=1)
COUNTED = TracerConfig(strict=True, port=None, step_log=False, trace_every=0)
ROWS = [Combination(family, Recipe.FP32, Way.PLAIN) for family in FAMILIES]


class Broken(Exception):
    """What the training loop raises."""


def fail(*_: object) -> None:
    raise Broken


@contextmanager
def broken_forward(loop: Loop) -> Iterator[None]:
    """Makes the last module of the model raise."""
    handle = list(loop.model.modules())[-1].register_forward_pre_hook(fail)
    yield
    handle.remove()


@contextmanager
def broken_backward(loop: Loop) -> Iterator[None]:
    """Makes the gradient of one parameter raise."""
    handle = loop.trainable[len(loop.trainable) // 2].register_hook(fail)
    yield
    handle.remove()


@contextmanager
def broken_optimizer(loop: Loop) -> Iterator[None]:
    """Makes the optimizer raise in the middle of its step."""
    group = loop.optimizer.param_groups[-1]
    betas, group["betas"] = group["betas"], None
    yield
    group["betas"] = betas


BREAKS: dict[str, Callable[[Loop], Any]] = {
    "forward": broken_forward,
    "backward": broken_backward,
    "optimizer": broken_optimizer,
}


@pytest.mark.parametrize("config", [TRACED, COUNTED], ids=["traced", "counted"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_after_a_run_everything_is_as_before(row: Combination, config: TracerConfig) -> None:
    """Every family: hooks, methods, threads and recorders."""
    loop = Loop(row)
    with unchanged(loop):
        with Tracer(loop.model, loop.optimizer, config) as tracer:
            assert hooks_of(loop)
            loop.step()
            loop.step()
        assert not tracer.attached


@pytest.mark.parametrize("part", BREAKS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_after_an_exception_everything_is_as_before(row: Combination, part: str) -> None:
    """It reaches the caller as it is, out of a traced step, and nothing stays behind."""
    loop = Loop(row)
    loop.step()
    expected = TypeError if part == "optimizer" else Broken
    with unchanged(loop), BREAKS[part](loop):
        before = hooks_of(loop)
        with pytest.raises(expected), Tracer(loop.model, loop.optimizer, TRACED):
            loop.step()
        assert hooks_of(loop) == before


@pytest.mark.parametrize("moment", ["attached", "forward", "backward"])
def test_detach_in_the_middle_of_a_traced_step(moment: str) -> None:
    """By hand, between any two lines of the loop."""
    loop = Loop(ROWS[0])
    loop.step()
    tracer = Tracer(loop.model, loop.optimizer, TRACED)
    with unchanged(loop):
        tracer.attach()
        if moment != "attached":
            loss = loop.combination.family.loss(loop.model, loop.combination.batch())
            if moment == "backward":
                loss.backward()
        tracer.detach()
    loop.step()


def test_detach_twice_and_attach_again() -> None:
    """The second detach does nothing; a tracer can be attached again and goes on counting."""
    loop = Loop(ROWS[0])
    tracer = Tracer(loop.model, loop.optimizer, TRACED)
    with unchanged(loop):
        for steps in (1, 2):
            tracer.attach()
            tracer.attach()
            loop.step()
            tracer.detach()
            tracer.detach()
            assert tracer.snapshot().totals.steps == steps
    assert [record.step for record in tracer.history] == [1, 2]


def test_detached_inside_the_forward_pass() -> None:
    """A user's hook that detaches while memtrace's own hooks are running."""
    loop = Loop(Combination(FAMILIES[0], Recipe.FP32, Way.PLAIN))
    tracer = Tracer(loop.model, loop.optimizer, TRACED)
    with unchanged(loop):
        tracer.attach()
        handle = list(loop.model.modules())[-1].register_forward_pre_hook(lambda *_: tracer.detach())
        loop.step()
        handle.remove()
    assert tracer.latest is None


@pytest.mark.parametrize("config", [TRACED, COUNTED], ids=["traced", "counted"])
def test_detached_inside_the_backward_pass(config: TracerConfig) -> None:
    """torch keeps recorders on until a backward pass has ended: what is left then goes with the next forward pass."""
    loop = Loop(Combination(FAMILIES[0], Recipe.FP32, Way.PLAIN))
    tracer = Tracer(loop.model, loop.optimizer, config)
    with unchanged(loop):
        tracer.attach()
        handle = loop.trainable[0].register_hook(lambda _: tracer.detach())
        loop.step()
        handle.remove()
        assert tracer.latest is None
        loop.model.eval()
        with torch.no_grad():
            loop.combination.family.loss(loop.model, loop.combination.batch())
        loop.model.train()


def test_detached_twice_inside_and_after_the_backward_pass() -> None:
    """Without another forward pass, the second detach takes off what the first one could not."""
    loop = Loop(Combination(FAMILIES[0], Recipe.FP32, Way.PLAIN))
    tracer = Tracer(loop.model, loop.optimizer, TRACED)
    with unchanged(loop):
        tracer.attach()
        handle = loop.trainable[0].register_hook(lambda _: tracer.detach())
        loop.step()
        handle.remove()
        tracer.detach()


@pytest.mark.parametrize("part", ["forward", "backward", "optimizer"])
def test_after_a_fault_of_memtrace_itself_nothing_is_left(part: str, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it happens: training goes on, and by the end of the run everything is off."""
    loop = Loop(Combination(FAMILIES[0], Recipe.FP32, Way.PLAIN))
    reached = {"forward": False, "backward": False, "optimizer": False}
    loop.model.register_forward_hook(lambda *_: reached.update(forward=True))
    loop.trainable[0].register_post_accumulate_grad_hook(lambda _: reached.update(backward=True))
    loop.optimizer.register_step_pre_hook(lambda *_: reached.update(optimizer=True))

    class Faulty(CpuEvents):
        def interrupted(self) -> bool:
            if reached[part]:
                raise Broken("a fault of memtrace")
            return super().interrupted()

        def close(self) -> Window:
            if part == "optimizer" and reached[part]:
                reached[part] = False
                raise Broken("a fault of memtrace")
            return super().close()

    forgiving = TracerConfig(port=None, step_log=False, trace_every=1)
    tracer = Tracer(loop.model, loop.optimizer, forgiving, source=Faulty())
    with unchanged(loop):
        with tracer:
            loop.step()
            losses = loop.step()
        assert losses
    assert not tracer.snapshot().up
    assert "memtrace has met a fault of its own" in caplog.text


def test_a_half_failed_attach_leaves_nothing() -> None:
    """An optimizer that refuses hooks: the error is the caller's, and the hooks that were installed are gone."""

    class Refusing(torch.optim.SGD):
        def register_step_post_hook(self, hook: Any) -> Any:
            raise Broken

    loop = Loop(Combination(FAMILIES[0], Recipe.FP32, Way.PLAIN))
    loop.optimizer = Refusing(loop.trainable, lr=0.1)
    with unchanged(loop), pytest.raises(Broken):
        Tracer(loop.model, loop.optimizer, TRACED).attach()


def test_a_tracer_that_is_dropped_inside_a_window_from_birth() -> None:
    """A window that was begun before the tracer is closed by its detach."""
    source = CpuEvents()
    assert source.open()
    loop = Loop(ROWS[0])
    tracer = Tracer(loop.model, loop.optimizer, TRACED, source=source)
    with unchanged(loop):
        tracer.attach()
        tracer.detach()
        assert not source.is_open
