"""The JSON form of an OOM report, `memtrace.oom/1`."""

from __future__ import annotations

import json
from typing import Any

from memtrace.record.breakdown import AllocatorReading, DeviceReading, EntryKey
from memtrace.record.categories import Category, Moment, Phase
from memtrace.record.oom.report import (
    AllocatorAnswer,
    Composition,
    FailedRequest,
    Fragmentation,
    Holder,
    LargeBlock,
    OomReport,
    PinnedSegment,
    Remedy,
    RemedyKind,
    SettingOutcome,
    Witness,
)
from memtrace.record.schema import (
    batch_document,
    entry_documents,
    moments_document,
    parse_batch,
    parse_entries,
    parse_moments,
    parse_reading,
    reading_document,
)
from memtrace.record.strict_json import Fields

OOM_SCHEMA = "memtrace.oom/1"


def encode(report: OomReport) -> str:
    """Returns the report as JSON in ASCII. Bounded: names, blocks and messages were cut when the report was made."""
    return json.dumps(report_document(report), indent=1, allow_nan=False)


def report_document(report: OomReport) -> dict[str, Any]:
    """Returns the report ready for `json`. What is not known is null or has no field."""
    peak = report.last_traced_peak
    cut_up = report.fragmentation
    return {
        "schema": OOM_SCHEMA,
        "run": report.run_name,
        **({"run_id": report.run_id} if report.run_id else {}),
        "rank": report.rank,
        "world_size": report.world_size,
        "device": report.device,
        "unix_seconds": report.unix_seconds,
        "step": report.step,
        "batch": batch_document(report.batch),
        "request": {
            "witness": report.request.witness.value,
            "phase": report.request.phase.value,
            "requested_bytes": report.request.requested_bytes,
            "segment_bytes": report.request.segment_bytes,
            "free_bytes": report.request.free_bytes,
            "module": report.request.module,
            "message": report.request.message,
            "pending": report.request.pending,
            "evaluation": report.request.evaluation,
        },
        "composition": {
            "allocated_bytes": report.composition.allocated_bytes,
            "complete": report.composition.complete,
            "estimated": report.composition.estimated,
            "entries": entry_documents(report.composition.entries),
        },
        "holders": [
            {
                "name": holder.name,
                "modules": holder.modules,
                "categories": {category.value: size for category, size in holder.categories.items()},
            }
            for holder in report.holders
        ],
        "large_blocks": [
            entry_documents({block.key: block.nbytes})[0] | {"module": block.module} for block in report.large_blocks
        ],
        "allocator": reading_document(report.allocator),
        "fragmentation": cut_up
        and {
            "free_bytes": cut_up.free_bytes,
            "largest_free_bytes": cut_up.largest_free_bytes,
            "segments": cut_up.segments,
            "expandable": cut_up.expandable,
            "pinned": [
                {
                    "bytes": segment.size,
                    "free_bytes": segment.free_bytes,
                    "pinned_by": segment.pinned_by,
                    "pins": [entry_documents({key: size})[0] for size, key in segment.pins],
                }
                for segment in cut_up.pinned
            ],
        },
        "device_memory": reading_document(report.device_memory),
        "limit_bytes": report.limit_bytes,
        "last_traced": None
        if report.last_traced_step is None
        else {
            "step": report.last_traced_step,
            "moments": {} if peak is None else moments_document({Moment.PEAK: peak}),
        },
        "remedies": [
            {
                "kind": remedy.kind.value,
                "saved_bytes": remedy.saved_bytes,
                "would_fit": remedy.would_fit,
                "advice": remedy.advice,
            }
            for remedy in report.remedies
        ],
        **_answer_document(report.allocator_answer),
    }


def _answer_document(answer: AllocatorAnswer | None) -> dict[str, Any]:
    if answer is None:
        return {}
    return {
        "allocator_answer": {
            "origin": answer.origin,
            "variable": answer.variable,
            "outcomes": [
                {
                    "settings": outcome.settings,
                    "in_force": outcome.in_force,
                    "reserved_bytes": outcome.reserved_bytes,
                    "saved_bytes": outcome.saved_bytes,
                    "retries": outcome.retries,
                    "would_fit": outcome.would_fit,
                }
                for outcome in answer.outcomes
            ],
        }
    }


