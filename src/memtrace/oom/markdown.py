"""The OOM report for people: Markdown that also reads well as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from memtrace.record.breakdown import AllocatorReading, EntryKey
from memtrace.record.categories import Phase
from memtrace.record.oom.report import FailedRequest, OomReport, Witness
from memtrace.record.units import format_bytes

_PLACES = {
    Phase.FORWARD: "in the forward pass",
    Phase.BACKWARD: "after the forward pass, in the loss or in the backward pass",
    Phase.OPTIMIZER: "in the optimizer's step",
    Phase.OUTSIDE: "outside of a training step",
}
_EVALUATION = "in an evaluation or a prediction"
_UNKNOWN = "not known"


def render_markdown(report: OomReport) -> str:
    """Returns the report as a Markdown document."""
    sections = (
        _head(report),
        _composition(report),
        _remedies(report),
        _holders(report),
        _blocks(report),
        _device(report),
        _fragments(report),
        _last_peak(report),
        _other_settings(report),
    )
    return "\n".join(line for section in sections for line in section)


def headline(report: OomReport) -> str:
    """Returns one sentence: where memory ran out, and what most of it was for."""
    step = "" if report.step is None else f" at step {report.step}"
    where = f"{step}, {_EVALUATION if report.request.evaluation else _PLACES[report.request.phase]}"
    what = "a failed allocation" if report.request.pending else "out of memory"
    top = next(iter(report.composition.by_category().items()), None)
    if top is None:
        return f"{what}{where}"
    category, size = top
    share = size / report.composition.total_bytes
    return f"{what}{where}; most was {category}, {format_bytes(size)} ({share:.0%} of what is known)"


def _head(report: OomReport) -> Iterator[str]:
    request = report.request
    moment = datetime.fromtimestamp(report.unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"# Out of memory: {_text(report.run_name)}, rank {report.rank}, {report.device}"
    yield ""
    sentence = headline(report)
    yield f"{sentence[0].upper()}{sentence[1:]}."
    yield ""
    if request.pending:
        yield (
            "No exception had followed when this was written. torch catches such a failure where it can go on with "
            "less, as in a search for a convolution's workspace; or the training loop has caught it. It is not counted."
        )
        yield ""
    batch = "" if report.batch is None else " x ".join(map(str, report.batch.shape))
    yield from _table(
        ("", ""),
        [
            ("time", moment),
            *([("launch", _text(report.run_id))] if report.run_id else ()),
            ("asked for", _asked_for(request)),
            ("free on the device then", _size(request.free_bytes)),
            ("batch", f"{batch}, {report.batch.tokens} tokens in the step" if report.batch else _UNKNOWN),
            ("module", _UNKNOWN if request.module is None else _module(request.module)),
            ("told by", request.witness.value),
            *([("message", _text(request.message))] if request.message else ()),
        ],
    )


def _composition(report: OomReport) -> Iterator[str]:
    composition = report.composition
    yield "## What memory was for"
    yield ""
    if report.request.witness is Witness.RESTART:
        yield "Read when Trainer began again: what the failed step held on top of this was gone by then."
        yield ""
    if not composition.complete:
        yield (
            "Only what lives longer than a step could be seen: this device lists no blocks, and the step was not "
            "traced."
        )
        yield ""
    if composition.estimated:
        yield "Activations were told from other blocks by counters: the step was not traced."
        yield ""
    total = composition.total_bytes
    rows = [
        (key.category, key.component, key.dtype, format_bytes(size), f"{size / total:.1%}")
        for key, size in composition.entries.items()
    ]
    yield from _table(
        ("category", "component", "dtype", "bytes", "share"),
        [*rows, ("**sum**", "", "", f"**{format_bytes(total)}**", "")],
    )
    if composition.allocated_bytes is not None:
        yield f"The allocator counts {format_bytes(composition.allocated_bytes)}."
        yield ""


def _remedies(report: OomReport) -> Iterator[str]:
    if not report.remedies:
        return
    yield "## What would have helped"
    yield ""
    yield "Each alone, computed from what was allocated at that moment; two together save less than their sum."
    yield ""
    fits = {True: "yes", False: "no", None: _UNKNOWN}
    yield from _table(
        ("remedy", "saves up to", "request would fit", "how"),
        [
            (_code(remedy.kind), format_bytes(remedy.saved_bytes), fits[remedy.would_fit], _text(remedy.advice))
            for remedy in report.remedies
        ],
    )


def _holders(report: OomReport) -> Iterator[str]:
    if not report.holders:
        return
    yield "## Largest holders"
    yield ""
    yield "Modules by what is kept for their parameters and buffers. Activations are not told apart by module."
    yield ""
    yield from _table(
        ("module", "count", "bytes", "of which"),
        [
            (
                _module(holder.name),
                str(holder.modules),
                format_bytes(holder.total_bytes),
                ", ".join(f"{category} {format_bytes(size)}" for category, size in holder.categories.items()),
            )
            for holder in report.holders
        ],
    )


def _blocks(report: OomReport) -> Iterator[str]:
    if not report.large_blocks:
        return
    yield "## Largest blocks"
    yield ""
    yield from _table(
        ("bytes", "category", "module"),
        [
            (format_bytes(block.nbytes), _label(block.key), "" if block.module is None else _module(block.module))
            for block in report.large_blocks
        ],
    )


def _device(report: OomReport) -> Iterator[str]:
    rows: list[tuple[str, str]] = []
    allocator, cut_up, device = report.allocator, report.fragmentation, report.device_memory
    if allocator is not None:
        rows += [
            ("allocated, as the allocator rounds it", _size(allocator.allocated_bytes)),
            ("reserved by the allocator", _size(allocator.reserved_bytes)),
            ("slack (reserved, not allocated)", _size(allocator.slack_bytes)),
            *_private_pools(allocator),
        ]
    if cut_up is not None:
        rows += [
            ("free in the allocator's segments", f"{_size(cut_up.free_bytes)} in {cut_up.segments} segments"),
            ("largest free piece", _size(cut_up.largest_free_bytes)),
            ("expandable segments", "yes" if cut_up.expandable else "no"),
        ]
    if device is not None:
        rows += [
            ("device, total", _size(device.total_bytes)),
            ("device, used", _size(device.used_bytes)),
            ("device, free", _size(device.free_bytes)),
            ("this process", _size(device.process_bytes)),
            ("of it not torch's", _size(device.non_torch_bytes)),
            ("other processes", _size(device.other_processes_bytes)),
        ]
    if report.limit_bytes is not None:
        rows.append(("limit of the settings", _size(report.limit_bytes)))
    if rows:
        yield "## Allocator and device"
        yield ""
        yield from _table(("", ""), rows)


def _fragments(report: OomReport) -> Iterator[str]:
    cut_up = report.fragmentation
    if cut_up is None or not cut_up.pinned:
        return
    yield "## Fragments"
    yield ""
    yield "Free memory that cannot be given back to the device, since the segment has blocks in use: the largest."
    yield ""
    yield from _table(
        ("free", "of a segment of", "blocks in use", "the smallest of them"),
        [
            (
                format_bytes(segment.free_bytes),
                format_bytes(segment.size),
                str(segment.pinned_by),
                ", ".join(f"{_label(key)} {format_bytes(size)}" for size, key in segment.pins) or _UNKNOWN,
            )
            for segment in cut_up.pinned
        ],
    )


def _private_pools(allocator: AllocatorReading) -> Iterator[tuple[str, str]]:
    if allocator.private_pool_bytes:
        yield "private pools (CUDA graphs), which nobody else can use", _size(allocator.private_pool_bytes)


def _last_peak(report: OomReport) -> Iterator[str]:
    peak = report.last_traced_peak
    if peak is None:
        return
    yield f"## Peak of the last traced step ({report.last_traced_step})"
    yield ""
    yield from _table(
        ("category", "bytes"),
        [
            *((category, format_bytes(size)) for category, size in peak.by_category().items()),
            ("**sum**", f"**{format_bytes(peak.total_bytes)}**"),
        ],
    )


def _other_settings(report: OomReport) -> Iterator[str]:
    answer = report.allocator_answer
    if answer is None:
        return
    yield "## Other settings of the allocator"
    yield ""
    yield (
        f"By a model of the allocator, for what it was asked for in {_text(answer.origin)}, the traced step with the "
        "highest peak. Each begins with an empty cache: fragments of earlier steps are in none."
    )
    yield ""
    fits = {True: "yes", False: "no", None: _UNKNOWN}
    yield from _table(
        (_code(answer.variable), "reserved at the peak", "saves", "request would fit", "retries"),
        [
            (
                f"{_code(outcome.settings) if outcome.settings else 'defaults'}{' (in force)' * outcome.in_force}",
                format_bytes(outcome.reserved_bytes),
                format_bytes(outcome.saved_bytes),
                "" if outcome.in_force else fits[outcome.would_fit],
                str(outcome.retries),
            )
            for outcome in answer.outcomes
        ],
    )
    best = answer.outcomes[0]
    if best.saved_bytes > 0:
        yield f"To try the first: `export {answer.variable}={best.settings}`."
    else:
        yield "None reserves less in that step."
    yield ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _asked_for(request: FailedRequest) -> str:
    if request.segment_bytes is None:
        return _size(request.requested_bytes)
    segment = f"a segment of {_size(request.segment_bytes)}"
    if request.requested_bytes is None:
        return f"at most {segment}"
    return f"{_size(request.requested_bytes)}, for which the allocator wanted {segment}"


def _size(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{format_bytes(count)} ({count} B)"


def _label(key: EntryKey) -> str:
    return " ".join(part for part in key if part)


def _text(text: str) -> str:
    """Returns text that can stand in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _module(name: str) -> str:
    return _code(name) if name else "the model itself"


def _code(text: str) -> str:
    return f"`{_text(text).replace('`', '')}`"
