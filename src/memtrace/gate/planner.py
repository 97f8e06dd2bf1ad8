"""The process that plans: it imports what plans need once, and forks for each case.

`memtrace.gate.processes` starts it, asks in one line on its standard input and reads the answers from its standard
output. Where the input ends before, nobody waits for the answers any more, and all processes end.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from memtrace.errors import MemTraceError
from memtrace.gate.case_file import CaseFile, read_case_file
from memtrace.gate.cases import Case
from memtrace.gate.result import result_document

_LOOK_SECONDS = 0.5
"""How long a case that ended without an answer is waited for: a process that it left behind holds its connection."""


def main() -> None:
    """Answers one request: for each case its result, or the reason why there is none.

    Raises:
        SystemExit: whoever asked is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever asked, too
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what code prints must not come between
        request = json.loads(sys.stdin.buffer.readline())
        file = read_case_file(Path(request["file"]))
        cases = [file.cases[name] for name in request["cases"]]
        logging.disable(logging.ERROR)  # libraries tell of kernels that are not there, above all
        warnings.simplefilter("ignore")
        json.dump(_plan_all(file, cases, request["jobs"], answers.fileno()), answers)


def _plan_all(file: CaseFile, cases: Sequence[Case], jobs: int, answers_to: int) -> dict[str, Any]:
    _import(with_transformers=any(case.config is not None for case in cases))
    context = multiprocessing.get_context("fork")
    waiting, answers = [*reversed(cases)], {}
    running: dict[Connection, tuple[Case, BaseProcess]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            receiving, sending = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_plan, args=(sending, case, file, answers_to), daemon=True)
            process.start()
            sending.close()
            running[receiving] = case, process
        told = wait([*running, sys.stdin.fileno()], timeout=_LOOK_SECONDS)
        gone = [receiving for receiving, (_, process) in running.items() if not process.is_alive()]
        for ready in dict.fromkeys([*told, *gone]):
            if not isinstance(ready, Connection):
                for _, process in running.values():
                    process.kill()
                sys.exit("memtrace: nobody waits for the plans any more")
            case, process = running.pop(ready)
            answers[case.name] = _answer(ready, process)
    return answers


def _import(*, with_transformers: bool) -> None:
    """Imports what every case needs; what is missing, the cases say.

    No step is simulated here: autograd may have threads after its first backward pass, and could not be forked then.
    """
    with suppress(ImportError):
        import torch  # noqa: PLC0415

        import memtrace.gate.case_plan  # noqa: PLC0415

        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # the first optimizer imports the compiler
        if with_transformers:
            import transformers.modeling_utils  # noqa: F401, PLC0415

            import memtrace.planning.simulation_request  # noqa: F401, PLC0415


def _answer(connection: Connection, process: BaseProcess) -> Any:
    with connection:
        try:
            answer = connection.recv() if connection.poll() else None
        except EOFError:
            answer = None
    if answer is not None:
        process.kill()  # a thread that the case has left behind would hold it
        process.join()
        return answer
    process.join()
    status = process.exitcode or 0
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return {"reason": f"its process ended with {how} before there was a plan; see what it printed"}


def _plan(sending: Connection, case: Case, file: CaseFile, answers_to: int) -> None:
    os.close(answers_to)  # a process that a case leaves behind must not keep it open
    with ExitStack() as stack:
        stack.push(_end)
        try:
            from memtrace.gate.case_plan import plan_case  # noqa: PLC0415 - it is imported where it can be

            answer = result_document(plan_case(case, file.root, file.python_path))
        except MemTraceError as error:
            answer = {"reason": str(error)}
        _flush()  # the process may be killed once it has answered
        with sending:
            sending.send(answer)


def _end(kind: object, error: BaseException | None, trace: object) -> None:
    """Ends the process where a case raises what is no reason, or ends it; a thread of the case would hold it."""
    if error is None:
        return
    status = 1
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        status = error.code or 0
    else:
        traceback.print_exception(error, file=sys.__stderr__)
    _flush()
    os._exit(status & 0xFF)


def _flush() -> None:
    """Writes what was printed; the case may have put something in the place of a stream, or closed it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    main()
