"""The JSON form of a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cuda_scenes import CASES, Case, report_of
from records import traced_step

from memtrace.errors import LogFormatError
from memtrace.oom.composition import Holding
from memtrace.oom.failure import MAX_MESSAGE
from memtrace.oom.holders import largest_blocks, largest_holders
from memtrace.record.categories import Moment, Phase
from memtrace.record.oom.document import encode, parse_report
from memtrace.record.oom.report import FailedRequest, OomReport, Witness
from memtrace.record.strict_json import parse_json

FULL = replace(
    report_of(CASES[0]),
    last_traced_step=6,
    last_traced_peak=traced_step().moments[Moment.PEAK],
    device_memory=traced_step().device_memory,
    limit_bytes=10**9,
    request=FailedRequest(
        witness=Witness.EXCEPTION,
        phase=Phase.FORWARD,
        requested_bytes=7,
        segment_bytes=20,
        free_bytes=3,
        module="a.b",
        message="x: y",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_report_is_read_back_as_it_was(case: Case) -> None:
    """Writing and reading loses nothing."""
    report = report_of(case)
    assert parse_report(parse_json(encode(report), "here"), "here") == report


def test_report_with_everything_is_read_back_as_it_was() -> None:
    """Also where every optional field is known."""
    assert parse_report(parse_json(encode(FULL), "here"), "here") == FULL


def test_pending_report_is_read_back_as_it_was() -> None:
    """A report that no exception has followed stays one; one of a version that had none of them is not."""
    pending = replace(FULL, request=replace(FULL.request, pending=True, evaluation=True))
    assert parse_report(parse_json(encode(pending), "here"), "here") == pending
    older = json.loads(encode(FULL))
    del older["request"]["pending"], older["request"]["evaluation"], older["request"]["segment_bytes"]
    assert parse_report(older, "here").request == replace(FULL.request, segment_bytes=None)


def test_wrong_fields_are_named() -> None:
    """A document that is no report says which field is wrong, and where."""
    document = json.loads(encode(FULL))
    document["composition"]["complete"] = "yes"
    with pytest.raises(LogFormatError, match=r"run\.json: composition\.complete must be true or false, got 'yes'"):
        parse_report(document, "run.json")
    with pytest.raises(LogFormatError, match=r"schema must be 'memtrace\.oom/1', got 'memtrace\.step/1'"):
        parse_report({"schema": "memtrace.step/1"}, "run.json")
    document = json.loads(encode(FULL))
    document["holders"] = [{"name": "layers.*", "modules": 4, "categories": {"wights": 1}}]
    with pytest.raises(LogFormatError, match=r"each field of holders\[0\]\.categories must be one of weights, "):
        parse_report(document, "run.json")


def test_report_is_small_however_much_was_live() -> None:
    """A hundred thousand blocks of ten thousand modules make a report below 64 KiB."""
    blocks = [Holding(address=at, nbytes=1 + at, key=next(iter(FULL.composition.entries))) for at in range(100_000)]
    names = {at: f"{'part.' * 10}module{at % 10_000}.weight" for at in range(100_000)}
    report: OomReport = replace(
        FULL,
        holders=largest_holders(blocks, names),
        large_blocks=largest_blocks(blocks, names),
        request=replace(FULL.request, message="x" * MAX_MESSAGE),
    )
    assert len(encode(report)) < 64 * 1024
