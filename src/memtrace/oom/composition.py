"""What memory was for at the moment of a failure: live blocks joined with what is known of their addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from memtrace.attribution.hidden import WORKSPACE, HiddenBuffers, stream_of
from memtrace.attribution.ledger import PRECEDENCE
from memtrace.attribution.timeline import Lifetime, Timeline
from memtrace.record.breakdown import EntryKey, ordered_entries
from memtrace.record.categories import Category, Phase
from memtrace.record.oom.report import Composition
from memtrace.sources.events import Block, StreamMemory, Tag, TagEvent

MAX_ENTRIES = 60
"""Entries of a composition: several times what a real training has."""

_SAVED_FOR_BACKWARD = frozenset({Category.ACTIVATIONS, Category.TRANSIENT_WEIGHTS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A live block and what it is for."""

    address: int
    nbytes: int
    key: EntryKey


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What is known of the step in progress, to tell its blocks from those that nobody claims."""

    phase: Phase
    requested_before_forward: int | None = None
    """The allocator's requested bytes before the last forward pass; None without counters or before one."""
    micro_batches: int = 0
    """Forward passes of this step so far, the one at work included."""
    traced: bool = False
    """Whether every tensor saved for backward is known: what has no tag is then saved for nothing."""


def from_blocks(
    blocks: Iterable[Block],
    known: Iterable[TagEvent],
    hidden: Iterable[HiddenBuffers],
    step: StepFacts,
    workspaces: Sequence[int] = (),
    *,
    streams: Sequence[StreamMemory] = (),
) -> tuple[list[Holding], bool]:
    """Joins the allocator's list of live blocks with the tags of their addresses.

    A block without a tag is one that the step has made, or one that was there before and that nobody claims. How many
    bytes are of the second kind follows from the counter before the forward pass; they are taken from the largest of
    such blocks down, since a step that is not traced says no more of them.

    Args:
        blocks: every block in use, with its requested size.
        known: tags of live storages, and of tensors saved for backward; the latter count only where the block still
            has their size, since the tensor may be gone and its address in use again.
        hidden: sizes of buffers that an engine shows nobody: an untagged block of that size is one of them.
        step: what is known of the step in progress.
        workspaces: sizes of the blocks that cuBLAS may hold: at most one untagged block of each, on each stream.
        streams: which memory is for which stream, where it is for several.

    Returns:
        One holding a block, and whether the split of untagged blocks is an estimate.
    """
    live = list(blocks)
    tags = _strongest(known, {block.address: block.nbytes for block in live})
    holdings: list[Holding] = []
    untagged: list[Block] = []
    for block in live:
        tag = tags.get(block.address)
        if tag is None:
            untagged.append(block)
        else:
            holdings.append(Holding(address=block.address, nbytes=block.nbytes, key=EntryKey(*tag)))
    holdings += _take_hidden(untagged, hidden)
    holdings += _take_workspaces(untagged, workspaces, streams)
    lingering = _lingering_bytes(holdings, sum(block.nbytes for block in untagged), step)
    for block in sorted(untagged, key=lambda block: -block.nbytes):
        if block.nbytes <= lingering:
            lingering -= block.nbytes
            key = EntryKey(Category.UNATTRIBUTED, Phase.OUTSIDE, "")
        else:
            key = _made_by_step(step)
        holdings.append(Holding(address=block.address, nbytes=block.nbytes, key=key))
    return holdings, bool(untagged) and not step.traced and step.phase is not Phase.OUTSIDE


def from_timeline(timeline: Timeline, begin_ns: int, phase: Phase) -> list[Holding]:
    """Returns what was live at the end of a window of events.

    Args:
        timeline: the replayed window.
        begin_ns: when the step in progress began.
        phase: where it was at the end of the window: what lives then and is saved for nothing belongs to that phase.
    """
    first = timeline.position(begin_ns)

    def key(life: Lifetime) -> EntryKey:
        if life.tag is not None:
            return EntryKey(*life.tag)
        if life.begin < first:
            return EntryKey(Category.UNATTRIBUTED, Phase.OUTSIDE, "")
        return EntryKey(Category.TEMPORARIES, phase, "")

    return [
        Holding(address=life.address, nbytes=life.nbytes, key=key(life))
        for life in timeline.lifetimes
        if life.end is None
    ]


