"""What CUDA graphs hold: a figure of its own in table, metrics and report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from records import GIB, breakdown, counted_step, gpu_snapshot, traced_step

from memtrace.exporters.prometheus import render_text as exposition
from memtrace.exporters.table import render_text
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import Category, Moment

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "gpu" / "breakdowns.json").read_text(encoding="utf-8"))
SAYS = "replayed: gradients and activations lie in private pools"


def holding(record: StepRecord, nbytes: int) -> StepRecord:
    """Returns the step with so many bytes in private pools."""
    assert record.allocator is not None
    return replace(record, allocator=replace(record.allocator, private_pool_bytes=nbytes))


def test_the_table_has_a_figure_and_says_what_is_in_it() -> None:
    """More than the activations that were seen: a replayed graph allocates none."""
    text = render_text(holding(traced_step(), 5 * GIB))
    assert "private pools 5.00 GiB" in text
    assert "slack 1.00 GiB" in text
    assert SAYS in text


def test_small_pools_and_counted_steps_say_less() -> None:
    """A pool of a library is no graph that was replayed, and a counted step has not seen all activations."""
    assert SAYS not in render_text(holding(traced_step(), 1))
    assert SAYS not in render_text(holding(counted_step(), 5 * GIB))
    assert "private pools" not in render_text(traced_step())


def test_the_metric() -> None:
    """Beside slack, of which it is no part."""
    lines = exposition(gpu_snapshot(holding(traced_step(), 5 * GIB))).splitlines()
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values["memtrace_allocator_private_pool_bytes"] == 5 * GIB
    assert values["memtrace_allocator_slack_bytes"] == GIB
    assert values["memtrace_headroom_bytes"] == 57 * GIB


def test_the_recorded_run_with_graphs_says_where_the_rest_is() -> None:
    """torch.compile with reduce-overhead on an H200: 623 MB were seen of 954, and no gradient or activation at all."""
    recorded = RECORDED["compiled_reduce_overhead"]
    entries = {EntryKey(*key.split("/")): size for key, size in recorded["peak"]["entries"].items()}
    unseen = RECORDED[recorded["compare_with"]]["peak"]["allocated"] - sum(entries.values())
    assert unseen == 331_350_036
    assert not {Category.GRADIENTS, Category.ACTIVATIONS} & {key.category for key in entries}
    peak = breakdown(Moment.PEAK, entries)
    text = render_text(holding(traced_step(moments={Moment.PEAK: peak}), unseen))
    assert SAYS in text
    assert f"private pools {unseen / 2**20:.2f} MiB" in text
