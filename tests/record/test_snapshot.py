"""What follows from a snapshot: headroom, limit, what this process holds beyond torch, and the newest breakdowns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from records import GIB, STEP_END_ENTRIES, breakdown, counted_step, cpu_snapshot, gpu_snapshot, traced_step

from memtrace.record.breakdown import AllocatorReading, DeviceReading, EntryKey, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.snapshot import RunIdentity, Snapshot

UNATTRIBUTED = EntryKey(Category.UNATTRIBUTED, "outside", "")
WEIGHTS = EntryKey(Category.WEIGHTS, "trainable", "bfloat16")


def with_device(**fields: Any) -> StepRecord:
    """Returns a traced step whose device reading differs in these fields."""
    record = traced_step()
    assert record.device_memory is not None
    return replace(record, device_memory=replace(record.device_memory, **fields))


def test_headroom_is_free_memory_and_slack() -> None:
    """What torch holds without using it can be allocated as well as what nobody holds: 56 + (20 - 14) GiB."""
    assert gpu_snapshot().headroom_bytes == 62 * GIB


def test_a_limit_narrows_the_headroom() -> None:
    """Of 30 GiB the run holds 21, of which 6 are slack: 15 GiB can still be allocated."""
    assert gpu_snapshot(limit_bytes=30 * GIB).headroom_bytes == 15 * GIB


def test_a_run_over_its_limit_has_less_than_no_headroom() -> None:
    """A limit of 10 GiB with 15 GiB in use leaves -5 GiB."""
    assert gpu_snapshot(limit_bytes=10 * GIB).headroom_bytes == -5 * GIB


def test_without_its_own_share_the_reserve_stands_for_it() -> None:
    """In a container the driver does not tell what this process holds: then at least what torch reserved counts."""
    record = with_device(process_bytes=None, non_torch_bytes=None)
    assert gpu_snapshot(record, limit_bytes=30 * GIB).headroom_bytes == 16 * GIB


def test_a_cpu_has_no_slack() -> None:
    """Headroom on a CPU is free memory, or what the limit leaves beside the resident set."""
    assert cpu_snapshot().headroom_bytes == 56 * GIB
    assert cpu_snapshot(limit_bytes=4 * GIB).headroom_bytes == 3 * GIB


@pytest.mark.parametrize(
    "snapshot",
    [
        gpu_snapshot(latest=None, latest_traced=None),
        gpu_snapshot(traced_step(allocator=None)),
        gpu_snapshot(with_device(free_and_reserved_bytes=None)),
        gpu_snapshot(traced_step(device_memory=None)),
    ],
)
def test_headroom_is_not_guessed(snapshot: Snapshot) -> None:
    """On a GPU without an allocator's or a device's reading headroom is not known."""
    assert snapshot.headroom_bytes is None


def test_what_is_not_torch() -> None:
    """This process holds 21 GiB, of which the allocator reserved 20."""
    assert traced_step().non_torch_bytes == GIB


@pytest.mark.parametrize(
    "record",
    [
        traced_step(device_memory=None),
        with_device(non_torch_bytes=None),
    ],
)
def test_what_is_not_torch_is_not_guessed(record: StepRecord) -> None:
    """Readings of different moments are not subtracted: without two that belong together it is not known."""
    assert record.non_torch_bytes is None


def test_the_newest_device_reading_wins() -> None:
    """The reading of the sampling thread stands before the one of the last step."""
    newer = DeviceReading(free_bytes=1)
    assert gpu_snapshot(device_memory=newer).device is newer
    assert gpu_snapshot(device_memory=None).device == traced_step().device_memory
    assert gpu_snapshot(device_memory=None, latest=None).device is None


def test_the_limit_is_the_device_where_none_was_set() -> None:
    """Without a setting the run may use the whole device."""
    assert gpu_snapshot().device_limit_bytes == 80 * GIB
    assert gpu_snapshot(limit_bytes=GIB).device_limit_bytes == GIB
    assert gpu_snapshot(device_memory=None, latest=None).device_limit_bytes is None


def test_what_memtrace_has_cost_is_a_share_of_wall_time() -> None:
    """Its own time and that of slower steps, since the tracer was attached; not told before there is a step."""
    assert gpu_snapshot().overhead_ratio == (0.5 + 0.25) / 100
    assert gpu_snapshot(begun_unix_seconds=None).overhead_ratio is None
    assert Snapshot(identity=RunIdentity(run_name="run"), begun_unix_seconds=1.0).overhead_ratio is None


def test_an_exact_breakdown_is_shown_as_it_is() -> None:
    """After a traced step its own breakdowns are the newest."""
    record = traced_step()
    assert gpu_snapshot(record).newest_breakdown(Moment.PEAK) is record.moments[Moment.PEAK]


def test_a_moment_of_an_earlier_trace_is_kept() -> None:
    """A counted step knows no peak: the peak of the last traced step is the newest."""
    traced = traced_step()
    snapshot = gpu_snapshot(counted_step(), latest_traced=traced)
    assert snapshot.newest_breakdown(Moment.PEAK) is traced.moments[Moment.PEAK]


def test_what_only_a_trace_can_see_is_carried_over() -> None:
    """Between traces unattributed stays as it was last seen, while the ledger's categories are those of now."""
    entries = STEP_END_ENTRIES | {UNATTRIBUTED: GIB}
    traced = traced_step(moments={Moment.STEP_END: breakdown(Moment.STEP_END, entries)})
    shown = gpu_snapshot(counted_step(), latest_traced=traced).newest_breakdown(Moment.STEP_END)
    assert shown is not None
    assert shown.estimated
    assert dict(shown.entries) == {WEIGHTS: 2 * GIB, UNATTRIBUTED: GIB}


