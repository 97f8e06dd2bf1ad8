"""Plans cases side by side, each in a process of its own, so that none sees what another has left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from memtrace.errors import MemTraceError
from memtrace.gate.cases import Case
from memtrace.gate.result import CaseResult, parse_result, result_document
from memtrace.record.strict_json import Fields

_PRELOADED = ["memtrace.gate.case_plan", "memtrace.planning.simulation_request", "transformers.modeling_utils"]
"""What each process needs and what takes seconds to import: it is imported once, and the processes are forked after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """A case that cannot be planned."""

    reason: str


Outcome = CaseResult | Unplanned


def processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def plan_cases(
    cases: Iterable[Case], root: Path, python_path: Sequence[Path], jobs: int | None = None
) -> dict[str, Outcome]:
    """Returns what each case takes, by name, in alphabetical order.

    Args:
        cases: what to plan.
        root: the directory in which their paths begin.
        python_path: directories that come first where their functions are imported from.
        jobs: how many processes plan at a time; None for one a processor.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = sorted(cases, key=lambda case: case.name, reverse=True)
    running: dict[Connection, tuple[Case, BaseProcess]] = {}
    outcomes: dict[str, Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (jobs or processors()):
                case = waiting.pop()
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(target=_plan, args=(sending, case, root, tuple(python_path)), name=case.name)
                running[receiving] = case, process
                process.start()
                sending.close()
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                case, process = running[ready]
                outcomes[case.name] = _outcome(ready, case, process)
                del running[ready]
    finally:
        for connection, (_, process) in running.items():
            connection.close()
            if process.pid is not None:
                process.terminate()
                process.join()
    return dict(sorted(outcomes.items()))


def _outcome(connection: Connection, case: Case, process: BaseProcess) -> Outcome:
    with connection:
        try:
            answer: Mapping[str, Any] | None = connection.recv()
        except EOFError:
            answer = None
        process.join()
    if answer is None:
        status = process.exitcode
        how = f"status {status}" if status is None or status >= 0 else f"signal {-status}"
        return Unplanned(reason=f"its process ended with {how} before there was a plan; see what it printed")
    if "reason" in answer:
        return Unplanned(reason=answer["reason"])
    return parse_result(Fields.of(answer, f"case {case.name}"))


def _plan(sending: Connection, case: Case, root: Path, python_path: Sequence[Path]) -> None:
    """Plans a case and sends what comes of it; what the code of the case prints goes to standard error."""
    os.dup2(2, 1)
    logging.disable(logging.ERROR)  # kernels that are not there, above all
    warnings.simplefilter("ignore")
    try:
        from memtrace.gate.case_plan import plan_case  # noqa: PLC0415 - torch, which the asking process does not need

        answer = result_document(plan_case(case, root, python_path))
    except MemTraceError as error:
        answer = {"reason": str(error)}
    with sending:
        sending.send(answer)
