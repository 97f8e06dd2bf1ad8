"""Live blocks joined with tags."""

from __future__ import annotations

from cuda_scenes import GIB, GRADIENTS, MIB, SAVED, WEIGHTS

from memtrace.attribution.timeline import replay
from memtrace.oom.composition import MAX_ENTRIES, Holding, StepFacts, compose, from_blocks, from_ledger, from_timeline
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Phase
from memtrace.sources.events import Block, Event, Events, TagEvent, Window

ACTIVATIONS = EntryKey(Category.ACTIVATIONS, "", "")
UNATTRIBUTED = EntryKey(Category.UNATTRIBUTED, Phase.OUTSIDE, "")


def sizes(holdings: list[Holding]) -> dict[EntryKey, int]:
    return dict(compose(holdings, allocated_bytes=None, complete=True, estimated=False).entries)


def test_weights_saved_for_backward_stay_weights() -> None:
    """A block that has two roles has the stronger one."""
    blocks = [Block(1, MIB)]
    known = [TagEvent(0, 1, MIB, WEIGHTS), TagEvent(5, 1, MIB, SAVED)]
    holdings, _ = from_blocks(blocks, known, (), StepFacts(phase=Phase.FORWARD))
    assert sizes(holdings) == {EntryKey(*WEIGHTS): MIB}


def test_note_of_a_tensor_that_is_gone_does_not_tag_the_next_block_there() -> None:
    """A saved tensor's address in use again by a block of another size is that block's own."""
    blocks = [Block(1, 2 * MIB)]
    known = [TagEvent(0, 1, MIB, SAVED)]
    holdings, _ = from_blocks(blocks, known, (), StepFacts(phase=Phase.OPTIMIZER, traced=True))
    assert sizes(holdings) == {EntryKey(Category.TEMPORARIES, Phase.OPTIMIZER, ""): 2 * MIB}


def test_gradients_kept_through_the_forward_pass_are_not_taken_for_a_leak() -> None:
    """Gradients of the step before, which zero_grad drops only after the forward pass, were there before it."""
    blocks = [Block(1, GIB), Block(2, GIB), Block(3, MIB)]
    known = [TagEvent(0, 1, GIB, WEIGHTS), TagEvent(0, 2, GIB, GRADIENTS)]
    facts = StepFacts(phase=Phase.FORWARD, requested_before_forward=2 * GIB, micro_batches=1)
    holdings, _ = from_blocks(blocks, known, (), facts)
    assert sizes(holdings)[ACTIVATIONS] == MIB
    assert UNATTRIBUTED not in sizes(holdings)


def test_without_counters_unclaimed_blocks_count_as_the_steps_own() -> None:
    """Where nobody knows what was there before the forward pass, nothing is called a leak."""
    holdings, estimated = from_blocks([Block(1, GIB)], [], (), StepFacts(phase=Phase.BACKWARD))
    assert sizes(holdings) == {ACTIVATIONS: GIB}
    assert estimated


def test_more_before_the_forward_pass_than_is_unclaimed_now() -> None:
    """What was there before and has been freed since does not turn up as more than there is."""
    facts = StepFacts(phase=Phase.BACKWARD, requested_before_forward=9 * GIB, micro_batches=1)
    holdings, _ = from_blocks([Block(1, GIB), Block(2, GIB)], [], (), facts)
    assert sizes(holdings) == {UNATTRIBUTED: 2 * GIB}


def test_open_window_tells_every_block() -> None:
    """In a traced step live blocks are told by their tags and by when they were made."""
    events = [Event(10, 1, MIB), Event(20, 2, MIB), Event(30, 3, 2 * MIB), Event(40, 4, MIB), Event(50, 4, -MIB)]
    window = Window(begin_ns=0, end_ns=100, events=Events.of(events), live_at_begin=None)
    timeline = replay(window, [TagEvent(0, 9, GIB, WEIGHTS)], [TagEvent(21, 2, MIB, SAVED)])
    assert sizes(from_timeline(timeline, 15, Phase.FORWARD)) == {
        EntryKey(*WEIGHTS): GIB,
        EntryKey(*SAVED): MIB,
        EntryKey(Category.TEMPORARIES, Phase.FORWARD, ""): 2 * MIB,
        UNATTRIBUTED: MIB,
    }


def test_ledger_alone_knows_no_more_than_it_knows() -> None:
    """Without a list of blocks and without a window, the entries are the ledger's."""
    assert sizes(from_ledger([TagEvent(0, 1, GIB, WEIGHTS)])) == {EntryKey(*WEIGHTS): GIB}


def test_number_of_entries_is_bounded() -> None:
    """An optimizer with thousands of state names leaves a report of ordinary size, and no byte is lost."""
    holdings = [
        Holding(address=at, nbytes=at + 1, key=EntryKey(Category.OPTIMIZER_STATE, f"state_{at}", "float32"))
        for at in range(5000)
    ]
    composition = compose(holdings, allocated_bytes=None, complete=True, estimated=False)
    assert len(composition.entries) == MAX_ENTRIES + 1
    assert composition.total_bytes == sum(range(1, 5001))
