"""Law 6: a fault inside memtrace never reaches the training loop."""

from __future__ import annotations

import inspect
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from memtrace.errors import ConfigError
from memtrace.guard import Guard, Told, ask
from memtrace.record.categories import Category


def fail() -> None:
    raise ZeroDivisionError("a fault")


def test_first_fault_is_logged_once_and_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    """One log entry with the traceback, one call of on_fault, and nothing runs afterwards."""
    faults, runs = [], []
    guard = Guard(lambda: faults.append(1))
    with caplog.at_level(logging.ERROR, logger="memtrace"):
        assert guard.run(fail) is None
        assert guard.run(fail) is None
        assert guard.run(runs.append, 1) is None
        guard.wrap(runs.append)(2)
    assert (faults, runs, guard.failed) == ([1], [], True)
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text


def test_fault_while_switching_off_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    """Taking the hooks off may fail as well: that, too, stays inside."""
    guard = Guard(fail)
    with caplog.at_level(logging.ERROR, logger="memtrace"):
        guard.run(fail)
    assert guard.failed
    assert len(caplog.records) == 2


def test_strict_raises_the_fault() -> None:
    """Tests of memtrace see what went wrong."""
    guard = Guard(lambda: None, strict=True)
    with pytest.raises(ZeroDivisionError):
        guard.run(fail)


def test_interrupts_pass_through() -> None:
    """Ctrl-C and SystemExit are the user's, not faults."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    guard = Guard(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        guard.run(interrupt)
    assert not guard.failed


class Broken(logging.Handler):
    """A handler of the user's log that cannot write."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no log")


@pytest.fixture
def broken_log() -> Iterator[None]:
    handler = Broken()
    logging.getLogger("memtrace").addHandler(handler)
    yield
    logging.getLogger("memtrace").removeHandler(handler)


@pytest.mark.usefixtures("broken_log")
def test_a_question_that_is_not_answered_raises_nothing_either(caplog: pytest.LogCaptureFixture) -> None:
    """Where the log takes in all there is."""
    with caplog.at_level(logging.DEBUG, logger="memtrace"):
        assert ask(fail) is None


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_raises_raises_nothing_in_the_loop() -> None:
    """A fault that cannot be said is contained, and ends memtrace as any other."""
    faults: list[int] = []
    guard = Guard(lambda: faults.append(1))
    guard.run(fail)
    guard.finish(fail)
    Told(fail, "a function")()
    Guard(fail).run(fail)
    assert (faults, guard.failed) == ([1], True)


class TimeIsUp(Exception):
    """What a handler of the user's raises."""


def time_is_up(*_: object) -> None:
    raise TimeIsUp


