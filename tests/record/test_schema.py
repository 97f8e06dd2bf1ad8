"""The JSON forms of steps: what is written is read back, and nothing else than a LogFormatError comes of the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import counted_step, steps, traced_step
from spoiling import holders, json_values, spoilt

from memtrace.errors import LogFormatError
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.schema import StepEncoder, moments_document, parse_moments, parse_step
from memtrace.record.strict_json import Fields, parse_json


def read(line: str | bytes) -> StepRecord:
    return parse_step(parse_json(line, "steps.jsonl:7"), "steps.jsonl:7")


def document() -> dict[str, Any]:
    return json.loads(StepEncoder().encode(traced_step()))


spoilt_documents = spoilt(st.builds(document))


@given(st.lists(steps, max_size=3))
def test_what_is_written_is_read_back(records: list[StepRecord]) -> None:
    """Any records, written by one encoder after another, come back equal."""
    encoder = StepEncoder()
    for record in records:
        line = encoder.encode(record)
        assert "\n" not in line
        assert line.isascii()
        assert read(line) == record


@given(st.text() | st.binary() | json_values.map(json.dumps) | spoilt_documents.map(json.dumps))
def test_garbage_is_an_error_with_a_message(line: str | bytes) -> None:
    """A line that is not a step, or is one with a wrong value, raises LogFormatError and nothing else."""
    try:
        record = read(line)
    except LogFormatError as error:
        assert "steps.jsonl:7" in str(error)
    else:
        assert read(StepEncoder().encode(record)) == record


@given(st.integers(0, 2000))
def test_a_part_of_a_line_is_an_error(length: int) -> None:
    """No beginning of a line can be taken for a whole line."""
    line = StepEncoder().encode(traced_step())
    with pytest.raises(LogFormatError, match=r"^steps\.jsonl:7: must be one JSON value"):
        read(line[: min(length, len(line) - 1)])


def test_the_form_of_the_contract() -> None:
    """A line has the fields of the public contract."""
    found = document()
    assert found["schema"] == "memtrace.step/1"
    assert (found["step"], found["rank"], found["device"], found["traced"]) == (12, 1, "cuda:1", True)
    assert found["batch"] == {"shape": [8, 512], "tokens": 4096, "largest_micro_batch_tokens": 4096}
    assert found["self_seconds"] == 0.0004
    peak = found["moments"]["peak"]
    assert peak["allocated_bytes"] == sum(entry["bytes"] for entry in peak["entries"])
    assert peak["entries"][0] == {"category": "weights", "component": "trainable", "dtype": "bfloat16", "bytes": 2**31}
    assert found["allocator"]["reserved_bytes"] == 20 * 2**30
    assert "requested_bytes" not in found["allocator"]
    assert found["device_memory"]["uuid"] == "GPU-1234"


def test_estimated_is_written_only_where_true() -> None:
    """An exact breakdown has no mark, an estimated one has, and it survives."""
    assert '"estimated"' not in StepEncoder().encode(traced_step())
    line = StepEncoder().encode(counted_step())
    assert '"estimated":true' in line
    assert read(line).moments[Moment.STEP_END].estimated


def test_a_missing_reading_is_null() -> None:
    """What is not known is null, and so is the allocator's count where none was asked."""
    bare = traced_step(batch=None, allocator=None, device_memory=None, step_seconds=None)
    peak = replace(bare.moments[Moment.PEAK], allocated_bytes=None)
    line = StepEncoder().encode(replace(bare, moments={Moment.PEAK: peak}))
    found = json.loads(line)
    assert [found[name] for name in ("batch", "allocator", "device_memory", "step_seconds")] == [None] * 4
    assert found["moments"]["peak"]["allocated_bytes"] is None
    assert read(line).moments[Moment.PEAK] == peak


def test_a_driver_figure_that_is_no_number_is_left_out() -> None:
    """NaN, which JSON does not have, counts as not known."""
    record = traced_step()
    assert record.device_memory is not None
    line = StepEncoder().encode(replace(record, device_memory=replace(record.device_memory, power_watts=float("nan"))))
    assert read(line).device_memory == replace(record.device_memory, power_watts=None)


