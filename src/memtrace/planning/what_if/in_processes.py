"""Plans that do not depend on each other, made by several processes at once."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import torch

from memtrace.errors import PlanError
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated
from memtrace.record.plan import Plan
from memtrace.record.process import usable_processors

MOST = 8
"""Processes at once, each of which takes some 0.3 GB."""

_requests: Sequence[SimulationRequest] = ()
"""What the processes plan: a fork inherits it, since requests are too much to send."""


def usable_processes() -> int:
    """Returns how many processes may plan at once: one for each processor, and one alone where none can be forked."""
    return min(MOST, usable_processors()) if sys.platform == "linux" else 1


def plans_of(requests: Sequence[SimulationRequest], processes: int) -> Iterator[Plan | None]:
    """Yields the plan of each request, in their order; None where there is none.

    Args:
        requests: what to plan.
        processes: how many may work at once; 1 is this process, and so is what a process that was killed left. Others
            are forked, so no other thread of this process may hold a lock of torch, and none may have used a device.
    """
    if min(processes, len(requests)) < 2:
        yield from map(_plan_of, requests)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(requests)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(requests,),
    )
    try:
        for request, future in [(request, _submitted(pool, at)) for at, request in enumerate(requests)]:
            yield _result(future, request)
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, at: int) -> Future[Plan | None] | None:
    try:
        return pool.submit(_planned, at)
    except BrokenProcessPool:  # one was killed while the others are handed out
        return None


def _result(future: Future[Plan | None] | None, request: SimulationRequest) -> Plan | None:
    with suppress(BrokenProcessPool):
        if future is not None:
            return future.result()
    return _plan_of(request)


def _begin(requests: Sequence[SimulationRequest]) -> None:
    global _requests  # noqa: PLW0603 - this process is for nothing else
    _requests = requests
    torch.set_num_threads(1)


def _planned(at: int) -> Plan | None:
    return _plan_of(_requests[at])


def _plan_of(request: SimulationRequest) -> Plan | None:
    try:
        return plan_simulated(request)
    except PlanError:
        return None
