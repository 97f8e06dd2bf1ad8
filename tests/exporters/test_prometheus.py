"""The Prometheus exposition: exact text, nothing invented, never too much, readable by Prometheus' own tools."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from records import GIB, breakdown, cpu_snapshot, devices, full_snapshot, gpu_snapshot, maybe, moments, sizes, steps

import memtrace
from memtrace.exporters.prometheus import registry_of, render_text
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.metrics import CATALOGUE, EXPORTED_MOMENTS, IDENTITY_LABELS, MAX_SERIES
from memtrace.record.snapshot import RunIdentity, RunState, Snapshot, Totals

EXPECTED = Path(__file__).parent / "exposition"

snapshots = st.builds(
    Snapshot,
    identity=st.builds(
        RunIdentity,
        run_name=st.text(),
        rank=sizes,
        local_rank=sizes,
        world_size=sizes,
        device=st.sampled_from(["cpu", "cuda:0"]),
        gpu_uuid=maybe(st.text()),
    ),
    up=st.booleans(),
    totals=st.builds(
        Totals, steps=sizes, traced_steps=sizes, self_seconds=st.floats(0, 1e9), ooms=sizes, retries=sizes
    ),
    latest=maybe(steps),
    latest_traced=maybe(steps),
    device_memory=maybe(devices),
    limit_bytes=maybe(sizes),
    plan=moments,
)


def samples(snapshot: Snapshot) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns the value of each series of a snapshot."""
    return series(render_text(snapshot))


def series(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns the value of each series, read back from the text as Prometheus reads it."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            at = (sample.name, tuple(sorted(sample.labels.items())))
            assert at not in found, "a series comes once"
            found[at] = sample.value
    return found


def values(snapshot: Snapshot, name: str) -> list[float]:
    return [value for (found, _), value in samples(snapshot).items() if found == name]


def by_category(snapshot: Snapshot, moment: Moment) -> dict[str, float]:
    sums: dict[str, float] = {}
    for (name, labels), value in samples(snapshot).items():
        found = dict(labels)
        if name == "memtrace_memory_bytes" and found["moment"] == moment:
            sums[found["category"]] = sums.get(found["category"], 0) + value
    return sums


@pytest.mark.parametrize(
    ("name", "snapshot"),
    [
        ("gpu", gpu_snapshot()),
        ("cpu_before_the_first_step", cpu_snapshot()),
        ("switched_off", gpu_snapshot(up=False)),
    ],
)
def test_the_text_is_exactly_this(name: str, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exposition of a snapshot is the recorded one, byte for byte."""
    monkeypatch.setattr(memtrace, "__version__", "1.2.3")
    assert render_text(snapshot) == (EXPECTED / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("snapshot", [gpu_snapshot(), cpu_snapshot(), full_snapshot()])
def test_promtool_has_nothing_to_say(snapshot: Snapshot) -> None:
    """`promtool check metrics` accepts the text and finds nothing to improve."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=render_text(snapshot), text=True, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@given(snapshots)
def test_no_snapshot_makes_it_fail(snapshot: Snapshot) -> None:
    """Whatever a snapshot holds: no exception, no NaN, the rank on every series, at most 80 series."""
    found = samples(snapshot)
    assert len(found) <= MAX_SERIES
    assert all(math.isfinite(value) for value in found.values())
    assert all(dict(labels)["rank"] == str(snapshot.identity.rank) for _, labels in found)
    for moment in EXPORTED_MOMENTS:
        newest = snapshot.newest_breakdown(moment) if snapshot.up else None
        sums = {} if newest is None else newest.by_category()
        assert by_category(snapshot, moment) == pytest.approx(sums)


def test_five_hundred_components_stay_within_the_bound() -> None:
    """500 components at each moment, with all else that can be known: 80 series at most, and right sums by category."""
    entries = {
        EntryKey(category, f"component{number}", "float32"): (number + 1) * GIB
        for category in Category
        for number in range(50)
    }
    assert len(entries) >= 500
    breakdowns = {moment: breakdown(moment, entries) for moment in Moment}
    whole = full_snapshot()
    assert whole.latest is not None
    snapshot = replace(whole, latest=replace(whole.latest, moments=breakdowns), plan=breakdowns)
    for known in (snapshot, replace(snapshot, plan={})):
        assert MAX_SERIES - 2 <= len(samples(known)) <= MAX_SERIES
    expected = breakdowns[Moment.PEAK].by_category()
    for moment in EXPORTED_MOMENTS:
        assert by_category(snapshot, moment) == expected


def test_every_metric_has_a_series_where_all_is_known() -> None:
    """The catalogue lists nothing that the exporter does not compute."""
    assert {name for name, _ in samples(full_snapshot())} == {metric.name for metric in CATALOGUE}


def test_labels_are_those_of_the_catalogue() -> None:
    """Every series has the labels that the catalogue says, and those of its rank."""
    labels = {metric.name: {*metric.labels, *IDENTITY_LABELS} for metric in CATALOGUE}
    for name, found in samples(full_snapshot()):
        assert {label for label, _ in found} == labels[name]


def test_no_gpu_uuid_label_on_a_cpu() -> None:
    """Where the device has no UUID the label is absent, not empty."""
    assert all("gpu_uuid" not in dict(labels) for _, labels in samples(cpu_snapshot()))


def test_names_with_quotes_newlines_and_signs_survive() -> None:
    """A run name may hold anything: it is escaped, and comes back as it was."""
    name = 'a "quoted"\\ name\nüber 模型'
    snapshot = cpu_snapshot(identity=RunIdentity(run_name=name))
    assert any(("run", name) in labels for _, labels in samples(snapshot))


def test_a_name_that_is_not_unicode_is_shown_all_the_same() -> None:
    """A script's name in another encoding arrives as lone surrogates, which no text can carry."""
    snapshot = cpu_snapshot(identity=RunIdentity(run_name="caf\udce9.py"))
    assert any(("run", "caf?.py") in labels for _, labels in samples(snapshot))


def test_a_scrape_sees_one_snapshot() -> None:
    """The source is asked once a scrape: all series belong to the same instant."""
    asked = []

    def source() -> Snapshot:
        asked.append(len(asked))
        return gpu_snapshot(totals=Totals(steps=len(asked)))

    registry = registry_of(source)
    assert asked == [], "registering takes no snapshot"
    list(registry.collect())
    assert asked == [0]


def test_a_metric_can_be_asked_for_by_name() -> None:
    """`?name[]=` of the endpoint finds the metrics, since the collector describes them."""
    registry = registry_of(gpu_snapshot).restricted_registry(["memtrace_up"])
    assert [family.name for family in registry.collect()] == ["memtrace_up"]


def test_a_finished_run_is_not_up() -> None:
    """Its figures are as of its end, and it does not say that memtrace is at work."""
    ended = samples(gpu_snapshot(state=RunState.OK))
    before = samples(gpu_snapshot())
    assert {name for (name, _), _ in before.items() ^ ended.items()} == {"memtrace_up", "memtrace_run_state"}
    assert values(gpu_snapshot(state=RunState.OK), "memtrace_up") == [0]
