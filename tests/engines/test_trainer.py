"""Trainer on two ranks with nothing but the callback added: logs, target files, and a Prometheus that finds both.

DeepSpeed has the settings of the document that memtrace began with; FSDP2 comes through Accelerate.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from entries import sum_of, total
from features import missing
from prometheus_server import PrometheusServer
from ranks import RANKS, STEPS, Ranks, address, running, scrape

from memtrace.exporters.table import Scale

ENGINES = {"fsdp2": "FSDP2", "zero-1": "DeepSpeed", "zero-2": "DeepSpeed", "zero-3": "DeepSpeed ZeRO-3"}
NEEDS = {"fsdp2": "FSDP2 under Trainer"}
"""What only some versions have, by the engine that needs it."""
NAMES = [pytest.param(name, marks=[pytest.mark.needs(NEEDS[name])] if name in NEEDS else []) for name in ENGINES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A run with each engine, with what Prometheus said while it stood at its last step."""
    directory = tmp_path_factory.mktemp("trainer")
    (directory / "prometheus").mkdir()
    peaks, targets = {}, {}
    engines = [name for name in ENGINES if name not in NEEDS or not missing(NEEDS[name])]
    with running(engines, directory) as ranks:
        jobs = [
            {"job_name": engine, "file_sd_configs": [{"files": [str(ranks.log_dir(engine) / "target-*.json")]}]}
            for engine in engines
        ]
        for engine in engines:  # a Prometheus watches directories that it finds when it starts
            ranks.log_dir(engine).mkdir(parents=True)
        with PrometheusServer(directory / "prometheus", jobs) as prometheus:
            for engine in engines:
                ranks.wait(lambda: ranks.holds(engine))  # noqa: B023 (called before the next turn)
                targets[engine] = [address(ranks.target(engine, rank)) for rank in range(RANKS)]
                prometheus.wait_for(f'count(memtrace_steps_total{{job="{engine}"}} == {STEPS}) == {RANKS}')
                peaks[engine] = prometheus.query(f'memtrace_memory_bytes{{job="{engine}", moment="peak"}}')
                ranks.go_on(engine)
        yield {"ranks": ranks, "reports": ranks.finish(), "peaks": peaks, "targets": targets}


def moment_of(ranks: Ranks, engine: str, rank: int, moment: str = "peak") -> dict[str, Any]:
    """Returns a moment of the last traced step of a log, in the form that `entries` reads."""
    found = [record for record in ranks.records(engine, rank) if record["traced"]][-1]["moments"][moment]
    rows = [[entry[name] for name in ("category", "component", "dtype", "bytes")] for entry in found["entries"]]
    return {"entries": rows, "allocated_bytes": found["allocated_bytes"]}


