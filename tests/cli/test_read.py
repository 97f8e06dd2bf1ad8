"""`memtrace read`: a snapshot as a table, as JSON, beside another, and annotated."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest

from memtrace.cli import main, read
from memtrace.forensics import plain_pickle

FIXTURE = Path(__file__).parents[1] / "fixtures" / "snapshots"
SNAPSHOT, CONFIG = str(FIXTURE / "snapshot.pickle.gz"), str(FIXTURE / "config.json")


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_has_each_moment_with_the_source_of_each_entry(capsys):
    """With a configuration sizes tell; without it the same bytes are unattributed, and no line claims otherwise."""
    assert main(["read", SNAPSHOT, "--config", CONFIG]) == 0
    with_sizes = lines_of(capsys.readouterr().out)
    assert "MiB source peak end failure" in with_sizes
    assert "■ optimizer_state exp_avg float32 size 7.43 7.43 7.43" in with_sizes
    assert "failed: a request for 12.00 MiB at train.py:41 train, with 2.00 MiB free on the device" in with_sizes
    assert any(line.startswith("free in 2 segments at the end: 16.90 MiB") for line in with_sizes)
    assert main(["read", SNAPSHOT]) == 0
    without = lines_of(capsys.readouterr().out)
    assert "■ unattributed none 44.52 38.55 38.55" in without
    totals = [line for line in with_sizes if line.startswith("allocated")]
    assert totals == [line for line in without if line.startswith("allocated")] == ["allocated 53.42 49.09 49.09"]


def test_json_has_the_same_in_bytes(capsys):
    """Entries add up to what is allocated, at each moment and at each point of the timeline."""
    assert main(["read", SNAPSHOT, "--config", CONFIG, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memtrace.read/1"
    (device,) = document["snapshots"][0]["devices"]
    assert {*device["moments"]} == {"peak", "end", "failure"}
    for moment in device["moments"].values():
        assert sum(entry["bytes"] for entry in moment["entries"]) == moment["allocated_bytes"] <= 53.43 * 2**20
        assert {entry["source"] for entry in moment["entries"]} <= {"size", "life", "none"}
    curve = device["timeline"]
    assert (
        max(map(sum, zip(*curve["categories"].values(), strict=True))) == device["moments"]["peak"]["allocated_bytes"]
    )
    assert len(curve["seconds"]) == len(curve["categories"]["weights"])
    assert (device["device"], device["events"], device["steps"], device["notes"]) == (0, 1331, 1, [])
    holders = device["holders"]
    assert holders[0] == {"category": "workspaces", "place": "", "blocks": 2, "bytes": 2 * 8_519_680}
    assert sum(holder["bytes"] for holder in holders) <= device["moments"]["failure"]["allocated_bytes"]
    free = device["fragmentation"]
    reserved = device["moments"]["end"]["reserved_bytes"]
    assert (free["segments"], free["expandable"], reserved) == (2, False, 66 << 20)
    assert free["largest_free_bytes"] < 12 << 20 < free["free_bytes"] <= reserved
    assert [(remedy["kind"], remedy["would_fit"]) for remedy in device["remedies"]] == [
        ("expandable_segments", True), ("sharding", True), ("8bit_optimizer", True), ("bf16", False),
    ]  # fmt: skip
    assert device["remedies"][0]["saved_bytes"] == free["free_bytes"]
    assert device["failure"] == {"requested_bytes": 12 << 20, "free_bytes": 2 << 20, "place": "train.py:41 train"}


def test_two_snapshots_are_compared(tmp_path, capsys):
    """By category, with the difference; a device that only one of them has is named."""
    other, empty = tmp_path / "rank1.pickle", tmp_path / "empty.pickle"
    alloc = {"action": "alloc", "addr": 1, "size": 5 << 20, "user_metadata": "weights"}
    other.write_bytes(pickle.dumps({"segments": [], "device_traces": [[alloc], [alloc]]}))
    empty.write_bytes(pickle.dumps({"segments": [], "device_traces": []}))
    assert main(["read", SNAPSHOT, str(other), "--config", CONFIG, "--compare"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert "■ weights 7.43 MiB 5.00 MiB -2.43 MiB" in lines
    assert "■ workspaces 16.25 MiB 0 B -16.25 MiB" in lines
    assert "total 53.42 MiB 5.00 MiB -48.42 MiB" in lines
    assert "reserved 64.00 MiB 0 B -64.00 MiB" in lines
    assert "only rank1.pickle has device 1" in lines
    assert main(["read", str(empty), str(empty), "--compare"]) == 0
    assert lines_of(capsys.readouterr().out) == ["the two snapshots have no device in common"]


def snapshots_of_ranks(directory, *contents):
    """Files of one name in a directory a rank, as trainers leave them."""
    paths = []
    for rank, content in enumerate(contents):
        path = directory / f"rank{rank}" / "snapshot.pickle"
        path.parent.mkdir()
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("columns", [80, 100])
def test_ranks_stand_side_by_side(tmp_path, capsys, monkeypatch, columns):
    """Each by its own name, with its share of the fullest and the request that failed; an empty one is told."""
    monkeypatch.setenv("COLUMNS", str(columns))
    small = {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 5 << 20}]]}
    failed = gzip.decompress(Path(SNAPSHOT).read_bytes())
    paths = snapshots_of_ranks(tmp_path, small, failed, small, {"segments": [], "device_traces": [[]]})
    page = tmp_path / "page.html"
    assert main(["read", *paths, "--config", CONFIG, "--html", str(page)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    html = page.read_text(encoding="utf-8")
    if columns == 100:
        assert "peak, MiB allocated reserved share failed category" in shown
        assert "rank0/snapshot.pickle, device 0 5.00 " in shown
        (full,) = re.findall(r"rank1/snapshot\.pickle, device 0 (.*?) rank2/", shown)
        figures = "53.42 64.00 100% 12.00 workspaces 16.25 optimizer_state 14.87 weights 7.43"
        assert full == figures
        assert figures in " ".join(html.split())
    assert shown.count(" 9% ") == 2
    assert "…" not in shown
    for figure in ("100%", " 12.00 ", "workspaces 16.25", "optimizer_state 14.87"):
        assert figure in shown
    assert "rank3/snapshot.pickle: the snapshot has no segments and no history" in shown
    assert [f"<h2>rank{rank}/snapshot.pickle, device 0</h2>" in html for rank in range(4)] == [True, True, True, False]


def test_two_ranks_are_compared_by_name(tmp_path, capsys):
    """Devices that both have; the columns and the JSON have the names that tell the files apart."""
    small = {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 5 << 20}]]}
    large = {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 7 << 20}]]}
    paths = snapshots_of_ranks(tmp_path, small, large)
    assert main(["read", *paths, "--compare"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert "peak of device 0 rank0/snapshot.pickle rank1/snapshot.pickle difference" in lines
    assert "total 5.00 MiB 7.00 MiB +2.00 MiB" in lines
    assert main(["read", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["snapshots"]
    assert [one["name"] for one in found] == ["rank0/snapshot.pickle", "rank1/snapshot.pickle"]
    assert main(["read", paths[0], paths[0]]) == 0
    assert sum(line.startswith("snapshot.pickle, device 0 ") for line in lines_of(capsys.readouterr().out)) == 2


def test_an_annotated_snapshot_says_the_same_without_the_configuration(tmp_path, capsys):
    """What memtrace has written on the blocks is believed: the entries of the failure are the same."""
    out = tmp_path / "annotated.pickle"
    assert main(["read", SNAPSHOT, "--config", CONFIG, "--annotate", str(out), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["read", str(out), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)

    def entries(document):
        found = document["snapshots"][0]["devices"][0]["moments"]["failure"]["entries"]
        return {(entry["category"], entry["component"], entry["dtype"]): entry["bytes"] for entry in found}

    assert entries(before) == entries(after)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{here}/none.pickle"], "cannot be read"),
        ([SNAPSHOT, "--compare"], "--compare needs two snapshots, got 1"),
        ([SNAPSHOT, SNAPSHOT, "--annotate", "x"], "--annotate needs one snapshot, got 2"),
        ([SNAPSHOT, "--annotate", "{here}/no/dir/x"], "cannot be written"),
        ([SNAPSHOT, "--config", "{here}"], "no config.json"),
        ([CONFIG], "must be a pickle of protocol 2 to 5"),
        ([SNAPSHOT, "--config", "{here}/none.json"], "is no configuration"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(tmp_path, capsys, arguments, said):
    """The file and what was wrong with it."""
    assert main(["read", *(part.format(here=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("memtrace: ") and said in error


def test_a_snapshot_cannot_steer_the_terminal(tmp_path, capsys):
    """Names of files and functions are shown without control sequences."""
    frames = [{"filename": "\x1b[31mx.py", "line": 1, "name": "\x07f"}]
    entry = {"action": "alloc", "addr": 1, "size": 5 << 20, "frames": frames}
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[entry, {**entry, "action": "oom"}]]}))
    assert main(["read", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown


def test_a_large_file_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    """On stderr, so that a pipe gets the reading alone."""
    monkeypatch.setattr(read, "_SAID_EACH", 10_000)
    monkeypatch.setattr(plain_pickle, "_CHUNK", 10_000)
    path = tmp_path / "copy.pickle.gz"
    shutil.copy(SNAPSHOT, path)
    assert main(["read", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("copy.pickle.gz: 0 MiB read") > 1
    json.loads(captured.out)


def test_a_page_and_a_trace_show_the_timeline(tmp_path, capsys):
    """The page runs no script and escapes names; the trace's counters add up to the peak, where its mark is."""
    named = tmp_path / "<b>&.pickle.gz"
    shutil.copy(SNAPSHOT, named)
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    assert main(["read", str(named), "--config", CONFIG, "--html", str(page), "--perfetto", str(trace)]) == 0
    assert "allocated" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "script-src" not in html
    assert "<b>" not in html
    assert html.count("<svg") == 1
    assert "failed: a request for 12.00 MiB" in html
    assert "■ optimizer_state exp_avg float32 size 7.43 7.43 7.43" in lines_of(html)
    assert "allocated 53.42 49.09 49.09" in lines_of(html)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    (peak,) = (event for event in events if event["name"] == "peak")
    at_peak = [sum(event["args"].values()) for event in events if event["ph"] == "C" and event["ts"] == peak["ts"]]
    totals = [event["args"]["bytes"] for event in events if event["name"] == "memory in all"]
    assert max(totals) in at_peak
    assert f"{max(totals) / 2**20:.2f}" == "53.42"
    assert {event["name"] for event in events if event["ph"] == "i"} == {"peak", "out of memory"}
    assert main(["read", SNAPSHOT, "--html", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--perfetto", "--annotate"])
def test_an_output_that_cannot_be_or_would_replace_a_snapshot_is_refused_before_reading(
    tmp_path, capsys, monkeypatch, option
):
    """Reading may take minutes, and the snapshot may be the only one of a failure."""
    monkeypatch.setattr(read, "_read", pytest.fail)
    named = tmp_path / "s.pickle.gz"
    shutil.copy(SNAPSHOT, named)
    assert main(["read", str(named), option, str(tmp_path / "." / "s.pickle.gz")]) == 2
    assert "is one of the snapshots" in capsys.readouterr().err
    assert named.read_bytes() == Path(SNAPSHOT).read_bytes()
    assert main(["read", str(named), option, str(tmp_path / "nowhere" / "out")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_an_empty_file_says_so(tmp_path, capsys):
    """It is what a process leaves that was killed while it wrote."""
    path = tmp_path / "s.pickle"
    path.write_bytes(b"")
    assert main(["read", str(path)]) == 2
    assert "the file is empty" in capsys.readouterr().err
