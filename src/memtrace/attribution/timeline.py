"""The replay: allocator events joined with tags give what every block was for, at every instant of a window.

One piece of code for every source. Events are replayed in order; a block carries the strongest tag that was put on
its address while it lived, for its whole life: but for what is saved in a compiled forward pass and becomes a gradient
in the backward pass, which may take the memory of what it needs no more. Blocks that were there before the window come
from the source where it can list them (CUDA), else from the ledger and from tags on addresses that no event opened.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import inf
from operator import itemgetter

from memtrace.attribution.ledger import PRECEDENCE
from memtrace.record.breakdown import Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import Category, Moment, Phase
from memtrace.sources.events import Block, Tag, TagEvent, Window

_STEP_BOUND = frozenset({(Category.ACTIVATIONS, ""), (Category.TRANSIENT_WEIGHTS, "autocast")})
"""Roles that end with the backward pass: a block that is still there after it is held by somebody else."""


@cache
def _is_step_bound(tag: Tag) -> bool:
    return tag[:2] in _STEP_BOUND


@dataclass(slots=True)
class Lifetime:
    """One block from its allocation to its free; positions count the changes of the window, from 0."""

    address: int
    nbytes: int
    begin: int
    """Number of changes before the block was there; -1 for a block that was there before the window."""
    end: int | None = None
    """Number of changes before the block was gone; None where it outlives the window."""
    begin_ns: int = 0
    tag: Tag | None = None
    saved_ns: int | None = None
    """When the block was last saved for a backward pass; None where it never was."""
    saved_as: Tag | None = None
    """What the block was until it became a gradient; None where it was none, or nothing before."""
    turned: int = 0
    """Number of changes before it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMarks:
    """When a step entered its parts; nanoseconds on the clock of the events. None where the moment did not occur."""

    begin_ns: int
    end_ns: int
    forward_end_ns: int | None = None
    backward_end_ns: int | None = None
    phases: Sequence[tuple[int, Phase]] = ()
    """When each phase was entered, in order."""
    backward_ends_ns: Sequence[int] = ()
    """When each backward pass ended, in order, as far as that was told."""
    counters: Mapping[Moment, int] = field(default_factory=dict)
    """What the allocator's own counter said at these moments, in bytes as requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The lifetimes of all blocks of a window, and its running total."""

    lifetimes: Sequence[Lifetime]
    change_ns: Sequence[int]
    """Time of each change, ascending."""
    totals: Sequence[int]
    """Allocated bytes before the first change, then after each one: one longer than `change_ns`.

    Counted from the sizes of the events, never from the lifetimes.
    """
    unknown_frees: Sequence[int] = ()
    """Addresses of blocks that were freed and that nobody knew of, where the source cannot list what was there."""

    def position(self, time_ns: int) -> int:
        """Returns the number of changes up to and including this time."""
        return bisect_right(self.change_ns, time_ns)

    def moments(self, marks: StepMarks) -> dict[Moment, Breakdown]:
        """Returns the breakdown of one step at each moment that it had, and at its exact peak."""
        positions = self.positions(marks)
        ordered = sorted(set(positions.values()))
        held = self.held(marks, ordered)
        entries = {position: {key: held[key][i] for key in held} for i, position in enumerate(ordered)}
        return {
            moment: Breakdown(
                moment=moment,
                entries=ordered_entries(entries[positions[moment]]),
                allocated_bytes=marks.counters.get(moment, self.totals[positions[moment]]),
            )
            for moment in Moment
            if moment in positions
        }

    def positions(self, marks: StepMarks) -> dict[Moment, int]:
        """Returns the position of each moment that the step had, the exact peak among them."""
        first, last = self.position(marks.begin_ns), self.position(marks.end_ns)
        peak = self.totals.index(max(self.totals[first : last + 1]), first)
        positions = {Moment.PEAK: peak, Moment.STEP_END: last}
        if marks.forward_end_ns is not None:
            positions[Moment.FORWARD_END] = self.position(marks.forward_end_ns)
        if marks.backward_end_ns is not None:
            positions[Moment.BACKWARD_END] = self.position(marks.backward_end_ns)
        return positions

    def left_behind(self, marks: StepMarks) -> list[Lifetime]:
        """Returns the blocks that the window has seen made, that outlive the step and that nobody claims."""
        classify = _Classifier(self, marks)
        end = self.position(marks.end_ns)
        return [
            life
            for life in self.lifetimes
            if 0 <= life.begin < end
            and (life.end is None or life.end >= end)
            and classify(life, end).category is Category.UNATTRIBUTED
        ]

    def entries(self, marks: StepMarks, position: int) -> Callable[[Lifetime], EntryKey]:
        """Returns what says the entry of a block that is there at a position."""
        classify = _Classifier(self, marks)
        return lambda life: classify(life, position)

    def held(self, marks: StepMarks, positions: Sequence[int]) -> dict[EntryKey, list[int]]:
        """Returns the bytes of each entry at each of the positions, which ascend."""
        changes: dict[EntryKey, list[int]] = {}
        for key, life, start, stop in self.stretches(marks, positions):
            row = changes.get(key)
            if row is None:
                changes[key] = row = [0] * (len(positions) + 1)
            row[start] += life.nbytes
            row[stop] -= life.nbytes
        return {key: [*accumulate(row[:-1])] for key, row in changes.items()}

    def stretches(self, marks: StepMarks, positions: Sequence[int]) -> Iterator[tuple[EntryKey, Lifetime, int, int]]:
        """Yields (entry, block, start, stop) for each block that is there at some of the positions, which ascend.

        The block counts for the entry at `positions[start:stop]`. It comes a second time where it is for something
        else after the end of the backward pass, or once it has become a gradient.
        """
        classify = _Classifier(self, marks)
        turns, count = [bisect_left(positions, classify.turn)], len(positions)
        for life in self.lifetimes:
            start, end = bisect_right(positions, life.begin), life.end
            stop = count if end is None else bisect_right(positions, end)
            if start == stop:
                continue
            here = turns if life.saved_as is None else sorted([*turns, bisect_left(positions, life.turned)])
            for turn in here:
                if start < turn < stop:
                    yield classify(life, positions[start]), life, start, turn
                    start = turn
            yield classify(life, positions[start]), life, start, stop