def parse_report(document: Any, source: str) -> OomReport:
    """Returns the report that a JSON document stands for.

    Args:
        document: the document, parsed.
        source: the file, for messages.

    Raises:
        LogFormatError: the document is not a `memtrace.oom/1`; the message names the source and the field.
    """
    report = Fields.of(document, source)
    report.schema(OOM_SCHEMA)
    traced = report.optional("last_traced", Fields.object)
    return OomReport(
        run_name=report.text("run"),
        run_id=report.optional("run_id", Fields.text) or "",
        rank=report.integer("rank"),
        world_size=report.integer("world_size"),
        device=report.text("device"),
        unix_seconds=report.number("unix_seconds"),
        step=report.optional("step", Fields.integer),
        batch=parse_batch(report.optional("batch", Fields.object)),
        request=_parse_request(report.object("request")),
        composition=_parse_composition(report.object("composition")),
        holders=tuple(map(_parse_holder, report.objects("holders"))),
        large_blocks=tuple(map(_parse_block, report.objects("large_blocks"))),
        allocator=parse_reading(AllocatorReading, report.optional("allocator", Fields.object)),
        fragmentation=_parse_fragmentation(report.optional("fragmentation", Fields.object)),
        device_memory=parse_reading(DeviceReading, report.optional("device_memory", Fields.object)),
        limit_bytes=report.optional("limit_bytes", Fields.integer),
        last_traced_step=None if traced is None else traced.integer("step"),
        last_traced_peak=None if traced is None else parse_moments(traced.object("moments")).get(Moment.PEAK),
        remedies=tuple(map(_parse_remedy, report.objects("remedies"))),
        allocator_answer=_parse_answer(report.optional("allocator_answer", Fields.object)),
    )


def _parse_request(request: Fields) -> FailedRequest:
    return FailedRequest(
        witness=request.word("witness", Witness),
        phase=request.word("phase", Phase),
        requested_bytes=request.optional("requested_bytes", Fields.integer),
        segment_bytes=request.optional("segment_bytes", Fields.integer),
        free_bytes=request.optional("free_bytes", Fields.integer),
        module=request.optional("module", Fields.text),
        message=request.text("message"),
        pending=request.optional("pending", Fields.boolean) or False,
        evaluation=request.optional("evaluation", Fields.boolean) or False,
    )


def _parse_composition(composition: Fields) -> Composition:
    return Composition(
        entries=parse_entries(composition.objects("entries")),
        allocated_bytes=composition.optional("allocated_bytes", Fields.integer),
        complete=composition.boolean("complete"),
        estimated=composition.boolean("estimated"),
    )


def _parse_holder(holder: Fields) -> Holder:
    categories = holder.object("categories")
    return Holder(
        name=holder.text("name"),
        modules=holder.integer("modules"),
        categories={category: categories.integer(category) for category in categories.words(Category)},
    )


def _parse_block(block: Fields) -> LargeBlock:
    return LargeBlock(
        nbytes=block.integer("bytes"),
        key=EntryKey(block.word("category", Category), block.text("component"), block.text("dtype")),
        module=block.optional("module", Fields.text),
    )


def _parse_fragmentation(cut_up: Fields | None) -> Fragmentation | None:
    if cut_up is None:
        return None
    return Fragmentation(
        free_bytes=cut_up.integer("free_bytes"),
        largest_free_bytes=cut_up.integer("largest_free_bytes"),
        segments=cut_up.integer("segments"),
        expandable=cut_up.boolean("expandable"),
        pinned=tuple(map(_parse_pinned, cut_up.objects("pinned"))) if "pinned" in cut_up else (),
    )


def _parse_pinned(segment: Fields) -> PinnedSegment:
    return PinnedSegment(
        size=segment.integer("bytes"),
        free_bytes=segment.integer("free_bytes"),
        pinned_by=segment.integer("pinned_by"),
        pins=tuple(
            (pin.integer("bytes"), EntryKey(pin.word("category", Category), pin.text("component"), pin.text("dtype")))
            for pin in segment.objects("pins")
        ),
    )


def _parse_remedy(remedy: Fields) -> Remedy:
    return Remedy(
        kind=remedy.word("kind", RemedyKind),
        saved_bytes=remedy.integer("saved_bytes"),
        would_fit=remedy.optional("would_fit", Fields.boolean),
        advice=remedy.text("advice"),
    )


def _parse_answer(answer: Fields | None) -> AllocatorAnswer | None:
    if answer is None:
        return None
    return AllocatorAnswer(
        origin=answer.text("origin"),
        variable=answer.text("variable"),
        outcomes=tuple(map(_parse_outcome, answer.objects("outcomes"))),
    )


def _parse_outcome(outcome: Fields) -> SettingOutcome:
    return SettingOutcome(
        settings=outcome.text("settings"),
        in_force=outcome.boolean("in_force"),
        reserved_bytes=outcome.integer("reserved_bytes"),
        saved_bytes=int(outcome.number("saved_bytes")),
        retries=outcome.integer("retries"),
        would_fit=outcome.optional("would_fit", Fields.boolean),
    )
