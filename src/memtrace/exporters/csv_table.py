"""A run as a table of comma-separated values: one row for each step, rank, moment and entry."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import TextIO

from memtrace.record.breakdown import StepRecord

COLUMNS = {
    "run": "name of the run",
    "run_id": "the launch; empty in logs of older versions",
    "rank": "number of the process",
    "device": "as torch names it, such as cuda:0",
    "step": "number of the optimizer step, from 1",
    "unix_seconds": "when the step ended, seconds since 1970",
    "step_seconds": "how long it took; empty where that is not known",
    "traced": "1 where the bytes come from allocator events, 0 where from counters and the ledger",
    "tokens": "samples x positions of all micro batches; empty where the batch was not seen",
    "moment": "forward_end, backward_end, step_end or peak",
    "estimated": "1 where the bytes follow from counters and earlier traces, 0 where they were traced",
    "allocated_bytes": "what the allocator says was allocated at that moment; empty where none was asked",
    "category": "what the memory is for",
    "component": "part of the category, such as exp_avg; empty where it has one part",
    "dtype": "element type, such as bfloat16; empty where it is not known",
    "bytes": "bytes of this entry",
}
"""Every column, in order, and what it holds. What is not known is an empty field."""


def write_csv(file: TextIO, run_name: str, records: Iterable[StepRecord]) -> None:
    """Writes rows of records, without the header.

    The entries of one step, rank and moment add up to what was traced then. What offloading keeps in the host's memory
    belongs to no moment and has no row.
    """
    csv.writer(file, lineterminator="\n").writerows(_rows(run_name, records))


def write_header(file: TextIO) -> None:
    """Writes the names of the columns."""
    csv.writer(file, lineterminator="\n").writerow(COLUMNS)


def _rows(run_name: str, records: Iterable[StepRecord]) -> Iterator[tuple[object, ...]]:
    for record in records:
        tokens = None if record.batch is None else record.batch.tokens
        step = (
            *(run_name, record.run_id, record.rank, record.device, record.step),
            *(record.unix_seconds, record.step_seconds, int(record.traced), tokens),
        )
        for moment, breakdown in record.moments.items():
            held = (moment.value, int(breakdown.estimated), breakdown.allocated_bytes)
            for key, size in breakdown.entries.items():
                yield (*step, *held, key.category.value, key.component, key.dtype, size)
