"""Reads a trace file by the rules of Perfetto's importer of JSON traces, and refuses what that drops or gets wrong.

Its trace processor is a binary that no package carries, so its rules stand here (`make perfetto` asks it itself): times
are cut to nanoseconds, a thread is told by its number alone, each argument of a counter is a track of the process
called `<name> <argument>`, slices and marks of one thread must nest, and nothing is read behind a field that is not
known.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

SCOPES = ("g", "p", "t")
METADATA = ("process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index")


@dataclass
class TraceTables:
    """What a viewer has of the file."""

    processes: dict[Any, str] = field(default_factory=dict)
    threads: dict[Any, str] = field(default_factory=dict)
    slices: list[tuple[Any, str, int, int]] = field(default_factory=list)
    """Process, name, begin and length in nanoseconds since the base of the file."""
    marks: list[tuple[Any, str, int]] = field(default_factory=list)
    counters: dict[tuple[Any, str], list[tuple[int, float]]] = field(default_factory=dict)
    """Times and values by process and track."""
    base_ns: int = 0
    owners: dict[Any, Any] = field(default_factory=dict)
    """The process of each thread."""

    def sums(self, pid: int, track: str) -> list[tuple[int, int]]:
        """Returns the sum of all arguments of a counter at each of its times."""
        rows = [points for (owner, name), points in self.counters.items() if owner == pid and name.startswith(track)]
        return [(at[0][0], int(sum(value for _, value in at))) for at in zip(*rows, strict=True)]


def read_trace(text: str) -> TraceTables:
    """Returns the tables of a file; AssertionError where a viewer would lose something of it."""
    found = json.loads(text)
    assert list(found)[:2] == ["displayTimeUnit", "traceEvents"]
    tables = TraceTables(base_ns=found["baseTimeNanoseconds"])
    for event in found["traceEvents"]:
        _READERS[event["ph"]](tables, event, event["pid"], _nanoseconds(event["ts"]) if "ts" in event else None)
    for pid, points in tables.counters.items():
        assert [at for at, _ in points] == sorted(at for at, _ in points), pid
    _must_nest(tables)
    return tables


def _nanoseconds(microseconds: float) -> int:
    assert not isinstance(microseconds, (bool, str))
    assert math.isfinite(microseconds)
    return int(microseconds * 1000)


def _metadata(tables: TraceTables, event: dict[str, Any], pid: Any, at: int | None) -> None:
    assert event["name"] in METADATA
    if event["name"] == "process_name":
        tables.processes[pid] = event["args"]["name"]
    if event["name"] == "thread_name":
        assert tables.owners.setdefault(event["tid"], pid) == pid, "two threads of one number are one"
        tables.threads[event["tid"]] = event["args"]["name"]


def _slice(tables: TraceTables, event: dict[str, Any], pid: Any, at: int | None) -> None:
    assert event["dur"] >= 0
    assert at is not None
    tables.slices.append((pid, event["name"], at, _nanoseconds(event["dur"])))


def _mark(tables: TraceTables, event: dict[str, Any], pid: Any, at: int | None) -> None:
    assert event["s"] in SCOPES
    assert at is not None
    tables.marks.append((pid, event["name"], at))


def _counter(tables: TraceTables, event: dict[str, Any], pid: Any, at: int | None) -> None:
    assert event["args"]
    assert at is not None
    for name, value in event["args"].items():
        assert type(value) is int
        assert value == int(float(value)), "a viewer has a double"
        tables.counters.setdefault((pid, f"{event['name']} {name}"), []).append((at, float(value)))


def _flow(tables: TraceTables, event: dict[str, Any], pid: Any, at: int | None) -> None:
    assert isinstance(event["id"], int)


_READERS = {"M": _metadata, "X": _slice, "i": _mark, "C": _counter, "s": _flow, "f": _flow, "t": _flow}


def _must_nest(tables: TraceTables) -> None:
    """Checks that of memtrace's slices of one process none begins within another."""
    for pid in tables.processes:
        ours = sorted((begin, begin + length) for owner, name, begin, length in tables.slices if owner == pid)
        if str(tables.processes[pid]).startswith("memtrace"):
            assert all(end <= begin for (_, end), (begin, _) in pairwise(ours)), pid