def from_ledger(known: Iterable[TagEvent]) -> list[Holding]:
    """Returns what the ledger knows, where nobody can list the live blocks."""
    return [
        Holding(address=found.address, nbytes=found.nbytes, key=EntryKey(*found.tag))
        for found in known
        if found.tag is not None
    ]


def compose(
    holdings: Sequence[Holding], *, allocated_bytes: int | None, complete: bool, estimated: bool
) -> Composition:
    """Adds holdings up by entry; the smallest of more than `MAX_ENTRIES` are added up by category."""
    totals: dict[EntryKey, int] = {}
    for holding in holdings:
        totals[holding.key] = totals.get(holding.key, 0) + holding.nbytes
    return Composition(entries=bounded(totals), allocated_bytes=allocated_bytes, complete=complete, estimated=estimated)


def bounded(entries: Mapping[EntryKey, int]) -> Mapping[EntryKey, int]:
    """Returns the `MAX_ENTRIES` largest entries, and the sum of the others of each category as component `other`."""
    largest = sorted(entries, key=lambda key: -entries[key])
    kept = {key: entries[key] for key in largest[:MAX_ENTRIES]}
    for key in largest[MAX_ENTRIES:]:
        rest = EntryKey(key.category, "other", "")
        kept[rest] = kept.get(rest, 0) + entries[key]
    return ordered_entries(kept)


def _strongest(known: Iterable[TagEvent], live: Mapping[int, int]) -> Mapping[int, Tag]:
    """Returns the strongest tag of each live address, given the sizes of the blocks that are there."""
    tags: dict[int, Tag] = {}
    for found in known:
        if found.tag is None or found.address not in live:
            continue
        if found.tag.category in _SAVED_FOR_BACKWARD and found.nbytes != live[found.address]:
            continue
        before = tags.get(found.address)
        if before is None or PRECEDENCE[found.tag.category] <= PRECEDENCE[before.category]:
            tags[found.address] = found.tag
    return tags


def _take_hidden(untagged: list[Block], hidden: Iterable[HiddenBuffers]) -> list[Holding]:
    """Takes the blocks that have the size of a hidden buffer out of the list."""
    taken = []
    for buffers in hidden:
        for size in buffers.first if buffers.current is None else buffers.current:
            block = next((block for block in untagged if block.nbytes == size), None)
            if block is not None:
                untagged.remove(block)
                taken.append(Holding(address=block.address, nbytes=size, key=EntryKey(*buffers.tag)))
    return taken


def _take_workspaces(untagged: list[Block], sizes: Sequence[int], streams: Sequence[StreamMemory]) -> Iterator[Holding]:
    """Takes the blocks that cuBLAS may hold out of the list. How old they are is not known here."""
    free: dict[int, list[int]] = {}
    for block in [block for block in untagged if block.nbytes in sizes]:
        left = free.setdefault(stream_of(block.address, streams), [*sizes])
        if block.nbytes in left:
            left.remove(block.nbytes)
            untagged.remove(block)
            yield Holding(address=block.address, nbytes=block.nbytes, key=EntryKey(*WORKSPACE))


def _lingering_bytes(tagged: Sequence[Holding], untagged_bytes: int, step: StepFacts) -> int:
    """Returns how many of the untagged bytes were there before the forward pass."""
    if step.phase is Phase.OUTSIDE:
        return untagged_bytes
    if step.requested_before_forward is None:
        return 0
    made_since = set(_SAVED_FOR_BACKWARD)
    if step.phase is not Phase.FORWARD and step.micro_batches == 1:
        made_since.add(Category.GRADIENTS)  # made by this backward pass; in a forward pass they are older than it
    before = sum(holding.nbytes for holding in tagged if holding.key.category not in made_since)
    return min(max(step.requested_before_forward - before, 0), untagged_bytes)


def _made_by_step(step: StepFacts) -> EntryKey:
    if step.traced or step.phase is Phase.OPTIMIZER:
        return EntryKey(Category.TEMPORARIES, step.phase, "")
    return EntryKey(Category.ACTIVATIONS, "", "")