_entry_of = cache(EntryKey._make)
"""Returns the one entry of a tag."""


class _Classifier:
    """Says what a block of a timeline is for at a position, given where the step begins and ends.

    What it says of a block is the same at all positions before `turn`, and at all from there on; so it is before and
    after a block became a gradient.
    """

    def __init__(self, timeline: Timeline, marks: StepMarks) -> None:
        self._begin_ns, self._change_ns = marks.begin_ns, timeline.change_ns
        self._backward_ends_ns = marks.backward_ends_ns
        self._first, self._last = timeline.position(marks.begin_ns), timeline.position(marks.end_ns)
        self.turn = self._last if marks.backward_end_ns is None else timeline.position(marks.backward_end_ns)
        """The end of the backward pass: what the step has saved for it and still lives is held by somebody else."""
        self._phase_ns = [time_ns for time_ns, _ in marks.phases]
        self._phases = [phase for _, phase in marks.phases]

    def __call__(self, life: Lifetime, position: int) -> EntryKey:
        """Returns the entry that the block counts for at a position at which it is there."""
        tag = life.tag if life.saved_as is None or position >= life.turned else life.saved_as
        if tag is not None and not _is_step_bound(tag):
            return _entry_of(tag)
        before_step = life.begin < self._first
        if tag is not None and before_step and life.saved_ns is not None and life.saved_ns >= self._begin_ns:
            # Older than the step and saved by it: given to it, such as labels for a loss outside the model, or casts
            # that one autocast around many steps keeps.
            return (
                _entry_of(tag)
                if tag.category is Category.TRANSIENT_WEIGHTS
                else EntryKey(Category.INPUTS, "", tag.dtype)
            )
        outlives = before_step or life.end is None or life.end >= self._last
        if tag is not None and not before_step and not (outlives and position >= self.turn):
            return _entry_of(tag)
        phase = self._phase(life, before_step)
        if outlives:
            return EntryKey(Category.UNATTRIBUTED, phase, "")
        if phase is Phase.FORWARD and self._ends_in_its_backward_pass(life):
            return EntryKey(Category.ACTIVATIONS, "", "")
        return EntryKey(Category.TEMPORARIES, phase, "")

    def _phase(self, life: Lifetime, before_step: bool) -> Phase:
        index = bisect_right(self._phase_ns, life.begin_ns)
        return Phase.OUTSIDE if before_step or index == 0 else self._phases[index - 1]

    def _ends_in_its_backward_pass(self, life: Lifetime) -> bool:
        """Returns whether a block of a forward pass was freed in the backward pass that came next.

        Then autograd held it, whether a hook saw it or not: on another thread, on the `ctx` of a function, or where
        hooks are forbidden.
        """
        following = bisect_right(self._phase_ns, life.begin_ns)
        if life.end is None or following == len(self._phases) or self._phases[following] is not Phase.BACKWARD:
            return False
        freed_ns = self._change_ns[life.end]
        if bisect_right(self._phase_ns, freed_ns) != following + 1:
            return False
        ends = self._backward_ends_ns
        told = bisect_right(ends, self._phase_ns[following])  # the first end after the beginning of that backward pass
        return told == len(ends) or freed_ns <= ends[told]


