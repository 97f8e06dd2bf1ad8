"""A trace of torch.profiler, to be shown beside a run on one clock.

Its times are microseconds since `baseTimeNanoseconds` (nanoseconds since 1970; torch before 2.3 writes none, and counts
from 1970). A step's record has its end in seconds since 1970. Both are the system clock of one machine, so the two meet
as closely as Kineto's own clock follows that: within about a millisecond.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtrace.errors import LogFormatError
from memtrace.record.strict_json import Fields, parse_json

PATTERNS = ("*.pt.trace.json", "*.pt.trace.json.gz")
"""Names that `torch.profiler.tensorboard_trace_handler` gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerTrace:
    """What a file of torch.profiler holds."""

    base_ns: int
    """Begin of its clock, nanoseconds since 1970."""
    first_ns: int
    """When its first slice began, nanoseconds since 1970."""
    last_ns: int
    """When its last slice ended."""
    events: Sequence[Mapping[str, Any]]
    """As they are in the file."""
    head: Mapping[str, Any]
    """All other fields of the file, such as the devices' properties."""


def read_profiler_trace(path: Path) -> ProfilerTrace:
    """Returns what a file holds, also a compressed one (`.gz`).

    Raises:
        LogFormatError: the file cannot be read, is no such trace, or has no slice.
    """
    source = str(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LogFormatError(f"{source}: the trace of torch.profiler cannot be read: {reason}") from error
    found = Fields.of(parse_json(data, source), source)
    base_ns = found.optional("baseTimeNanoseconds", Fields.integer) or 0
    spans = [
        (event.number("ts"), event.number("ts") + (event.optional("dur", Fields.number) or 0.0))
        for event in found.objects("traceEvents")
        if event.values.get("ph") == "X"
    ]
    if not spans:
        raise LogFormatError(f"{source}: must be a trace of torch.profiler, but has no slice ('ph': 'X')")
    return ProfilerTrace(
        base_ns=base_ns,
        first_ns=base_ns + round(1000 * min(begin for begin, _ in spans)),
        last_ns=base_ns + round(1000 * max(end for _, end in spans)),
        events=found.array("traceEvents"),
        head={name: value for name, value in found.values.items() if name != "traceEvents"},
    )