def test_unknown_fields_are_ignored() -> None:
    """Fields of a newer memtrace are skipped at every level."""
    found = document()
    for holder in holders(found):
        if isinstance(holder, dict) and holder is not found["moments"]:
            holder["added_later"] = {"any": ["thing"]}
    assert parse_step(found, "x") == traced_step()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "memtrace.step/2", "schema must be 'memtrace.step/1', got 'memtrace.step/2'"),
        (["step"], True, "step must be an integer from 0 to 2**63 - 1, got True"),
        (["step"], 1.0, "step must be an integer from 0 to 2**63 - 1, got 1.0"),
        (["rank"], -1, "rank must be an integer from 0 to 2**63 - 1, got -1"),
        (["traced"], 1, "traced must be true or false, got 1"),
        (["device"], "\ud800", "device must be a text"),
        (["self_seconds"], "0.1", "self_seconds must be a number, got '0.1'"),
        (["moments"], [], "moments must be an object, got []"),
        (["moments", "noon"], {}, "each field of moments must be one of forward_end, backward_end, step_end, peak"),
        (["moments", "peak", "entries"], None, "moments.peak.entries must be an array, got None"),
        (["moments", "peak", "entries", 1], 5, "moments.peak.entries[1] must be an object, got 5"),
        (["moments", "peak", "entries", 1, "category"], "love", "entries[1].category must be one of weights, "),
        (["moments", "peak", "entries", 1, "bytes"], 2**63, "moments.peak.entries[1].bytes must be an integer"),
        (["batch", "shape"], [1, "2"], "batch.shape[1] must be an integer from 0 to 2**63 - 1, got '2'"),
        (["allocator", "reserved_bytes"], None, "allocator.reserved_bytes must be an integer"),
        (["device_memory", "power_watts"], "much", "device_memory.power_watts must be a number, got 'much'"),
    ],
)
def test_the_message_names_file_line_and_field(path: list[Any], value: Any, message: str) -> None:
    """A wrong value is told with its place and with what was expected."""
    spoilt = holder = document()
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    with pytest.raises(LogFormatError) as caught:
        parse_step(spoilt, "steps.jsonl:7")
    assert str(caught.value).startswith("steps.jsonl:7: ")
    assert message in str(caught.value)


def test_an_entry_comes_once() -> None:
    """Two entries with the same category, component and dtype are an error, since their sum would be a guess."""
    spoilt = document()
    entries = spoilt["moments"]["peak"]["entries"]
    entries.append(entries[0])
    with pytest.raises(LogFormatError, match=r"moments.peak.entries\[8\] must differ from the entries before"):
        parse_step(spoilt, "x")


@pytest.mark.parametrize("line", ["NaN", '{"step": Infinity}', "[" * 100_000, "1" * 5000, b"\xff\xfe", ""])
def test_json_beyond_reason_is_an_error(line: str | bytes) -> None:
    """Constants that JSON does not have, endless nesting or digits, and wrong UTF-8 raise LogFormatError."""
    with pytest.raises(LogFormatError, match=r"^x: must be one JSON value, but "):
        parse_json(line, "x")


@given(steps)
def test_plans_and_steps_write_moments_alike(record: StepRecord) -> None:
    """The moments of a plan have the form of those of a step."""
    plan = moments_document(record.moments)
    assert plan == json.loads(StepEncoder().encode(record))["moments"]
    assert parse_moments(Fields.of(plan, "plan.json", "moments.")) == record.moments


def test_entries_are_encoded_again_when_they_change() -> None:
    """A record with other entries at the same moment is not written with the old ones."""
    encoder = StepEncoder()
    first, second = traced_step(), traced_step(moments={Moment.PEAK: traced_step().moments[Moment.PEAK]})
    shrunk = replace(second.moments[Moment.PEAK], entries=dict(list(second.moments[Moment.PEAK].entries.items())[:2]))
    for record in (first, replace(second, moments={Moment.PEAK: shrunk}), first):
        assert read(encoder.encode(record)) == record