def replay(window: Window, base: Sequence[TagEvent], journal: Sequence[TagEvent]) -> Timeline:
    """Joins the events of a window with what is known of addresses.

    Args:
        window: what the allocator did.
        base: the ledger's live storages when the window began. Where the source lists live blocks, it decides which
            of them exist, and `base` only says what they are for.
        journal: tags and deaths noted during the window, by time.

    Returns:
        The timeline. Its running total is exact: `totals[i]` is the sum of the lifetimes at position `i` wherever
        attribution is right, and the two are counted apart.
    """
    return _Replay(window, base).run(journal)


class _Replay:
    """The state of one replay: the blocks that are open, and the changes so far."""

    def __init__(self, window: Window, base: Sequence[TagEvent]) -> None:
        self._window = window
        self._open: dict[int, Lifetime] = {}
        self._lifetimes: list[Lifetime] = []
        self._closed: dict[int, Lifetime] = {}
        """The last block closed at an address, for tags that arrive within the clock's resolution."""
        self._times: list[int] = []
        """When each change was, by the event's or the note's own time."""
        self._changes: list[int] = []
        """By how much each change changed the total."""
        self._initial = 0
        self._unknown_frees: list[int] = []
        self._may_reveal = window.live_at_begin is None
        tags = {known.address: known.tag for known in base}
        listed = window.live_at_begin
        if listed is None:
            listed = [Block(known.address, known.nbytes) for known in base]
        for block in listed:
            self._reveal(block.address, block.nbytes, tags.get(block.address))

    def run(self, journal: Sequence[TagEvent]) -> Timeline:
        notes = sorted(journal, key=itemgetter(0))
        note_ns = [*map(itemgetter(0), notes), inf]
        done, live, times, changes = 0, self._open, self._times, self._changes
        for time_ns, address, delta in self._window.events.rows():
            while note_ns[done] < time_ns:
                self._note(notes[done])
                done += 1
            life = live.get(address)
            if delta > 0:
                if life is not None:  # its free was not seen: on another thread, or not the allocator's memory
                    self._close(life, time_ns, -life.nbytes)
                live[address] = life = Lifetime(address, delta, len(times), None, time_ns)
                self._lifetimes.append(life)
            elif life is not None and life.begin >= 0:
                del live[address]
                life.end = len(times)
                self._closed[address] = life
            else:
                self._free_older(life, time_ns, address, delta)
                continue
            times.append(time_ns)
            changes.append(delta)
        for note in notes[done:]:
            self._note(note)
        ascending = self._times == sorted(self._times)
        return Timeline(
            lifetimes=self._lifetimes,
            change_ns=self._times if ascending else [*accumulate(self._times, max)],
            totals=list(accumulate(self._changes, initial=self._initial)),
            unknown_frees=self._unknown_frees,
        )

    def _reveal(self, address: int, nbytes: int, tag: Tag | None) -> Lifetime:
        """Adds a block that was there before the window began."""
        life = Lifetime(address, nbytes, -1, None, self._window.begin_ns, tag)
        self._lifetimes.append(life)
        self._open[address] = life
        self._initial += nbytes
        return life

    def _close(self, life: Lifetime, time_ns: int, delta: int) -> None:
        del self._open[life.address]
        life.end = len(self._times)
        self._closed[life.address] = life
        self._times.append(time_ns)
        self._changes.append(delta)

    def _free_older(self, life: Lifetime | None, time_ns: int, address: int, delta: int) -> None:
        """Ends a block that was allocated before the window began."""
        if self._may_reveal:
            # The size in the event is then what the source last saw at this address, perhaps of a block long gone: the
            # ledger's size counts, and a block that nobody knew stays out.
            if life is not None:
                self._close(life, time_ns, -life.nbytes)
            else:
                self._unknown_frees.append(address)
            return
        self._close(life or self._reveal(address, -delta, None), time_ns, delta)

    def _note(self, note: TagEvent) -> None:
        life, tag = self._open.get(note.address), note.tag
        if tag is None:
            if life is not None and life.begin < 0 and self._may_reveal:
                self._close(life, note.time_ns, -life.nbytes)
            return
        saved = _is_step_bound(tag)
        if life is None:
            closed = self._closed.get(note.address)
            if closed is not None and closed.end is not None and self._within_resolution(closed.end, note.time_ns):
                life = closed
            elif self._may_reveal and not saved:
                life = self._reveal(note.address, note.nbytes, None)
            else:
                return
        if saved:
            life.saved_ns = note.time_ns
        if life.tag is not tag and (life.tag is None or PRECEDENCE[tag.category] <= PRECEDENCE[life.tag.category]):
            if tag.category is Category.GRADIENTS and life.tag is not None and _is_step_bound(life.tag):
                life.saved_as, life.turned = life.tag, len(self._times)
            life.tag = tag

    def _within_resolution(self, change: int, time_ns: int) -> bool:
        return time_ns - self._times[change] < self._window.resolution_ns