@pytest.mark.parametrize("engine", NAMES)
def test_losses_and_weights_are_the_same(runs, engine):
    """The run with the callback has the bits of the run without it, on every rank; the engine was at work."""
    for report in runs["reports"]:
        assert report[engine]["watched"] == report[engine]["plain"]
        assert len(report[engine]["plain"]["losses"]) == STEPS
        assert report[engine]["engines"] == [ENGINES[engine]]


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_prometheus_says_what_each_log_says(runs, engine, rank):
    """Found through their target files, the ranks' categories at the peak are those of the last traced step."""
    peak = moment_of(runs["ranks"], engine, rank)
    scraped = [
        [sample.labels["category"], sample.labels.get("component", ""), sample.labels.get("dtype", ""), sample.value]
        for sample in runs["peaks"][engine]
        if sample.labels["rank"] == str(rank) and sample.value
    ]
    assert sorted(scraped) == sorted(peak["entries"])
    assert sum_of(peak) == peak["allocated_bytes"]


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_categories_have_their_closed_form(runs, engine, rank):
    """Masters and moments are fp32 and this rank's half of all parameters; weights are bf16, halved from ZeRO-3 on."""
    moment = moment_of(runs["ranks"], engine, rank, "step_end")
    parameters, padding = 76_995, 4 * 64
    half = total(moment, "master_weights")
    assert 4 * parameters // RANKS <= half <= 4 * (parameters // RANKS + padding)
    for state in ("exp_avg", "exp_avg_sq"):
        # FSDP2 pads each shard to the same number of rows on every rank; its optimizer sees the rows without padding.
        assert math.isclose(total(moment, "optimizer_state", state), half, rel_tol=0.01)
    weights = {"fsdp2": 0, "zero-3": half // 2}.get(engine)
    found = total(moment, "weights", "trainable", "bfloat16")
    assert found == weights if weights is not None else 2 * parameters <= found <= 2 * (parameters + RANKS)


@pytest.mark.parametrize("engine", NAMES)
def test_ports_count_up_with_the_local_rank(runs, engine):
    """The second rank has a later port than the first: the next one, unless somebody else had it."""
    first, second = (int(target.rsplit(":", 1)[1]) for target in runs["targets"][engine])
    assert runs["ranks"].port <= first < second


@pytest.mark.parametrize("engine", NAMES)
def test_target_files_go_with_a_clean_end(runs, engine):
    """Nothing is left to be scraped."""
    assert not any(runs["ranks"].target(engine, rank).exists() for rank in range(RANKS))


def test_show_puts_the_ranks_side_by_side(runs):
    """`memtrace show RUN_DIR` has a column for each rank, and how far apart they are."""
    command = [sys.executable, "-m", "memtrace", "show", str(runs["ranks"].log_dir("zero-2"))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("2 ranks · step")
    (header,) = (line for line in shown.splitlines() if line.startswith("peak, in"))
    assert header.split()[-5:] == ["rank", "0", "rank", "1", "spread"]
    (line,) = (line for line in shown.splitlines() if line.startswith("total"))
    sizes = [sum_of(moment_of(runs["ranks"], "zero-2", rank)) for rank in range(RANKS)]
    scale = Scale(max(sizes))
    assert line.split()[1:4] == [scale.cell(size).plain for size in (*sizes, abs(sizes[0] - sizes[1]))]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Any]:
    """Rank 1 is killed at the end of step 2 of 4; rank 0 goes on, until it misses it; then both start again."""
    directory = tmp_path_factory.mktemp("killed")
    seen: dict[str, Any] = {}
    with running(["ddp"], directory, hold_at=2) as ranks:
        ranks.wait(lambda: ranks.holds("ddp", 2))
        ranks.kill(1)
        seen["survivor"] = scrape(ranks.target("ddp", 0))
        ranks.go_on("ddp")
        seen["status"] = ranks.ended(0)
        seen["target of the survivor"] = ranks.target("ddp", 0).read_text()
        seen["stale"] = ranks.target("ddp", 1).read_text()
        seen["logs"] = [ranks.records("ddp", rank) for rank in range(RANKS)]
    with running(["ddp"], directory) as ranks:
        ranks.wait(lambda: ranks.holds("ddp", already=2))
        seen["taken over"] = [scrape(ranks.target("ddp", rank)) for rank in range(RANKS)]
        seen["fresh"] = ranks.target("ddp", 1).read_text()
        ranks.go_on("ddp")
        seen["reports"] = ranks.finish()
        seen["all logs"] = [ranks.records("ddp", rank) for rank in range(RANKS)]
        seen["targets left"] = [ranks.target("ddp", rank).exists() for rank in range(RANKS)]
    return seen


def test_a_killed_rank_leaves_the_others_right(killed):
    """Metrics and log of the survivor are as before; when it fails without its peer, its target file says so."""
    assert 'memtrace_steps_total{rank="0"} 2.0' in killed["survivor"]
    assert 'memtrace_up{rank="0"} 1.0' in killed["survivor"]
    assert killed["status"] != 0, "all-reduce without rank 1 must fail"
    (target,) = json.loads(killed["target of the survivor"])
    assert target["targets"] == []
    assert target["labels"]["__meta_memtrace_state"] == "exception"
    for rank, log in enumerate(killed["logs"]):
        assert [(record["step"], record["rank"]) for record in log] == [(1, rank), (2, rank)]


def test_a_restart_takes_over_the_files_of_a_killed_rank(killed):
    """The stale target is replaced, the log is continued, and a clean end removes the target."""
    assert killed["fresh"] != killed["stale"]
    for rank, (served, log) in enumerate(zip(killed["taken over"], killed["all logs"], strict=True)):
        assert f'memtrace_steps_total{{rank="{rank}"}} {STEPS}.0' in served
        assert [record["step"] for record in log] == [1, 2, *range(1, STEPS + 1)]
        assert {record["rank"] for record in log} == {rank}
    assert killed["targets left"] == [False] * RANKS
    for report in killed["reports"]:
        assert report["ddp"]["watched"] == report["ddp"]["plain"]
