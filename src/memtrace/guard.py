"""The one broad except: a fault inside memtrace ends memtrace, never the training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from inspect import CO_VARARGS
from itertools import pairwise
from types import FrameType
from typing import Any

from memtrace.errors import MemTraceError

logger = logging.getLogger("memtrace")


class Guard:
    """Runs memtrace's own code on behalf of the training loop.

    The first fault is logged with its traceback, `on_fault` is called once, and from then on nothing runs any more.
    `strict` raises the fault instead, for tests of memtrace itself. What the user got wrong (`ConfigError` before
    training) passes through `set_up` only. What a signal handler of the user's raises is no fault: a time limit that
    comes while memtrace is at work ends the training as it would have without.
    """

    def __init__(self, on_fault: Callable[[], None], *, strict: bool = False) -> None:
        self._on_fault = on_fault
        self._strict = strict
        self._failed = False
        self._begin_ns: int | None = None
        self._spent_ns = 0

    @property
    def failed(self) -> bool:
        """Whether a fault has switched memtrace off."""
        return self._failed

    @property
    def spent_ns(self) -> int:
        """Time spent in what was run, the run in progress included; nanoseconds. A run inside a run counts once."""
        begin_ns = self._begin_ns  # once: another thread may end its run meanwhile
        return self._spent_ns + (0 if begin_ns is None else time.perf_counter_ns() - begin_ns)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls `function(*args)` and returns its result; None after a fault."""
        if self._failed:
            return None
        begin_ns = None
        try:
            if self._begin_ns is None:
                begin_ns = self._begin_ns = time.perf_counter_ns()
            return function(*args)
        except Exception as error:
            if self._strict or _is_of_signal_handler(error):
                raise
            self._fail()
            return None
        finally:
            if begin_ns is not None:
                self._spent_ns += time.perf_counter_ns() - begin_ns
                self._begin_ns = None

    def set_up(self, function: Callable[[], None], undo: Callable[[], None]) -> None:
        """Calls `function`, which prepares memtrace; where it raises, `undo()` is called.

        A fault is treated as in `run`. An error that memtrace raises on purpose reaches the user.

        Raises:
            MemTraceError: a setting, the model or an output cannot be used.
        """
        if self._failed:
            return
        try:
            function()
        except MemTraceError:
            undo()
            raise
        except Exception as error:
            if self._strict or _is_of_signal_handler(error):
                undo()
                raise
            self._fail()
        except BaseException:
            undo()
            raise

    def finish(self, function: Callable[[], None]) -> None:
        """Calls `function`, which takes memtrace off, also after a fault; what it raises is logged."""
        try:
            function()
        except Exception as error:
            if self._strict or _is_of_signal_handler(error):
                raise
            _say(logger.exception, "memtrace could not take off everything of its own")

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a hook that runs `function`, and returns what it does; None after a fault."""
        return partial(self.run, function)

    def _fail(self) -> None:
        self._failed = True
        _say(
            logger.exception,
            "memtrace has met a fault of its own and is switched off for the rest of this run; training goes on. "
            "Please report the traceback below.",
        )
        try:
            self._on_fault()
        except Exception as error:
            if _is_of_signal_handler(error):
                raise
            _say(logger.exception, "memtrace could not take off all its hooks")


class Told:
    """A callable of the user's, which is told something: what it raises is logged the first time, and goes no further.

    It is called again all the same: what it writes to may be reached again.

    Args:
        function: what is called.
        what: what the user calls it, for the log.
    """

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        self._function = function
        self._what = what
        self._failed = False

    def __call__(self, *args: Any) -> None:
        """Calls the function; what it returns is dropped."""
        try:
            self._function(*args)
        except Exception as error:
            if _is_of_signal_handler(error):
                raise
            if not self._failed:
                self._failed = True
                _say(
                    logger.exception,
                    "memtrace: %s has failed; training goes on, and this is not said again",
                    self._what,
                )


def ask(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`, which asks objects of the user's; None where they raise, whatever that is.

    For what is good to know and can be gone without: neither training nor measuring ends for it.
    """
    try:
        return function(*args)
    except Exception as error:
        if _is_of_signal_handler(error):
            raise
        _say(logger.debug, "memtrace: %s did not answer: %r", function, error)
        return None


def _say(write: Callable[..., None], text: str, *args: object) -> None:
    """Writes to the log; what a handler of the user's log raises goes no further."""
    try:
        write(text, *args)
    except Exception as error:
        if _is_of_signal_handler(error):
            raise


def _is_of_signal_handler(error: Exception) -> bool:
    """Returns whether a signal handler has raised it: Python calls those in the midst of anything.

    Told by how they are called: with a number and the frame that was interrupted, which is also the one that they
    return to. Which handlers there are would say less: one may have put another in its place before it raises.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        interrupted, trace = trace.tb_frame, trace.tb_next
        for number, frame in pairwise(_arguments(trace.tb_frame)):
            if frame is interrupted and isinstance(number, int):
                return True
    return False


def _arguments(frame: FrameType) -> Iterator[Any]:
    """Yields the arguments by place of a call that has raised, as far as they still have their names."""
    code, values = frame.f_code, frame.f_locals
    for name in code.co_varnames[: code.co_argcount]:
        yield values.get(name)
    if code.co_flags & CO_VARARGS:
        rest = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        yield from rest if type(rest) is tuple else ()
