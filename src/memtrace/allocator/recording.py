"""What CUDA's caching allocator was asked for, in order: enough to replay it under other settings. Plain data.

The JSON form, which `exporters.allocator_file` compresses:

`{"schema": "memtrace.allocator-recording/1", "origin": "step 12 of llama", "rank": 0, "torch": "2.13.0", "settings":
"max_split_size_mb:128", "sizes_at_begin": [N, ...], "events": [4096, 512, -1, ...], "names": ["weights trainable
bfloat16", ...], "labels": [0, ...], "addresses": [N, ...], "streams": [0, ...], "from_the_start": false, "limit_bytes":
N, "peak_reserved_bytes": N, "failed_bytes": N}`.

Blocks are numbered, first those that were there at the begin, then each one as it is allocated. An event above 0
allocates so many bytes for the next block; -1 frees block 0, -2 block 1, and so on; 0 is an emptied cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memtrace.errors import LogFormatError
from memtrace.record.strict_json import Fields

RECORDING_SCHEMA = "memtrace.allocator-recording/1"
MAX_BLOCK = 2**44
"""Bytes that a block can have: more than any device."""
MAX_STREAMS = 4096
"""Streams that a recording can have: each has pools of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorRecording:
    """A stretch of an allocator's history. Sizes are as requested, in bytes."""

    sizes_at_begin: Sequence[int]
    """Blocks that were in use at the begin, in the order of their addresses."""
    events: Sequence[int]
    """What happened, as the module says."""
    settings: str = ""
    """PYTORCH_ALLOC_CONF of the process; empty for torch's defaults."""
    torch: str = ""
    """Version of torch; empty where nobody says."""
    origin: str = ""
    """What was recorded, for people."""
    rank: int = 0
    from_the_start: bool = False
    """Whether nothing had been allocated before: the model's blocks then lie where the allocator's lay."""
    limit_bytes: int | None = None
    """What the allocator could reserve of the device in all; None where nobody says."""
    peak_reserved_bytes: int | None = None
    """The most that was reserved while it was recorded; None where nobody says."""
    failed_bytes: int | None = None
    """A request after all events that the device had no room for; None without one."""
    names: Sequence[str] = ()
    """What blocks are for: categories, or the innermost frame of a stack."""
    labels: Sequence[int] = ()
    """One of `names` for each block; empty where nothing is known."""
    addresses: Sequence[int] = ()
    """Address of each block; empty where nobody says."""
    streams: Sequence[int] = ()
    """Stream of each block, as small numbers; empty where all are of one."""

    @property
    def blocks(self) -> int:
        """How many blocks there are in all."""
        return len(self.sizes_at_begin) + sum(event > 0 for event in self.events)

    def name(self, block: int) -> str:
        """Returns what a block is for; empty where that is not known."""
        return self.names[self.labels[block]] if self.labels else ""


def recording_document(recording: AllocatorRecording) -> dict[str, Any]:
    """Returns the JSON form."""
    return {
        "schema": RECORDING_SCHEMA,
        "origin": recording.origin,
        "rank": recording.rank,
        "torch": recording.torch,
        "settings": recording.settings,
        "from_the_start": recording.from_the_start,
        "limit_bytes": recording.limit_bytes,
        "peak_reserved_bytes": recording.peak_reserved_bytes,
        "failed_bytes": recording.failed_bytes,
        "names": list(recording.names),
        "sizes_at_begin": list(recording.sizes_at_begin),
        "events": list(recording.events),
        "labels": list(recording.labels),
        "addresses": list(recording.addresses),
        "streams": list(recording.streams),
    }


def parse_recording(value: Any, source: str) -> AllocatorRecording:
    """Returns the recording that a JSON document stands for.

    Raises:
        LogFormatError: it is none, or its events do not fit together.
    """
    found = Fields.of(value, source)
    found.schema(RECORDING_SCHEMA)
    sizes, events = _numbers(found, "sizes_at_begin", 0), _numbers(found, "events", -MAX_BLOCK)
    blocks = _checked(sizes, events, source)
    names = [str(name) for name in found.array("names")]
    labels, addresses = _numbers(found, "labels", 0, len(names)), _numbers(found, "addresses", 0, 2**63)
    streams = _numbers(found, "streams", 0, MAX_STREAMS)
    for column in (labels, addresses, streams):
        if len(column) not in (0, blocks):
            raise LogFormatError(f"{source}: labels, addresses and streams must have one number for each block")
    failed_bytes = found.optional("failed_bytes", Fields.integer)
    if failed_bytes is not None and not 0 < failed_bytes < MAX_BLOCK:
        raise LogFormatError(f"{source}: failed_bytes must be above 0 and below {MAX_BLOCK}, got {failed_bytes}")
    return AllocatorRecording(
        sizes_at_begin=sizes,
        events=events,
        settings=found.text("settings"),
        torch=found.text("torch"),
        origin=found.text("origin"),
        rank=found.integer("rank"),
        from_the_start=found.boolean("from_the_start"),
        limit_bytes=found.optional("limit_bytes", Fields.integer),
        peak_reserved_bytes=found.optional("peak_reserved_bytes", Fields.integer),
        failed_bytes=failed_bytes,
        names=names,
        labels=labels,
        addresses=addresses,
        streams=streams,
    )


def _numbers(found: Fields, name: str, low: int, high: int = MAX_BLOCK) -> Sequence[int]:
    """Returns an array of integers from `low` to below `high`: a million of them, so not one by one."""
    values = found.array(name)
    if {type(value) for value in values} - {int} or (values and not (low <= min(values) and max(values) < high)):
        raise LogFormatError(f"{found.source}: {name} must be integers from {low} to below {high}")
    return array("q", values)


def _checked(sizes: Sequence[int], events: Sequence[int], source: str) -> int:
    """Returns how many blocks there are; raises where one is freed that is not in use."""
    live = bytearray(b"\x01") * len(sizes)
    for at, event in enumerate(events):
        if event > 0:
            live.append(1)
        elif event < 0:
            if -event > len(live) or not live[-event - 1]:
                raise LogFormatError(f"{source}: events[{at}] frees block {-event - 1}, which is not in use")
            live[-event - 1] = 0
    if sizes and not min(sizes):
        raise LogFormatError(f"{source}: sizes_at_begin must be above 0")
    return len(live)


def label_columns(texts: Iterable[str]) -> tuple[Sequence[str], Sequence[int]]:
    """Returns `names` and `labels` for one text a block."""
    numbers: dict[str, int] = {}
    labels = array("q", (numbers.setdefault(text, len(numbers)) for text in texts))
    return list(numbers), labels
