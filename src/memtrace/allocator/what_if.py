"""One recording under other settings: what each would have reserved, and whether a failed request would have fitted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context

from memtrace.allocator.blocks import Block
from memtrace.allocator.caching_allocator import CachingAllocator
from memtrace.allocator.fragments import Fragment, fragments_of
from memtrace.allocator.recording import AllocatorRecording
from memtrace.allocator.settings import AllocatorSettings, parse_settings
from memtrace.record.units import MIB

WORTH_PROCESSES = 100_000
"""Events from which on a second process is worth its start."""
_WORKERS = 2
"""Processes at most: each holds the recording."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one setting makes of a recording. Bytes; `requested` and `allocated` are at the peak of `reserved`."""

    settings: AllocatorSettings
    in_force: bool
    """Whether the recorded process had this setting."""
    reserved_bytes: int
    """The most that was reserved."""
    allocated_bytes: int
    requested_bytes: int
    retries: int
    """How often everything cached had to be given back, for which torch waits for the device."""
    device_calls: int
    """How often memory of the device was taken or given back: each takes the driver's time."""
    fits: bool | None
    """Whether everything was served within the limit, the failed request included; None without a limit."""
    stopped_at: int | None = None
    """Events before the first one that could not be served; None where all were. The figures end there."""
    most_allocated_bytes: int = 0
    """The most that was allocated, at an instant of its own."""
    needed_bytes: int = 0
    """What had to be reserved: the peak, or what the first request that could not be served would have made it."""
    peak_at: int = 0
    """Events before the one after which most was reserved."""

    @property
    def slack_bytes(self) -> int:
        """What was reserved and not allocated at the peak."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def rounding_bytes(self) -> int:
        """What was allocated and not asked for at the peak."""
        return self.allocated_bytes - self.requested_bytes


MAX_FRAGMENTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A recording under several settings."""

    recording: AllocatorRecording
    limit_bytes: int | None
    in_force: Outcome
    ranked: Sequence[Outcome]
    """All of them, the one to take first."""
    fragments: Sequence[Fragment]
    """Under the setting in force, where most was reserved or the request failed: the largest first."""
    fragment_count: int
    """How many there are in all."""
    fragment_bytes: int
    """What is free in all of them."""
    cached_bytes: int
    """Of the free memory then what lay in segments without any block in use."""

    def saved_bytes(self, outcome: Outcome) -> int:
        """Returns how much less an outcome needs than the setting in force, by the model for both."""
        return self.in_force.needed_bytes - outcome.needed_bytes

    @property
    def missed_ratio(self) -> float | None:
        """How far the model is from what was recorded, for the setting in force; None where that cannot be told.

        It can where the recording begins with the process, since nobody knows what was cached before, and where the
        limit is the recorded one.
        """
        recorded = self.recording.peak_reserved_bytes
        if not recorded or not self.recording.from_the_start or self.limit_bytes != self.recording.limit_bytes:
            return None
        return self.in_force.reserved_bytes / recorded - 1


def candidates(in_force: AllocatorSettings, *, collects: bool) -> list[AllocatorSettings]:
    """Returns what is tried: the setting in force, torch's defaults, each setting alone, and some together.

    Args:
        in_force: of the recorded process.
        collects: whether there is a limit, without which garbage collection has nothing to count from.
    """
    grows = AllocatorSettings(expandable_segments=True)
    unsplit = AllocatorSettings(max_split_size=128 * MIB)
    tried = [
        in_force,
        AllocatorSettings(),
        grows,
        replace(grows, roundup_power2_divisions=8),
        unsplit,
        AllocatorSettings(max_split_size=512 * MIB),
        AllocatorSettings(roundup_power2_divisions=8),
    ]
    if collects:
        tried += [
            AllocatorSettings(garbage_collection_threshold=0.8),
            replace(unsplit, garbage_collection_threshold=0.8),
        ]
    return [setting for at, setting in enumerate(tried) if setting not in tried[:at]]


def what_if(
    recording: AllocatorRecording,
    *,
    limit: int | None = None,
    others: Sequence[AllocatorSettings] | None = None,
    more: Sequence[AllocatorSettings] = (),
    workers: int | None = None,
) -> WhatIf:
    """Replays a recording under the setting in force and under others.

    Takes about 2 us of processor time an event and setting, and 1 KiB of memory a block that is in use at once.

    Args:
        recording: what the allocator was asked for.
        limit: what can be reserved in all; None for that of the recording, if it has one.
        others: what to compare with; None for `candidates`.
        more: what to compare with beside those.
        workers: processes; None for two where the recording is long, where the machine has them. 1 stays in this one.

    Raises:
        ConfigError: the setting in force is of another allocator.
    """
    limit = recording.limit_bytes if limit is None else limit
    mine = parse_settings(recording.settings)
    compared = candidates(mine, collects=limit is not None) if others is None else others
    tried = [mine, *(setting for setting in dict.fromkeys([*compared, *more]) if setting != mine)]
    if workers is None:
        workers = min(_WORKERS, os.cpu_count() or 1) if len(recording.events) >= WORTH_PROCESSES else 1
    found = _replayed(recording, tried, limit, workers)
    in_force = replace(found[0], in_force=True)
    fragments, cached = _fragments(recording, in_force, limit)
    return WhatIf(
        recording=recording,
        limit_bytes=limit,
        in_force=in_force,
        ranked=sorted([in_force, *found[1:]], key=_rank),
        fragments=fragments[:MAX_FRAGMENTS],
        fragment_count=len(fragments),
        fragment_bytes=sum(fragment.free_bytes for fragment in fragments),
        cached_bytes=cached,
    )


