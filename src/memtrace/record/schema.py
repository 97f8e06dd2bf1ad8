"""The JSON forms of the public contract: a step of the step log, and the moments that steps and plans share.

Reading is strict on types and lenient on fields it does not know, so that fields can be added to a schema without
breaking those who read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, get_args, get_type_hints

from memtrace.errors import LogFormatError
from memtrace.record.breakdown import (
    AllocatorReading,
    BatchShape,
    Breakdown,
    DeviceReading,
    EntryKey,
    StepRecord,
    ordered_entries,
)
from memtrace.record.categories import Category, Moment
from memtrace.record.strict_json import Fields

STEP_SCHEMA = "memtrace.step/1"
PLAN_SCHEMA = "memtrace.plan/1"

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_Reading = TypeVar("_Reading", AllocatorReading, DeviceReading)


class StepEncoder:
    """Writes records as JSON, one line each.

    Called on the training thread after every step: the entries of a moment are encoded anew only where they differ
    from those of the record before.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Mapping[EntryKey, int], str]] = {}

    def encode(self, record: StepRecord) -> str:
        """Returns the record as one line of JSON in ASCII, without the line feed."""
        moments = ",".join(f'"{moment}":{self._breakdown(moment, found)}' for moment, found in record.moments.items())
        host = f',"host":{self._encoded("host", record.host)}' if record.host else ""
        return f'{_encode(_step_head(record))[:-1]},"moments":{{{moments}}}{host}}}'

    def _breakdown(self, moment: Moment, breakdown: Breakdown) -> str:
        allocated = "null" if breakdown.allocated_bytes is None else breakdown.allocated_bytes
        estimated = ',"estimated":true' if breakdown.estimated else ""
        entries = self._encoded(moment, breakdown.entries)
        return f'{{"allocated_bytes":{allocated}{estimated},"entries":{entries}}}'

    def _encoded(self, place: str, entries: Mapping[EntryKey, int]) -> str:
        before, text = self._entries.get(place, ({}, "[]"))
        if before is not entries and before != entries:
            text = _encode(entry_documents(entries))
            self._entries[place] = (entries, text)
        return text


def moments_document(moments: Mapping[Moment, Breakdown]) -> dict[str, Any]:
    """Returns breakdowns by moment as plans and reports hold them, ready for `json`."""
    return {
        moment.value: _breakdown_head(found) | {"entries": entry_documents(found.entries)}
        for moment, found in moments.items()
    }


def parse_step(document: Any, source: str) -> StepRecord:
    """Returns the record that one line of a step log stands for.

    Args:
        document: the line, parsed.
        source: file and line, for messages.

    Raises:
        LogFormatError: the document is not a `memtrace.step/1`; the message names the source and the field.
    """
    step = Fields.of(document, source)
    step.schema(STEP_SCHEMA)
    return StepRecord(
        step=step.integer("step"),
        rank=step.integer("rank"),
        device=step.text("device"),
        traced=step.boolean("traced"),
        unix_seconds=step.number("unix_seconds"),
        self_seconds=step.number("self_seconds"),
        slowed_seconds=step.optional("slowed_seconds", Fields.number) or 0.0,
        step_seconds=step.optional("step_seconds", Fields.number),
        batch=parse_batch(step.optional("batch", Fields.object)),
        traced_from_micro_batch=step.optional("traced_from_micro_batch", Fields.integer),
        moments=parse_moments(step.object("moments")),
        host=parse_entries(step.optional("host", Fields.objects) or ()),
        allocator=parse_reading(AllocatorReading, step.optional("allocator", Fields.object)),
        device_memory=parse_reading(DeviceReading, step.optional("device_memory", Fields.object)),
        peak_counter_reset=step.optional("peak_counter_reset", Fields.boolean) or False,
        run_id=step.optional("run_id", Fields.text) or "",
        replaced_bytes=step.optional("replaced_bytes", Fields.integer) or 0,
    )


def parse_moments(moments: Fields) -> Mapping[Moment, Breakdown]:
    """Returns the breakdowns of a step or a plan, read-only.

    Raises:
        LogFormatError: a moment is not known, or its breakdown has not the documented form.
    """
    found = moments.by_word(Moment).items()
    return {moment: _parse_breakdown(moment, breakdown) for moment, breakdown in found}


