"""What a snapshot says of each device, in words of `record/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.joined import Attributed, attribute_devices
from memtrace.forensics.places import place_of
from memtrace.forensics.recorded_run import RunRecords
from memtrace.forensics.snapshot import AllocatorSnapshot, Segment
from memtrace.forensics.trace import Stacks
from memtrace.oom.advice import ModelFacts, Situation, remedies
from memtrace.record.breakdown import Breakdown, EntryKey, StepCurve
from memtrace.record.categories import Category, Moment, Phase
from memtrace.record.oom.report import FailedRequest, Fragmentation, Witness
from memtrace.record.readings.snapshot_reading import (
    DeviceReading,
    ReadBreakdown,
    ReadFailure,
    ReadHolder,
    ReadKey,
    SnapshotMoment,
    SnapshotReading,
    Source,
)

MAX_HOLDERS = 20
MAX_POINTS = 400
"""Stretches that a history is cut into for its curve, each with one point."""

_ORDER = {category: position for position, category in enumerate(Category)}
_TRUST = {source: position for position, source in enumerate(Source)}


def read_snapshot(
    snapshot: AllocatorSnapshot,
    name: str,
    model: ExpectedModel | None = None,
    runs: Sequence[RunRecords] = (),
) -> SnapshotReading:
    """Returns what a snapshot says.

    Args:
        snapshot: as it was loaded.
        name: of its file.
        model: whose sizes blocks are matched with, where one was given.
        runs: what the ranks of a memtrace run of the same process have recorded.

    Raises:
        ConfigError: no run is of the process that the snapshot is of.
    """
    return SnapshotReading(
        name=name,
        devices=[_device(found, snapshot.stacks, model) for found in attribute_devices(snapshot, model, runs)],
        settings=snapshot.settings,
    )


def _device(found: Attributed, stacks: Stacks, model: ExpectedModel | None) -> DeviceReading:
    history = found.history
    positions = {SnapshotMoment.PEAK: history.peak, SnapshotMoment.END: history.end}
    failure = history.failures[-1] if history.failures else None
    if failure is not None:
        positions[SnapshotMoment.FAILURE] = failure.position
    traced = {} if found.run is None else found.run.known(history)
    moments = {
        moment: _breakdown(found, moment, position, traced.get(position)) for moment, position in positions.items()
    }
    worst = SnapshotMoment.PEAK if failure is None else SnapshotMoment.FAILURE
    fragmentation = _fragmentation(history.segments)
    return DeviceReading(
        device=history.device,
        moments=moments,
        holders=_holders(found, stacks, positions[worst]),
        fragmentation=fragmentation,
        events=history.end,
        steps=found.lives.steps.whole,
        failure=None
        if failure is None
        else ReadFailure(
            requested_bytes=failure.requested,
            free_bytes=failure.device_free,
            place=place_of(stacks[failure.stack]) if failure.stack >= 0 else "",
        ),
        remedies=() if failure is None else remedies(_situation(found, moments[worst], fragmentation)),
        curve=_curve(found, positions[SnapshotMoment.PEAK]) if history.end else None,
        notes=[*_notes(found, model)],
    )


def _breakdown(found: Attributed, moment: SnapshotMoment, position: int, traced: Breakdown | None) -> ReadBreakdown:
    """Returns what memory was for at a position: as the run has traced it there, else by the label of each block."""
    history = found.history
    entries: dict[ReadKey, int] = {}
    if traced is not None:
        entries = {ReadKey(*key, Source.RUN): nbytes for key, nbytes in traced.entries.items()}
    else:
        for index in history.live(position):
            key = ReadKey(*found.label(index))
            entries[key] = entries.get(key, 0) + history.timeline.lifetimes[index].nbytes
    times = history.timeline.change_ns
    known = times and times[-1] > 0
    return ReadBreakdown(
        moment=moment,
        entries={
            key: entries[key]
            for key in sorted(entries, key=lambda key: (_ORDER[key.category], _TRUST[key.source], key.component))
        },
        reserved_bytes=history.reserved[position],
        seconds=(times[max(position - 1, 0)] - times[0]) / 1e9 if known else None,
    )


def _holders(found: Attributed, stacks: Stacks, position: int) -> list[ReadHolder]:
    """Returns who holds most: blocks of one category and place; without stacks blocks of one category and size."""
    groups: dict[tuple[Category, str, int], list[int]] = {}
    places: dict[int, str] = {}
    for index in found.history.live(position):
        stack, nbytes = found.history.stacks[index], found.history.timeline.lifetimes[index].nbytes
        if stack >= 0 and stack not in places:
            places[stack] = place_of(stacks[stack])
        place = places.get(stack, "")
        groups.setdefault((found.label(index).category, place, 0 if place else nbytes), []).append(nbytes)
    holders = [
        ReadHolder(category=category, place=place, blocks=len(sizes), nbytes=sum(sizes))
        for (category, place, _), sizes in groups.items()
    ]
    return sorted(holders, key=lambda holder: (-holder.nbytes, holder.place))[:MAX_HOLDERS]


def _fragmentation(segments: Sequence[Segment]) -> Fragmentation:
    """Returns the free pieces of the allocator's own pools: no request is served from a private one."""
    own = [segment for segment in segments if not segment.pool]
    free = [block.size for segment in own for block in segment.blocks if not block.live]
    return Fragmentation(
        free_bytes=sum(free),
        largest_free_bytes=max(free, default=0),
        segments=len(own),
        expandable=any(segment.expandable for segment in own),
    )