def the_second_one_ends_the_process(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise TimeIsUp


class Limit:
    def method(self, *_: object) -> None:
        time_is_up()

    def __call__(self, *_: object) -> None:
        raise TimeIsUp


HANDLERS: dict[str, Any] = {
    "function": time_is_up,
    "method": Limit().method,
    "object": Limit(),
    "partial": partial(partial(time_is_up, 1), 2),
    "once": the_second_one_ends_the_process,
}


@pytest.fixture
def alarm(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """What is interrupted by a signal, whose handler raises."""
    before = signal.signal(signal.SIGUSR1, HANDLERS[request.param])
    yield partial(signal.raise_signal, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


RUNS: dict[str, Callable[[Guard, Callable[[], None]], object]] = {
    "run": Guard.run,
    "set_up": lambda guard, function: guard.set_up(function, undo=lambda: None),
    "finish": Guard.finish,
    "told": lambda guard, function: Told(function, "a function")(),
    "ask": lambda guard, function: ask(function),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("alarm", HANDLERS, indirect=True)
def test_what_a_signal_handler_raises_passes_through(run: str, alarm: Callable[[], None]) -> None:
    """A time limit that comes in the midst of memtrace is the user's: it is not hidden, and no fault."""
    guard = Guard(lambda: None)

    def interrupted() -> None:
        alarm()

    with pytest.raises(TimeIsUp):
        RUNS[run](guard, interrupted)
    assert not guard.failed


FAULTS: dict[str, Callable[[], object]] = {
    "no member": lambda: Category("none of them"),
    "code of a handler": lambda: time_is_up(signal.SIGUSR1, None),
    "frame alone": lambda: time_is_up(inspect.currentframe(), "call"),
    "frame of somebody else": lambda: time_is_up(signal.SIGUSR1, inspect.currentframe().f_back),  # type: ignore[union-attr]
}
"""What is raised while signals are handled, and by no handler of a signal. Python makes the default one from a number,
as members of enumerations are made; functions that trace others are called with a frame, too."""


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("alarm", ["function"], indirect=True)
def test_what_no_signal_handler_raises_is_contained(run: str, fault: str, alarm: Callable[[], None]) -> None:
    """Also where it comes through code that a handler runs."""
    RUNS[run](Guard(lambda: None), FAULTS[fault])


@pytest.mark.parametrize("alarm", ["function"], indirect=True)
def test_a_signal_while_a_fault_is_dealt_with(alarm: Callable[[], None]) -> None:
    """It passes there too, and the fault has ended memtrace all the same."""
    guard = Guard(alarm)
    with pytest.raises(TimeIsUp):
        guard.run(fail)
    assert guard.failed


def test_results_pass_and_nested_time_counts_once() -> None:
    """A run returns what the function returns; a run inside a run does not count twice."""
    guard = Guard(lambda: None)
    assert guard.run(lambda: guard.run(lambda: 7)) == 7
    spent = guard.spent_ns
    assert spent > 0
    inner: list[int] = []
    guard.run(lambda: inner.append(guard.spent_ns))
    assert spent < inner[0] <= guard.spent_ns


def test_setting_up_lets_errors_for_the_user_through() -> None:
    """What the user got wrong is told before training starts, with everything undone."""

    def refuse() -> None:
        raise ConfigError("port must be 0..65535")

    undone: list[int] = []
    guard = Guard(lambda: None)
    with pytest.raises(ConfigError, match="port"):
        guard.set_up(refuse, undo=lambda: undone.append(1))
    assert undone == [1]
    assert not guard.failed


def test_fault_while_setting_up_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    """A fault of memtrace's own costs the monitoring, not the training; strict raises it."""
    faults: list[int] = []
    guard = Guard(lambda: faults.append(1))
    with caplog.at_level(logging.ERROR, logger="memtrace"):
        guard.set_up(fail, undo=lambda: None)
        guard.set_up(lambda: faults.append(2), undo=lambda: None)
    assert faults == [1]
    assert guard.failed
    undone: list[int] = []
    with pytest.raises(ZeroDivisionError):
        Guard(lambda: None, strict=True).set_up(fail, undo=lambda: undone.append(1))
    assert undone == [1]


def test_interrupt_while_setting_up_undoes_and_passes() -> None:
    """Ctrl-C in the middle of attaching leaves nothing behind."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    undone: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        Guard(lambda: None).set_up(interrupt, undo=lambda: undone.append(1))
    assert undone == [1]


def test_finishing_runs_after_a_fault_and_contains_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Taking memtrace off happens whatever was before, and raises nothing."""
    done: list[int] = []
    guard = Guard(lambda: None)
    with caplog.at_level(logging.ERROR, logger="memtrace"):
        guard.run(fail)
        guard.finish(lambda: done.append(1))
        guard.finish(fail)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        Guard(lambda: None, strict=True).finish(fail)


def test_runs_of_two_threads_end_in_any_order() -> None:
    """Another thread's run, begun at the same moment, has ended meanwhile: the time is known all the same."""
    guard = Guard(lambda: None, strict=True)

    def other_ends() -> int:
        guard._begin_ns = None
        return guard.spent_ns

    assert guard.run(other_ends) == 0
    assert guard.spent_ns > 0
