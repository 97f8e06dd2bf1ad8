"""What an allocator's snapshot says, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memtrace.exporters.table import CompositionBar, Scale, category_name, printable
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import (
    DeviceReading,
    ReadBreakdown,
    ReadKey,
    SnapshotMoment,
    SnapshotReading,
)
from memtrace.record.units import format_bytes

_SHOWN_HOLDERS = 10
_SHOWN_CATEGORIES = 3
_EMPTY = "{}: the snapshot has no segments and no history"


def reading_table(reading: SnapshotReading) -> RenderableType:
    """Returns what one snapshot says of each of its devices."""
    parts: list[RenderableType] = []
    for device in reading.devices:
        parts += [Text(printable(" · ".join(_headline(reading, device))), "bold"), *_device(device)]
    if not parts:
        parts.append(Text(_EMPTY.format(printable(reading.name))))
    return Group(*parts)


def ranks_of_readings(readings: Sequence[SnapshotReading]) -> RenderableType:
    """Returns the peaks of several snapshots side by side.

    With the share of the fullest one, the request that failed, where one did, and the largest categories.
    """
    devices = [(reading.name, device) for reading in readings for device in reading.devices]
    fullest = max((device.moments[SnapshotMoment.PEAK].total_bytes for _, device in devices), default=0)
    scale = Scale(fullest)
    failed = any(device.failure is not None for _, device in devices)
    columns = ["allocated", "reserved", "share", *["failed"] * failed, "category"]
    table = _table(f"peak, {scale.unit}", *columns, narrowest=16)
    for name, device in devices:
        peak, failure = device.moments[SnapshotMoment.PEAK], device.failure
        largest = sorted(peak.by_category().items(), key=lambda item: -item[1])[:_SHOWN_CATEGORIES]
        table.add_row(
            Text(f"{printable(name)}, device {device.device}", "bold" if peak.total_bytes == fullest else ""),
            scale.cell(peak.total_bytes),
            scale.cell(peak.reserved_bytes),
            f"{peak.total_bytes / fullest:.0%}" if fullest else "",
            *["" if failure is None else scale.cell(failure.requested_bytes)] * failed,
            Text("\n".join(f"{category} {scale.cell(size)}" for category, size in largest)),
        )
    empty = [Text(_EMPTY.format(printable(reading.name))) for reading in readings if not reading.devices]
    return Group(table, *empty)


def difference_table(before: SnapshotReading, after: SnapshotReading) -> RenderableType:
    """Returns the peaks of two snapshots by category, and by how much the second is larger; of each device.

    A device that only one of them has is named.
    """
    parts: list[RenderableType] = []
    others = {device.device: device for device in after.devices}
    for device in before.devices:
        other = others.get(device.device)
        if other is None:
            continue
        first, second = device.moments[SnapshotMoment.PEAK], other.moments[SnapshotMoment.PEAK]
        sizes, new = first.by_category(), second.by_category()
        table = _table(f"peak of device {device.device}", printable(before.name), printable(after.name), "difference")
        for category in (category for category in Category if category in sizes or category in new):
            table.add_row(category_name(category), *_difference(sizes.get(category, 0), new.get(category, 0)))
        table.add_section()
        table.add_row("total", *_difference(first.total_bytes, second.total_bytes), style="bold")
        table.add_row("reserved", *_difference(first.reserved_bytes, second.reserved_bytes))
        parts.append(table)
    for one, two in ((before, others), (after, {device.device: device for device in before.devices})):
        alone = [str(device.device) for device in one.devices if device.device not in two]
        if alone:
            parts.append(Text(f"only {printable(one.name)} has device {', '.join(alone)}"))
    return Group(*parts) if parts else Text("the two snapshots have no device in common")


def _difference(before: int, after: int) -> tuple[str, str, str]:
    nbytes = after - before
    return format_bytes(before), format_bytes(after), f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)


def _headline(reading: SnapshotReading, device: DeviceReading) -> Iterator[str]:
    yield reading.name
    yield f"device {device.device}"
    if device.events:
        yield f"{device.events:,} changes"
    if device.steps:
        yield f"{device.steps} {'step' if device.steps == 1 else 'steps'} found"


def _device(device: DeviceReading) -> Iterator[RenderableType]:
    shown = [device.moments[moment] for moment in SnapshotMoment if moment in device.moments]
    if not device.events:
        shown = [device.moments[SnapshotMoment.END]]
    yield CompositionBar(shown[0].by_category())
    yield ""
    yield _moments(shown)
    yield ""
    if device.failure is not None:
        yield _failure(device)
    yield _holders(device)
    yield _free(device)
    for note in device.notes:
        yield Text(f"note: {note}", "dim")
    yield ""


def _moments(shown: Sequence[ReadBreakdown]) -> Table:
    scale = Scale(max(breakdown.total_bytes for breakdown in shown))
    table = _table(scale.unit, "source", *(breakdown.moment.value for breakdown in shown))
    keys = {key for breakdown in shown for key in breakdown.entries}
    order = {category: place for place, category in enumerate(Category)}
    for key in sorted(keys, key=lambda key: (order[key.category], key.component, key.dtype, key.source)):
        table.add_row(_name(key), key.source.value, *(scale.cell(row.entries.get(key, 0)) for row in shown))
    table.add_section()
    table.add_row("allocated", "", *(scale.cell(row.total_bytes) for row in shown), style="bold")
    table.add_row("reserved", "", *(scale.cell(row.reserved_bytes) for row in shown))
    return table


def _name(key: ReadKey) -> Text:
    name = category_name(key.category)
    detail = printable(f"{key.component} {key.dtype}".strip())
    return name.append(f"  {detail}", "dim") if detail else name


def _failure(device: DeviceReading) -> Group:
    failure = device.failure
    assert failure is not None
    free = "" if failure.free_bytes is None else f", with {format_bytes(failure.free_bytes)} free on the device"
    place = f" at {printable(failure.place)}" if failure.place else ""
    lines = [Text(f"failed: a request for {format_bytes(failure.requested_bytes)}{place}{free}", "bold")]
    for remedy in device.remedies:
        fits = {True: ", and the request would fit", False: "", None: ""}[remedy.would_fit]
        lines.append(Text(f"  saves up to {format_bytes(remedy.saved_bytes)}{fits}: {remedy.advice}"))
    return Group(*lines, "")


def _holders(device: DeviceReading) -> Table:
    at = SnapshotMoment.PEAK if device.failure is None else SnapshotMoment.FAILURE
    table = _table(f"largest holders at the {at.value}", "category", "blocks", "bytes")
    for holder in device.holders[:_SHOWN_HOLDERS]:
        each = f"{format_bytes(holder.nbytes // holder.blocks)} each"
        place = Text(printable(holder.place) if holder.place else each)
        table.add_row(place, holder.category.value, f"{holder.blocks:,}", format_bytes(holder.nbytes))
    return table


def _free(device: DeviceReading) -> Text:
    cut_up = device.fragmentation
    kind = "segments that can grow" if cut_up.expandable else "segments"
    return Text(
        f"free in {cut_up.segments:,} {kind} at the end: {format_bytes(cut_up.free_bytes)}, the largest piece "
        f"{format_bytes(cut_up.largest_free_bytes)}"
    )


def _table(title: str, *columns: str, narrowest: int = 28) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(title, min_width=narrowest, ratio=1, overflow="fold")
    for column in columns:
        left = column in ("source", "category")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "category")
    return table
