"""The breakdown of one step as a table for people: categories by moments, with shares of the peak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import StringIO

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from memtrace.record.breakdown import AllocatorReading, Breakdown, DeviceReading, EntryKey, StepRecord
from memtrace.record.categories import COLOURS, PERSISTENT, Category, Moment
from memtrace.record.units import GIB, MIB, format_bytes

TABLE_WIDTH = 100
"""Columns of a table that is not drawn on a terminal."""

MAX_COMPONENTS = 8
"""Components of one category that have a line of their own; the smaller ones share one."""

_BAR_WIDTH = 18


class CompositionBar:
    """One line over the whole width with a stretch in the colour of each category; nothing where there is no colour.

    Args:
        sizes: bytes of each category.
    """

    def __init__(self, sizes: Mapping[Category, int]) -> None:
        self._sizes = sizes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the line, below an empty one."""
        total = sum(self._sizes.values())
        if not total or console.color_system is None or console.no_color:
            return
        bar, begin, done = Text(no_wrap=True), 0, 0
        for category, size in self._sizes.items():
            done += size
            end = round(options.max_width * done / total)
            bar.append("█" * (end - begin), COLOURS[category])
            begin = end
        yield ""
        yield bar


class Scale:
    """The unit that all sizes of one table are written in.

    Args:
        largest: bytes of the largest size in the table: GiB from 1 GiB on, else MiB.
    """

    def __init__(self, largest: int) -> None:
        self.unit, self._factor = ("GiB", GIB) if largest >= GIB else ("MiB", MIB)

    def cell(self, size: int | None) -> Text:
        """Returns a size for a column of this unit; empty where it is not known."""
        if size is None:
            return Text("")
        if size == 0:
            return Text("-", "dim")
        number = size / self._factor
        return Text(f"{number:,.2f}" if abs(number) >= 0.005 else "<0.01")


def step_table(record: StepRecord) -> RenderableType:
    """Returns a step as a rich renderable: which step, its categories, its allocator and its device.

    Shares are of the peak, or of the last moment where the step's peak is not known.
    """
    parts: list[RenderableType] = [Text(" · ".join(_headline(record)), "bold")]
    shown = [record.moments[moment] for moment in Moment if moment in record.moments]
    if any(breakdown.total_bytes for breakdown in shown):
        parts += [CompositionBar(shown[-1].by_category()), "", _moments_table(shown), ""]
    else:
        parts.append(Text("nothing is known of what its memory was for"))
    parts.append(_readings(record))
    return Group(*parts)


def render_text(record: StepRecord, width: int = TABLE_WIDTH) -> str:
    """Returns the table as plain text for logs: at most `width` columns, no colours, no control sequences."""
    return plain_text(step_table(record), width)


def plain_text(renderable: RenderableType, width: int = TABLE_WIDTH) -> str:
    """Returns what a renderable prints on a terminal of that width that knows no colours."""
    console = Console(
        file=StringIO(), width=width, color_system=None, force_jupyter=False, legacy_windows=False, _environ={}
    )
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def printable(text: str) -> str:
    """Returns a text without what a terminal would take as a command."""
    return "".join(character if character.isprintable() else "?" for character in text)


def category_name(category: Category) -> Text:
    """Returns the name of a category beside a patch of its colour."""
    return Text.assemble(("■ ", COLOURS[category]), category.value)


def _headline(record: StepRecord) -> Iterator[str]:
    yield f"step {record.step}"
    yield f"rank {record.rank}"
    yield printable(record.device)
    if record.traced_from_micro_batch is not None:
        yield f"traced from micro batch {record.traced_from_micro_batch} on"
    else:
        yield "traced" if record.traced else "counted"
    if record.batch is not None:
        yield f"batch {' x '.join(map(str, record.batch.shape))}, {record.batch.tokens:,} tokens"
    if record.step_seconds is not None:
        yield _duration(record.step_seconds)
    slowed = f" and slowed it by {_duration(record.slowed_seconds)}" if record.slowed_seconds else ""
    yield f"memtrace took {_duration(record.self_seconds)}{slowed}"


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _moments_table(shown: Sequence[Breakdown]) -> Table:
    scale = Scale(max(breakdown.total_bytes for breakdown in shown))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(f"sizes in {scale.unit}", min_width=14, no_wrap=True, vertical="bottom")
    heads = [*(_moment_head(breakdown) for breakdown in shown), f"share of\n{shown[-1].moment.replace('_', ' ')}"]
    for head in heads:
        table.add_column(head, justify="right", min_width=8, no_wrap=True, vertical="bottom")
    table.add_column("", max_width=_BAR_WIDTH)
    for category in Category:
        keys = {key for breakdown in shown for key in breakdown.entries if key.category is category}
        if keys or category is Category.UNATTRIBUTED:
            _add_category(table, category, keys, shown, scale)
    table.add_section()
    table.add_row("total", *(scale.cell(breakdown.total_bytes) for breakdown in shown), style="bold")
    if any(breakdown.allocated_bytes is not None for breakdown in shown):
        table.add_row("allocated, counted apart", *(scale.cell(breakdown.allocated_bytes) for breakdown in shown))
    return table


