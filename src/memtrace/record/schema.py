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

    Called on the training thread after every step with a record: what is as in the record before is not encoded again.
    The line comes in parts of less than a kilobyte each, mostly: asked for more at once, glibc first joins all small
    pieces that the training has let go of (`malloc_consolidate`), which takes longer than to encode the line.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Mapping[EntryKey, int], str]] = {}
        self._beginnings: dict[EntryKey, str] = {}
        """What the text of an entry begins with."""
        self._device: tuple[DeviceReading | None, str] = (None, "null")
        self._place: tuple[tuple[int, str, str], str, str] | None = None
        """Rank, device and run of the record before, as they stand at the beginning and at the end of the head."""

    def encode(self, record: StepRecord) -> str:
        """Returns the record as one line of JSON in ASCII, without the line feed."""
        return b"".join(self.parts(record)).decode("ascii")

    def parts(self, record: StepRecord) -> list[bytes]:
        """Returns the parts of that line, in order: the head, each moment, and the end."""
        parts, before = [self._head(record)], ""
        for moment, found in record.moments.items():
            allocated = "null" if found.allocated_bytes is None else found.allocated_bytes
            estimated = ',"estimated":true' if found.estimated else ""
            entries = self._entries_text(moment, found.entries)
            text = f'{before}"{moment}":{{"allocated_bytes":{allocated}{estimated},"entries":{entries}}}'
            parts.append(text.encode("ascii"))
            before = ","
        host = f',"host":{self._entries_text("host", record.host)}' if record.host else ""
        parts.append(f"}}{host}}}".encode("ascii"))
        return parts

    def _head(self, record: StepRecord) -> bytes:
        place = record.rank, record.device, record.run_id
        if self._place is None or place != self._place[0]:
            run = f',"run_id":{_encode(record.run_id)}' if record.run_id else ""
            self._place = place, f'"rank":{record.rank},"device":{_encode(record.device)}', run
        _, begin, run = self._place
        if record.device_memory is not self._device[0]:
            self._device = record.device_memory, _reading_text(record.device_memory)
        from_batch, replaced = record.traced_from_micro_batch, record.replaced_bytes
        return "".join(
            (
                f'{{"schema":"{STEP_SCHEMA}","step":{record.step},{begin}',
                f',"traced":{"true" if record.traced else "false"},"unix_seconds":{_number(record.unix_seconds)}',
                f',"self_seconds":{_number(record.self_seconds)},"slowed_seconds":{_number(record.slowed_seconds)}',
                f',"step_seconds":{_number(record.step_seconds)},"batch":{_batch_text(record.batch)}',
                f',"allocator":{_reading_text(record.allocator)},"device_memory":{self._device[1]}',
                "" if from_batch is None else f',"traced_from_micro_batch":{from_batch}',
                f',"replaced_bytes":{replaced}' if replaced else "",
                run,
                ',"peak_counter_reset":true' if record.peak_counter_reset else "",
                ',"moments":{',
            )
        ).encode("ascii")

    def _entries_text(self, place: str, entries: Mapping[EntryKey, int]) -> str:
        before, text = self._entries.get(place, ({}, "[]"))
        if before is not entries and before != entries:
            text = f"[{','.join([f'{self._beginning(key)}{size}}}' for key, size in entries.items()])}]"
            self._entries[place] = (entries, text)
        return text

    def _beginning(self, key: EntryKey) -> str:
        if key not in self._beginnings:
            self._beginnings[key] = _encode(entry_documents({key: 0})[0]).removesuffix("0}")
        return self._beginnings[key]


def _number(value: float | None) -> str:
    return "null" if value is None else repr(value)


def _batch_text(batch: BatchShape | None) -> str:
    document = batch_document(batch)
    return "null" if document is None else _encode(document)


def _reading_text(reading: AllocatorReading | DeviceReading | None) -> str:
    document = reading_document(reading)
    if document is None:
        return "null"
    fields = [f'"{name}":{_encode(v) if type(v) is str else repr(v)}' for name, v in document.items()]
    return f"{{{','.join(fields)}}}"


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