def _step_head(record: StepRecord) -> dict[str, Any]:
    head = {
        "schema": STEP_SCHEMA,
        "step": record.step,
        "rank": record.rank,
        "device": record.device,
        "traced": record.traced,
        "unix_seconds": record.unix_seconds,
        "self_seconds": record.self_seconds,
        "slowed_seconds": record.slowed_seconds,
        "step_seconds": record.step_seconds,
        "batch": batch_document(record.batch),
        "allocator": reading_document(record.allocator),
        "device_memory": reading_document(record.device_memory),
    }
    if record.traced_from_micro_batch is not None:
        head["traced_from_micro_batch"] = record.traced_from_micro_batch
    if record.replaced_bytes:
        head["replaced_bytes"] = record.replaced_bytes
    if record.run_id:
        head["run_id"] = record.run_id
    return head | {"peak_counter_reset": True} if record.peak_counter_reset else head


def _breakdown_head(breakdown: Breakdown) -> dict[str, Any]:
    head: dict[str, Any] = {"allocated_bytes": breakdown.allocated_bytes}
    return head | {"estimated": True} if breakdown.estimated else head


def entry_documents(entries: Mapping[EntryKey, int]) -> list[dict[str, Any]]:
    """Returns entries as steps, plans and reports hold them, ready for `json`."""
    return [
        {"category": key.category.value, "component": key.component, "dtype": key.dtype, "bytes": size}
        for key, size in entries.items()
    ]


def parse_entries(items: Iterable[Fields]) -> Mapping[EntryKey, int]:
    """Returns the entries that an array of objects stands for, read-only.

    Raises:
        LogFormatError: one has not the documented form, or two are for the same.
    """
    entries: dict[EntryKey, int] = {}
    for entry in items:
        key = EntryKey(entry.word("category", Category), entry.text("component"), entry.text("dtype"))
        if key in entries:
            raise LogFormatError(f"{entry.source}: {entry.path.removesuffix('.')} must differ from the entries before")
        entries[key] = entry.integer("bytes")
    return ordered_entries(entries)


def batch_document(batch: BatchShape | None) -> dict[str, Any] | None:
    """Returns the shape of a batch as steps and reports hold it; None where it is not known."""
    if batch is None:
        return None
    return {
        "shape": batch.shape,
        "tokens": batch.tokens,
        "largest_micro_batch_tokens": batch.largest_micro_batch_tokens,
    }


def reading_document(reading: AllocatorReading | DeviceReading | None) -> dict[str, Any] | None:
    """Returns what is known; what is not has no field."""
    if reading is None:
        return None
    return {
        name: value
        for name in _READING_FIELDS[type(reading)]
        if (value := getattr(reading, name)) is not None and (type(value) is not float or math.isfinite(value))
    }


def _parse_breakdown(moment: Moment, breakdown: Fields) -> Breakdown:
    return Breakdown(
        moment=moment,
        entries=parse_entries(breakdown.objects("entries")),
        allocated_bytes=breakdown.optional("allocated_bytes", Fields.integer),
        estimated=breakdown.optional("estimated", Fields.boolean) or False,
    )


def parse_batch(batch: Fields | None) -> BatchShape | None:
    """Returns the shape of a batch; None where the document has none."""
    if batch is None:
        return None
    return BatchShape(
        shape=batch.integers("shape"),
        tokens=batch.integer("tokens"),
        largest_micro_batch_tokens=batch.integer("largest_micro_batch_tokens"),
    )


def parse_reading(form: type[_Reading], reading: Fields | None) -> _Reading | None:
    """Returns a reading of the allocator or of the device; None where the document has none."""
    if reading is None:
        return None
    return form(**{name: parse(reading, name) for name, parse in _READING_FIELDS[form].items()})


def _field_parsers(form: type) -> Mapping[str, Callable[[Fields, str], Any]]:
    """Returns how each field of a reading is read, by its annotation: `int`, or `int | None` where it may be absent."""
    kinds = {int: Fields.integer, float: Fields.number, str: Fields.text}
    parsers: dict[str, Callable[[Fields, str], Any]] = {}
    for name, annotation in get_type_hints(form).items():
        types = get_args(annotation) or (annotation,)
        kind: Callable[[Fields, str], Any] = kinds[types[0]]
        parsers[name] = partial(Fields.optional, kind=kind) if type(None) in types else kind
    return parsers


_READING_FIELDS = {form: _field_parsers(form) for form in (AllocatorReading, DeviceReading)}