def _situation(found: Attributed, breakdown: ReadBreakdown, fragmentation: Fragmentation) -> Situation:
    failure = found.history.failures[-1]
    entries: dict[EntryKey, int] = {}
    for key, nbytes in breakdown.entries.items():
        dtype = "bfloat16" if key.dtype == "16-bit" else key.dtype
        entry = EntryKey(key.category, key.component, dtype)
        entries[entry] = entries.get(entry, 0) + nbytes
    request = FailedRequest(
        witness=Witness.ALLOCATOR,
        phase=Phase.OUTSIDE,
        requested_bytes=failure.requested,
        free_bytes=failure.device_free,
    )
    return Situation(entries=entries, request=request, facts=ModelFacts(), fragmentation=fragmentation)


def _curve(found: Attributed, peak: int) -> StepCurve:
    """Returns the curve of a history: of each stretch of changes the position at which most was allocated."""
    history, timeline = found.history, found.history.timeline
    length = max(1, -(-(history.end + 1) // MAX_POINTS))
    positions = sorted(
        {history.top(begin, min(begin + length - 1, history.end)) for begin in range(0, history.end + 1, length)}
        | {0, peak, history.end}
    )
    place = {}
    for index, position in enumerate(positions):
        for at in range(positions[index - 1] + 1 if index else 0, position + 1):
            place[at] = index
    changes: dict[Category, list[int]] = {}
    for index, life in enumerate(timeline.lifetimes):
        row = changes.setdefault(found.label(index).category, [0] * (len(positions) + 1))
        row[place.get(life.begin + 1, len(positions))] += life.nbytes
        if life.end is not None:
            row[place.get(life.end + 1, len(positions))] -= life.nbytes
    times = timeline.change_ns
    seconds = [(times[max(position - 1, 0)] - times[0]) / 1e9 for position in positions]
    return StepCurve(
        seconds=seconds,
        by_category={category: [*accumulate(changes[category][:-1])] for category in Category if category in changes},
        moments={Moment.PEAK: seconds[positions.index(peak)]},
    )


def _notes(found: Attributed, model: ExpectedModel | None) -> Iterator[str]:
    history = found.history
    if not history.recorded:
        yield "No history was recorded: only what was there at the end is known. Record with _record_memory_history()."
        return
    if found.run is not None:
        steps = [step.record.step for step in found.run.steps]
        yield f"{found.run.name} is of the same process: {_steps(steps)}."
    if history.left_out:
        yield f"The history is long: its oldest {history.left_out:,} entries are left out, also of the peak."
    if not history.complete:
        yield "The history does not lead to the blocks that are in use at the end: entries of it are missing."
    if not found.lives.steps_seen:
        yield "No whole step is in the history: persistent memory was told by what is there at the end."
    if model is not None and not any(label.source is Source.SIZE for label in found.labels.values()):
        yield "The sizes of the model that was given are not those of the blocks."


def _steps(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"step {numbers[0]:,} is in the history"
    return f"{len(numbers):,} of its steps are in the history, {numbers[0]:,} to {numbers[-1]:,}"
