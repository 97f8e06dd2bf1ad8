"""Plans cases side by side, each in a process of its own, so that none sees what another has left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from memtrace.errors import ConfigError, OutputError
from memtrace.gate.case_file import CaseFile
from memtrace.gate.result import CaseResult, parse_result
from memtrace.record.process import usable_processors
from memtrace.record.strict_json import Fields, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """A case that cannot be planned."""

    reason: str


Outcome = CaseResult | Unplanned


def plan_cases(
    file: CaseFile,
    names: Iterable[str] | None = None,
    jobs: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    printed: IO[bytes] | None = None,
) -> dict[str, Outcome]:
    """Returns what cases of a file take, by name, in alphabetical order.

    Python is started once, for what all cases import; what their code prints goes to standard error.

    Args:
        file: the cases.
        names: which of them; None for all.
        jobs: how many are planned at a time; None for one a processor.
        environment: the variables of that Python; None for those of this one.
        directory: in which it runs; None for the current one.
        printed: a file for what the cases' code prints; None for standard error.

    Raises:
        ConfigError: the file has no such case, or `jobs` is no number of processes.
        OutputError: Python ended before it had planned them.
    """
    chosen = sorted(file.cases if names is None else set(names))
    for name in chosen:
        if name not in file.cases:
            raise ConfigError(f"{file.path} has no case {name!r}, only {', '.join(file.cases)}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    request = {"file": str(file.path), "cases": chosen, "jobs": jobs or usable_processors()}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "memtrace.gate.planner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        env=environment,
        cwd=directory,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # its status says more
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        answer = process.stdout.read()  # its input stays open: it ends with this process, however that one ends
        status = process.wait()
    if status:
        raise OutputError(f"the process that plans ended with status {status}; see what it printed")
    answers = Fields.of(parse_json(answer, "the process that plans"), "the process that plans")
    return {name: _outcome(answers.object(name)) for name in chosen}


def _outcome(answer: Fields) -> Outcome:
    return Unplanned(reason=answer.text("reason")) if "reason" in answer.values else parse_result(answer)