def replayed(recording: AllocatorRecording, settings: AllocatorSettings, limit: int | None) -> Outcome:
    """Returns what one setting makes of a recording."""
    allocator = CachingAllocator(settings, limit=limit)
    done = _play(recording, allocator, len(recording.events))
    return Outcome(
        settings=settings,
        in_force=False,
        reserved_bytes=allocator.highest.reserved_bytes,
        allocated_bytes=allocator.highest.allocated_bytes,
        requested_bytes=allocator.highest.requested_bytes,
        retries=allocator.retries,
        device_calls=allocator.device.calls,
        fits=None if limit is None else done.stopped_at is None,
        stopped_at=done.stopped_at,
        most_allocated_bytes=allocator.peak_allocated_bytes,
        needed_bytes=allocator.highest.reserved_bytes if done.stopped_at is None else allocator.device.wanted_bytes,
        peak_at=done.peak_at,
    )


def _rank(outcome: Outcome) -> tuple[bool, int, int, int]:
    """Orders outcomes: those in which everything fitted first, then by what is reserved, then by what is set at all."""
    stopped = outcome.stopped_at
    return (
        stopped is not None,
        outcome.needed_bytes if stopped is None else -stopped,
        0 if outcome.in_force else 1,
        len(outcome.settings.text),
    )


def _replayed(
    recording: AllocatorRecording, tried: Sequence[AllocatorSettings], limit: int | None, workers: int
) -> list[Outcome]:
    """Returns the outcomes in the order of the settings."""
    if workers > 1:
        shares = [tried[at::workers] for at in range(workers)]
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                waiting = [pool.submit(_share, recording, share, limit) for share in shares]
                found = {outcome.settings: outcome for share in waiting for outcome in share.result()}
            return [found[settings] for settings in tried]
        except (OSError, BrokenProcessPool):  # this machine starts no more processes: it takes longer
            pass
    return _share(recording, tried, limit)


def _share(recording: AllocatorRecording, tried: Sequence[AllocatorSettings], limit: int | None) -> list[Outcome]:
    return [replayed(recording, settings, limit) for settings in tried]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Played:
    """How a replay went."""

    stopped_at: int | None
    peak_at: int


def _play(recording: AllocatorRecording, allocator: CachingAllocator, until: int) -> _Played:
    """Lets the allocator do what is recorded, before an event, or to the end with the failed request."""
    blocks: list[Block | None] = []
    streams = recording.streams or None
    take, give_back, highest, peak_at = allocator.take, allocator.give_back, allocator.highest, 0
    for size in recording.sizes_at_begin:
        block = take(size) if streams is None else take(size, streams[len(blocks)])
        if block is None:
            return _Played(stopped_at=0, peak_at=0)
        block.number = len(blocks)
        blocks.append(block)
    highest = allocator.highest
    for at, event in enumerate(recording.events):
        if at >= until:
            return _Played(stopped_at=None, peak_at=peak_at)
        if event > 0:
            block = take(event) if streams is None else take(event, streams[len(blocks)])
            if block is None:
                return _Played(stopped_at=at, peak_at=peak_at)
            block.number = len(blocks)
            blocks.append(block)
            if allocator.highest is not highest:
                highest, peak_at = allocator.highest, at
        elif event < 0:
            block, blocks[-event - 1] = blocks[-event - 1], None
            assert block is not None
            give_back(block)
        else:
            allocator.empty_cache()
    if recording.failed_bytes is not None and allocator.take(recording.failed_bytes) is None:
        return _Played(stopped_at=len(recording.events), peak_at=peak_at)
    return _Played(stopped_at=None, peak_at=len(recording.events) if allocator.highest is not highest else peak_at)


def _fragments(recording: AllocatorRecording, outcome: Outcome, limit: int | None) -> tuple[Sequence[Fragment], int]:
    """Returns the fragments where a replay was at its worst, and what lay in segments with nothing in use."""
    allocator = CachingAllocator(outcome.settings, limit=limit)
    _play(recording, allocator, (outcome.peak_at if outcome.stopped_at is None else outcome.stopped_at) + 1)
    found = sorted(fragments_of(recording, allocator), key=lambda fragment: -fragment.free_bytes)
    cached = allocator.reserved_bytes - allocator.allocated_bytes - sum(fragment.free_bytes for fragment in found)
    return found, cached
