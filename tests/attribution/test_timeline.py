"""The replay, on windows made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from memtrace.attribution.curve import MAX_STRETCHES, HighestSteps, step_curve
from memtrace.attribution.timeline import StepMarks, Timeline, replay
from memtrace.record.categories import Category, Moment, Phase
from memtrace.sources.events import Block, Event, Events, Tag, TagEvent, Window

WEIGHTS = Tag(Category.WEIGHTS, "trainable", "float32")
GRADIENTS = Tag(Category.GRADIENTS, "", "float32")
ACTIVATIONS = Tag(Category.ACTIVATIONS, "", "float32")
CAST = Tag(Category.TRANSIENT_WEIGHTS, "autocast", "bfloat16")
INPUTS = Tag(Category.INPUTS, "", "int64")
END = 1000
BACKWARD = ((110, 9, 4), (111, 9, -4))
"""Something that the backward pass allocates."""


def window(
    *events: tuple[int, int, int],
    live: Sequence[Block] | None = None,
    resolution_ns: int = 1,
) -> Window:
    """A window from 0 to END; an event is (time, address, signed bytes)."""
    return Window(
        begin_ns=0,
        end_ns=END,
        events=Events.of(Event(*event) for event in events),
        live_at_begin=live,
        resolution_ns=resolution_ns,
    )


def marks(**changes: object) -> StepMarks:
    """A step over the whole window: forward from 10, backward from 100, optimizer from 200 to 300."""
    phases = ((10, Phase.FORWARD), (100, Phase.BACKWARD), (200, Phase.OPTIMIZER), (300, Phase.OUTSIDE))
    settings = {"begin_ns": 5, "end_ns": END, "forward_end_ns": 99, "backward_end_ns": 200, "phases": phases}
    return StepMarks(**{**settings, **changes})


def bytes_at(timeline: Timeline, moment: Moment, step: StepMarks | None = None) -> dict[str, int]:
    """The entries of a moment, as `category/component/dtype`; the law is checked on the way."""
    breakdown = timeline.moments(step or marks())[moment]
    assert breakdown.total_bytes == breakdown.allocated_bytes
    return {"/".join(key): size for key, size in breakdown.entries.items()}


class TestTags:
    def test_a_block_has_its_tag_from_its_first_byte(self) -> None:
        """A gradient is tagged after it was allocated, and is a gradient all its life."""
        timeline = replay(window((110, 1, 64), (400, 1, -64)), (), [TagEvent(150, 1, 64, GRADIENTS)])
        assert bytes_at(timeline, Moment.PEAK) == {"gradients//float32": 64}

    def test_the_next_block_at_the_address_has_not(self) -> None:
        """A tag ends with the block that it was put on."""
        events = window((20, 1, 64), (30, 1, -64), (120, 1, 128), (130, 1, -128))
        timeline = replay(events, (), [TagEvent(25, 1, 64, ACTIVATIONS)])
        assert bytes_at(timeline, Moment.PEAK) == {"temporaries/backward/": 128}

    def test_a_tag_before_the_block_is_not_for_it(self) -> None:
        """What was tagged and freed before says nothing of a block that comes later to the same address."""
        timeline = replay(window((120, 1, 128), (130, 1, -128)), (), [TagEvent(25, 1, 64, ACTIVATIONS)])
        assert bytes_at(timeline, Moment.PEAK) == {"temporaries/backward/": 128}

    def test_the_stronger_role_wins(self) -> None:
        """A gradient that is saved for backward stays a gradient, whichever tag came first."""
        for order in ((ACTIVATIONS, GRADIENTS), (GRADIENTS, ACTIVATIONS)):
            notes = [TagEvent(30 + i, 1, 64, tag) for i, tag in enumerate(order)]
            timeline = replay(window((20, 1, 64)), (), notes)
            assert bytes_at(timeline, Moment.STEP_END) == {"gradients//float32": 64}

    def test_what_is_saved_and_becomes_a_gradient_is_each_in_its_time(self) -> None:
        """A compiled backward pass takes the memory of what it needs no more; a weight that was saved stays one."""
        notes = [TagEvent(30, 1, 64, ACTIVATIONS), TagEvent(150, 1, 64, GRADIENTS), TagEvent(160, 1, 64, ACTIVATIONS)]
        timeline = replay(window((20, 1, 64), *BACKWARD, (155, 2, 8), (400, 2, -8)), (), notes)
        assert bytes_at(timeline, Moment.FORWARD_END) == {"activations//float32": 64}
        assert bytes_at(timeline, Moment.BACKWARD_END) == {"gradients//float32": 64, "temporaries/backward/": 8}
        assert bytes_at(timeline, Moment.STEP_END) == {"gradients//float32": 64}
        curve = step_curve(timeline, marks())
        assert max(curve.by_category[Category.ACTIVATIONS]) == max(curve.by_category[Category.GRADIENTS]) == 64
        notes = [TagEvent(30, 1, 64, ACTIVATIONS), TagEvent(150, 1, 64, WEIGHTS)]
        timeline = replay(window((20, 1, 64), *BACKWARD), (), notes)
        assert bytes_at(timeline, Moment.FORWARD_END) == {"weights/trainable/float32": 64}

    def test_of_equal_roles_the_last_one_counts(self) -> None:
        """A buffer that is reused carries the element type of its last user."""
        notes = [TagEvent(30, 1, 64, ACTIVATIONS), TagEvent(40, 1, 64, ACTIVATIONS._replace(dtype="int64"))]
        timeline = replay(window((20, 1, 64), (150, 1, -64)), (), notes)
        assert bytes_at(timeline, Moment.FORWARD_END) == {"activations//int64": 64}

    def test_notes_are_put_in_order(self) -> None:
        """Tags from several places come unsorted."""
        notes = [TagEvent(140, 1, 32, GRADIENTS), TagEvent(25, 1, 64, ACTIVATIONS)]
        timeline = replay(window((20, 1, 64), (110, 1, -64), (120, 1, 32)), (), notes)
        assert bytes_at(timeline, Moment.FORWARD_END) == {"activations//float32": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {"gradients//float32": 32}

    def test_a_tag_at_the_time_of_the_event_comes_after_it(self) -> None:
        """The tag was put on the block that the event brought."""
        timeline = replay(window((20, 1, 64)), (), [TagEvent(20, 1, 64, GRADIENTS)])
        assert bytes_at(timeline, Moment.STEP_END) == {"gradients//float32": 64}

    def test_within_the_resolution_a_tag_reaches_a_block_just_freed(self) -> None:
        """With events in whole microseconds, a free may be written down before the tag that it followed."""
        events = ((20_000, 1, 64), (21_000, 1, -64))
        notes = [TagEvent(21_500, 1, 64, ACTIVATIONS)]
        step = marks(begin_ns=0, end_ns=30_000, forward_end_ns=20_500, backward_end_ns=25_000, phases=())
        coarse = replay(window(*events, live=(), resolution_ns=1000), (), notes)
        exact = replay(window(*events, live=()), (), notes)
        assert bytes_at(coarse, Moment.PEAK, step) == {"activations//float32": 64}
        assert bytes_at(exact, Moment.PEAK, step) == {"temporaries/outside/": 64}


class TestRolesOfAStep:
    def test_freed_within_the_step_is_temporary(self) -> None:
        """By the phase in which it was asked for."""
        for time_ns, phase in (
            (7, "outside"),
            (20, "forward"),
            (120, "backward"),
            (220, "optimizer"),
            (310, "outside"),
        ):
            timeline = replay(window((time_ns, 1, 64), (time_ns + 5, 1, -64)), (), ())
            assert bytes_at(timeline, Moment.PEAK) == {f"temporaries/{phase}/": 64}

    def test_left_behind_is_unattributed(self) -> None:
        """A block that nobody claims and that outlives the step, from its first byte."""
        timeline = replay(window((20, 1, 64)), (), ())
        for moment in Moment:
            assert bytes_at(timeline, moment) == {"unattributed/forward/": 64}

    def test_left_behind_until_after_the_step(self) -> None:
        """A window may be longer than the step: the step's end counts."""
        timeline = replay(window((20, 1, 64), (500, 1, -64)), (), ())
        assert bytes_at(timeline, Moment.STEP_END, marks(end_ns=400)) == {"unattributed/forward/": 64}

    def test_saved_and_kept_is_unattributed_after_the_backward_pass(self) -> None:
        """Logits in a list: an activation while the step needs it, then nobody's."""
        timeline = replay(window((20, 1, 64), *BACKWARD), (), [TagEvent(30, 1, 64, ACTIVATIONS)])
        assert bytes_at(timeline, Moment.FORWARD_END) == {"activations//float32": 64}
        assert bytes_at(timeline, Moment.BACKWARD_END) == {"unattributed/forward/": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {"unattributed/forward/": 64}

    def test_saved_in_an_earlier_step_is_unattributed(self) -> None:
        """In a window of two steps, what the first one saved and did not free is a leak in the second."""
        timeline = replay(window((20, 1, 64)), (), [TagEvent(30, 1, 64, ACTIVATIONS)])
        second = marks(begin_ns=400, forward_end_ns=500, backward_end_ns=600, phases=((410, Phase.FORWARD),))
        for moment in Moment:
            assert bytes_at(timeline, moment, second) == {"unattributed/outside/": 64}

    def test_older_than_the_step_and_saved_by_it_is_an_input(self) -> None:
        """Labels for a loss outside the model: the model never sees them, the backward pass does."""
        notes = [TagEvent(30, 1, 64, ACTIVATIONS._replace(dtype="int64"))]
        listed = replay(window((20, 2, 8), live=[Block(1, 64)]), (), [*notes, TagEvent(30, 2, 8, GRADIENTS)])
        assert bytes_at(listed, Moment.FORWARD_END) == {"gradients//float32": 8, "inputs//int64": 64}
        born = replay(window((2, 1, 64)), (), notes)
        assert bytes_at(born, Moment.STEP_END) == {"inputs//int64": 64}

    def test_older_than_the_step_and_still_cast_weights(self) -> None:
        """One autocast around many steps keeps its casts: the next step saves them again."""
        timeline = replay(window((20, 1, 64)), (), [TagEvent(30, 1, 64, CAST), TagEvent(450, 1, 64, CAST)])
        second = marks(begin_ns=400, forward_end_ns=500, backward_end_ns=600, phases=((410, Phase.FORWARD),))
        assert bytes_at(timeline, Moment.FORWARD_END, second) == {"transient_weights/autocast/bfloat16": 64}

    def test_a_cast_of_a_weight_ends_with_the_backward_pass(self) -> None:
        """Transient weights are no leak before that and one after it."""
        timeline = replay(window((20, 1, 64), *BACKWARD), (), [TagEvent(30, 1, 64, CAST)])
        assert bytes_at(timeline, Moment.FORWARD_END) == {"transient_weights/autocast/bfloat16": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {"unattributed/forward/": 64}

    def test_persistent_roles_outlive_the_step(self) -> None:
        """A gradient that is kept stays a gradient."""
        timeline = replay(window((120, 1, 64)), (), [TagEvent(130, 1, 64, GRADIENTS)])
        assert bytes_at(timeline, Moment.STEP_END) == {"gradients//float32": 64}


class TestMoments:
    def test_the_exact_peak(self) -> None:
        """The highest running total between the step's beginning and its end, not at a convenient moment."""
        events = window((20, 1, 10), (30, 2, 100), (40, 2, -100), (120, 3, 50))
        timeline = replay(events, (), ())
        assert bytes_at(timeline, Moment.PEAK) == {"unattributed/forward/": 10, "temporaries/forward/": 100}

    def test_the_peak_of_the_step_alone(self) -> None:
        """What was allocated before the step began or after it ended is not its peak."""
        events = window((1, 1, 500), (2, 1, -500), (20, 2, 10), (30, 2, -10), (600, 3, 500))
        timeline = replay(events, (), ())
        assert bytes_at(timeline, Moment.PEAK, marks(end_ns=400)) == {"temporaries/forward/": 10}

    def test_the_first_of_equal_peaks(self) -> None:
        """Two equal maxima: the earlier one is taken."""
        events = window((20, 1, 100), (30, 1, -100), (120, 2, 100), (130, 2, -100))
        assert bytes_at(replay(events, (), ()), Moment.PEAK) == {"temporaries/forward/": 100}

    def test_a_moment_that_did_not_occur_is_absent(self) -> None:
        """A step without a backward pass has no end of one."""
        found = replay(window((20, 1, 64)), (), ()).moments(marks(forward_end_ns=None, backward_end_ns=None))
        assert set(found) == {Moment.PEAK, Moment.STEP_END}

    def test_an_empty_window(self) -> None:
        """No events: what was there stays there."""
        timeline = replay(window(live=[Block(1, 64)]), [TagEvent(0, 1, 64, WEIGHTS)], ())
        assert bytes_at(timeline, Moment.PEAK) == {"weights/trainable/float32": 64}

    def test_counters_are_the_second_opinion(self) -> None:
        """Where the allocator's counter was read, that is what was allocated, whatever the events say."""
        step = marks(counters={Moment.STEP_END: 72})
        breakdown = replay(window((20, 1, 64)), (), ()).moments(step)[Moment.STEP_END]
        assert (breakdown.allocated_bytes, breakdown.total_bytes) == (72, 64)


class TestWhatWasThereBefore:
    """Blocks from before the window: listed by the source, or known to the ledger."""

    def test_listed_blocks_that_nobody_knows(self) -> None:
        """They count, as unattributed."""
        timeline = replay(window(live=[Block(1, 64), Block(2, 8)]), [TagEvent(0, 2, 8, WEIGHTS)], ())
        expected = {"weights/trainable/float32": 8, "unattributed/outside/": 64}
        assert bytes_at(timeline, Moment.STEP_END) == expected

    def test_a_list_decides_what_exists(self) -> None:
        """A storage that the ledger knows and the allocator does not (host memory, say) takes no bytes."""
        timeline = replay(window(live=[Block(1, 64)]), [TagEvent(0, 9, 8, WEIGHTS)], ())
        assert bytes_at(timeline, Moment.STEP_END) == {"unattributed/outside/": 64}

    def test_a_listed_block_counts_as_large_as_it_is(self) -> None:
        """A storage that is a part of a larger block: the whole block is taken."""
        timeline = replay(window(live=[Block(1, 96)]), [TagEvent(0, 1, 64, WEIGHTS)], ())
        assert bytes_at(timeline, Moment.STEP_END) == {"weights/trainable/float32": 96}

    def test_a_listed_block_is_freed(self) -> None:
        """It is gone from then on."""
        timeline = replay(window((120, 1, -64), live=[Block(1, 64)]), (), ())
        assert bytes_at(timeline, Moment.FORWARD_END) == {"unattributed/outside/": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {}

    def test_a_death_is_not_a_free_where_the_source_lists_blocks(self) -> None:
        """There the allocator's own event tells when the block can be used again."""
        base = [TagEvent(0, 1, 64, INPUTS)]
        timeline = replay(window((250, 1, -64), live=[Block(1, 64)]), base, [TagEvent(120, 1, 64, None)])
        assert bytes_at(timeline, Moment.BACKWARD_END) == {"inputs//int64": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {}

    def test_without_a_list_the_ledger_says_what_exists(self) -> None:
        """A CPU: what the ledger knew, and the total counts it."""
        timeline = replay(window((20, 2, 8), (30, 2, -8)), [TagEvent(0, 1, 64, WEIGHTS)], ())
        assert bytes_at(timeline, Moment.PEAK) == {"weights/trainable/float32": 64, "temporaries/forward/": 8}

    def test_without_a_list_a_death_is_a_free(self) -> None:
        """A block from before the window has no free event on a CPU: the ledger saw it die."""
        base = [TagEvent(0, 1, 64, GRADIENTS)]
        timeline = replay(window((20, 2, 8)), base, [TagEvent(150, 1, 64, None), TagEvent(160, 2, 8, WEIGHTS)])
        assert bytes_at(timeline, Moment.FORWARD_END)["gradients//float32"] == 64
        assert bytes_at(timeline, Moment.STEP_END) == {"weights/trainable/float32": 8}

    def test_a_death_and_its_free_event_are_one_free(self) -> None:
        """Where the source has an event after all, the block does not go twice."""
        base = [TagEvent(0, 1, 64, GRADIENTS), TagEvent(0, 2, 8, WEIGHTS)]
        timeline = replay(window((151, 1, -64)), base, [TagEvent(150, 1, 64, None)])
        assert bytes_at(timeline, Moment.STEP_END) == {"weights/trainable/float32": 8}

    def test_the_size_of_a_free_from_before_the_window_is_the_ledgers(self) -> None:
        """torch's profiler reports the size of the block that it last saw at the address, in an earlier window."""
        base = [TagEvent(0, 1, 64, GRADIENTS), TagEvent(0, 2, 8, WEIGHTS)]
        timeline = replay(window((150, 1, -4096), (160, 3, 16)), base, ())
        assert bytes_at(timeline, Moment.STEP_END) == {"weights/trainable/float32": 8, "unattributed/backward/": 16}

    def test_the_free_of_a_block_that_nobody_knew_is_passed_over(self) -> None:
        """Without a list and without the ledger nobody knows how large it was, nor that it was there."""
        timeline = replay(window((20, 2, 8), (150, 1, -4096)), (), ())
        assert bytes_at(timeline, Moment.FORWARD_END) == {"unattributed/forward/": 8}
        assert bytes_at(timeline, Moment.STEP_END) == {"unattributed/forward/": 8}

    def test_a_free_that_the_list_does_not_explain_was_there(self) -> None:
        """Where the source lists blocks its free events are exact: the block was live before, unlisted."""
        timeline = replay(window((150, 1, -64), live=()), (), ())
        assert bytes_at(timeline, Moment.FORWARD_END) == {"unattributed/outside/": 64}

    def test_a_tag_on_memory_that_no_event_opened(self) -> None:
        """A weight loaded by another thread: seen when it is claimed, there since before."""
        timeline = replay(window((20, 2, 8)), (), [TagEvent(50, 1, 64, WEIGHTS)])
        assert bytes_at(timeline, Moment.FORWARD_END)["weights/trainable/float32"] == 64

    def test_a_saved_tensor_that_no_event_opened_stays_out(self) -> None:
        """Its death would not be seen."""
        timeline = replay(window((20, 2, 8)), (), [TagEvent(50, 1, 64, ACTIVATIONS)])
        assert bytes_at(timeline, Moment.FORWARD_END) == {"unattributed/forward/": 8}

    def test_an_allocation_on_a_block_that_never_went(self) -> None:
        """Its free was on a thread that nobody watches: the new block takes its place."""
        base = [TagEvent(0, 1, 64, INPUTS)]
        timeline = replay(window((120, 1, 32), (130, 1, -32)), base, ())
        assert bytes_at(timeline, Moment.FORWARD_END) == {"inputs//int64": 64}
        assert bytes_at(timeline, Moment.STEP_END) == {}


class TestRunningTotal:
    def test_events_out_of_order_keep_their_order(self) -> None:
        """Two threads may read the clock in the wrong order: the order of the events is the allocator's."""
        timeline = replay(window((30, 1, 64), (29, 1, -64), (29, 2, 8)), (), ())
        assert list(timeline.change_ns) == [30, 30, 30]
        assert list(timeline.totals) == [0, 64, 0, 8]


@st.composite
def stories(draw: st.DrawFn) -> tuple[Window, list[TagEvent], list[TagEvent]]:
    """What a few addresses went through, truthfully told: a window with or without a list, the base and the tags."""
    listed = draw(st.booleans())
    known = {address: draw(st.integers(1, 64)) for address in draw(st.sets(st.integers(1, 6)))}
    tags = st.sampled_from([WEIGHTS, GRADIENTS, ACTIVATIONS, CAST, INPUTS])
    base = [TagEvent(0, address, size, draw(tags)) for address, size in known.items()]
    live, events, notes = dict(known), [], []
    for time_ns in range(1, draw(st.integers(1, 40))):
        address = draw(st.integers(1, 6))
        what = draw(st.sampled_from(["change", "tag"]))
        if what == "tag":
            if address in live:
                notes.append(TagEvent(time_ns, address, live[address], draw(tags)))
        elif address in live:
            events.append(Event(time_ns, address, -live.pop(address)))
        else:
            live[address] = draw(st.integers(1, 64))
            events.append(Event(time_ns, address, live[address]))
    blocks = [Block(*item) for item in known.items()] if listed else None
    return Window(begin_ns=0, end_ns=100, events=Events.of(events), live_at_begin=blocks), base, notes


@given(stories())
def test_the_categories_add_up_to_the_total_at_every_change(
    story: tuple[Window, list[TagEvent], list[TagEvent]],
) -> None:
    """Law 1 at every moment that a step could have, and the total is what the blocks really took."""
    events, base, notes = story
    timeline = replay(events, base, notes)
    held = sum(known.nbytes for known in base)
    expected = {0: held}
    for event in events.events:
        held += event.delta
        expected[event.time_ns] = held
    for time_ns, total in expected.items():
        step = marks(begin_ns=0, end_ns=100, forward_end_ns=time_ns, backward_end_ns=time_ns)
        found = timeline.moments(step)
        assert found[Moment.FORWARD_END].total_bytes == found[Moment.FORWARD_END].allocated_bytes == total
        assert found[Moment.PEAK].total_bytes == max(expected.values())


@given(stories())
def test_the_curve_goes_through_every_moment(story: tuple[Window, list[TagEvent], list[TagEvent]]) -> None:
    """Where a moment is on the curve, the categories are those of its breakdown; nowhere is it above the peak."""
    timeline = replay(*story)
    step = marks(begin_ns=0, end_ns=100, forward_end_ns=30, backward_end_ns=60)
    curve, breakdowns = step_curve(timeline, step), timeline.moments(step)
    positions = sorted({timeline.position(0), *timeline.positions(step).values()})
    assert len(curve.seconds) >= len(positions)
    points = [
        {category: sizes[at] for category, sizes in curve.by_category.items() if sizes[at]}
        for at in range(len(curve.seconds))
    ]
    for breakdown in breakdowns.values():
        assert breakdown.by_category() in points
    assert max(sum(point.values()) for point in points) == breakdowns[Moment.PEAK].total_bytes
    assert list(curve.seconds) == sorted(curve.seconds)


def test_a_long_step_has_a_short_curve_with_its_peak() -> None:
    """Many changes become some hundred points, and the one with the highest total is among them."""
    events = [(time, 1000 + time // 2, 8 if time % 2 == 0 else -8) for time in range(10, 810)]
    events[401:401] = [(410, 1, 100), (411, 1, -100)]
    timeline = replay(window(*events), (), ())
    curve = step_curve(timeline, marks())
    assert len(curve.seconds) <= MAX_STRETCHES + len(Moment) + 1
    assert max(sum(sizes) for sizes in zip(*curve.by_category.values(), strict=True)) == max(timeline.totals)


def test_only_a_higher_peak_makes_a_curve() -> None:
    """A step with the peak of the one before makes none."""
    highest = HighestSteps()
    low, high = (replay(window((20, 1, size), (30, 1, -size)), (), ()) for size in (64, 65))
    assert highest.curve(low, marks()) is not None
    assert highest.curve(low, marks()) is None
    assert highest.curve(high, marks()) is not None