def _moment_head(breakdown: Breakdown) -> str:
    name = breakdown.moment.replace("_", "\n")
    return f"{name}\nestimated" if breakdown.estimated else name


def _add_category(
    table: Table, category: Category, keys: set[EntryKey], shown: Sequence[Breakdown], scale: Scale
) -> None:
    """Adds the line of a category and, where it has several parts, one for each of them."""
    peak = shown[-1]
    whole, largest = peak.total_bytes, max(peak.by_category().values(), default=0)
    title = category_name(category)
    if len(keys) == 1:
        title.append(f"  {_component(*keys)}", "dim")
    cells = [scale.cell(_known_size(breakdown, category)) for breakdown in shown]
    bar = Bar(largest, 0, peak[category], color=COLOURS[category]) if peak[category] else ""
    table.add_row(title, *cells, _share(peak[category], whole), bar)
    if len(keys) > 1:
        for label, sizes in _components(keys, shown):
            share = _share(sizes[-1], whole)
            table.add_row(Text(f"    {label}"), *(scale.cell(size) for size in sizes), share, style="dim")


def _known_size(breakdown: Breakdown, category: Category) -> int | None:
    """Returns the bytes of a category; None where the breakdown is an estimate that cannot know it."""
    size = breakdown[category]
    return size if size or category in PERSISTENT or not breakdown.estimated else None


def _share(size: int, whole: int) -> str:
    if not size:
        return ""
    return f"{size / whole:.1%}" if size / whole >= 0.0005 else "<0.1%"


def _components(keys: set[EntryKey], shown: Sequence[Breakdown]) -> Iterator[tuple[str, list[int]]]:
    """Yields name and sizes of each part of a category, the largest first; the smallest together."""
    sizes = {key: [breakdown.entries.get(key, 0) for breakdown in shown] for key in keys}
    ranked = sorted(keys, key=lambda key: (-max(sizes[key]), key))
    apart = ranked if len(ranked) <= MAX_COMPONENTS else ranked[: MAX_COMPONENTS - 1]
    for key in apart:
        yield _component(key), sizes[key]
    rest = ranked[len(apart) :]
    if rest:
        yield f"{len(rest)} others", [sum(column) for column in zip(*(sizes[key] for key in rest), strict=True)]


def _component(key: EntryKey) -> str:
    return printable(f"{key.component} {key.dtype}".strip())


def _readings(record: StepRecord) -> Table:
    grid = Table.grid(padding=(0, 2))
    if record.allocator is not None:
        grid.add_row(Text("allocator", "bold"), _listed(_allocator_sizes(record.allocator)))
        if _replays_graphs(record):
            grid.add_row(Text("CUDA graphs", "bold"), Text("replayed: gradients and activations lie in private pools"))
    if record.device_memory is not None:
        grid.add_row(Text("device", "bold"), _listed(_device_sizes(record.device_memory, record.non_torch_bytes)))
    if sum(record.host.values()) >= MIB:  # below that it is the step counters that torch's optimizers keep there
        grid.add_row(Text("on the host", "bold"), _listed(_host_sizes(record.host)))
    return grid


def _replays_graphs(record: StepRecord) -> bool:
    """Whether private pools hold more than a traced step has seen of activations: a replayed graph allocates none."""
    peak = record.moments.get(Moment.PEAK)
    held = 0 if record.allocator is None else record.allocator.private_pool_bytes or 0
    return record.traced and peak is not None and held > peak[Category.ACTIVATIONS] + peak[Category.TEMPORARIES]


def _allocator_sizes(reading: AllocatorReading) -> Iterator[tuple[str, int | None]]:
    yield "allocated", reading.allocated_bytes
    yield "reserved", reading.reserved_bytes
    yield "slack", reading.slack_bytes
    yield "private pools", reading.private_pool_bytes or None
    yield "high-water mark", reading.peak_allocated_bytes


def _device_sizes(reading: DeviceReading, non_torch: int | None) -> Iterator[tuple[str, int | None]]:
    yield "total", reading.total_bytes
    yield "used", reading.used_bytes
    yield "free", reading.free_bytes
    yield "this process", reading.process_bytes
    yield "non-torch", non_torch
    yield "other processes", reading.other_processes_bytes


def _host_sizes(host: Mapping[EntryKey, int]) -> Iterator[tuple[str, int | None]]:
    for category in Category:
        yield category, sum(size for key, size in host.items() if key.category is category) or None


def _listed(sizes: Iterator[tuple[str, int | None]]) -> Text:
    return Text(" · ".join(f"{name} {format_bytes(size)}" for name, size in sizes if size is not None))