def test_what_a_counted_step_has_seen_itself_is_not_replaced() -> None:
    """Activations from the counters of this step stand before those of an earlier trace."""
    activations = EntryKey(Category.ACTIVATIONS, "", "")
    before = {EntryKey(Category.ACTIVATIONS, "", "bfloat16"): 7 * GIB}
    now = counted_step(moments={Moment.PEAK: breakdown(Moment.PEAK, {activations: GIB}, estimated=True)})
    traced = traced_step(moments={Moment.PEAK: breakdown(Moment.PEAK, before)})
    shown = gpu_snapshot(now, latest_traced=traced).newest_breakdown(Moment.PEAK)
    assert shown is not None
    assert dict(shown.entries) == {activations: GIB}


def test_nothing_is_known_before_the_first_step() -> None:
    """Without a step there is no breakdown."""
    assert cpu_snapshot().newest_breakdown(Moment.PEAK) is None


def test_slack_is_what_torch_can_use_again() -> None:
    """Reserved minus allocated and private pools."""
    assert AllocatorReading(allocated_bytes=3, reserved_bytes=5).slack_bytes == 2
    assert AllocatorReading(allocated_bytes=3, reserved_bytes=9, private_pool_bytes=4).slack_bytes == 2


def with_allocator(**fields: Any) -> StepRecord:
    """Returns a traced step whose allocator's reading differs in these fields."""
    record = traced_step()
    assert record.allocator is not None
    return replace(record, allocator=replace(record.allocator, **fields))


def test_what_private_pools_hold_is_no_headroom() -> None:
    """Nobody but the graph can use it: of 62 GiB 4 are not to be had."""
    assert gpu_snapshot(with_allocator(private_pool_bytes=4 * GIB)).headroom_bytes == 58 * GIB


def test_a_share_of_the_device_bounds_the_headroom() -> None:
    """`set_per_process_memory_fraction`: of 25 GiB that may be reserved 14 are in use."""
    assert gpu_snapshot(with_allocator(allowed_bytes=25 * GIB)).headroom_bytes == 11 * GIB


def test_readings_of_different_moments_are_not_subtracted() -> None:
    """A newer reading of the driver, and an allocator that has reserved more since: headroom is what it was."""
    newer = with_device(free_bytes=40 * GIB, process_bytes=37 * GIB).device_memory
    record = with_allocator(reserved_bytes=15 * GIB)
    assert gpu_snapshot(record, device_memory=newer, limit_bytes=30 * GIB).headroom_bytes == 15 * GIB
    assert gpu_snapshot(record, device_memory=newer).headroom_bytes == 62 * GIB
