"""The outputs of a run, where their end is interrupted."""

from __future__ import annotations

from pathlib import Path
from urllib.request import urlopen

import pytest
from small_training import make, step

from memtrace import MemoryTracer, TracerConfig
from memtrace.adapters.exports import Exports
from memtrace.exporters.endpoint.server import Scrapes
from memtrace.exporters.run_directory.run_file import read_run_file, run_file_path
from memtrace.record.snapshot import RunState
from memtrace.tracing.tracer import Tracer


def test_who_interrupts_the_wait_for_a_scrape_does_not_wait_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C reaches the script, all outputs are closed, and neither the exit nor SIGTERM waits once more."""
    waits: list[float] = []

    def interrupted(scrapes: Scrapes, begun: int, seconds: float) -> bool:
        waits.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scrapes, "wait_for_one_after", interrupted)
    config = TracerConfig(port=0, linger_seconds=600.0, log_dir=tmp_path)
    with Tracer(*make(), config) as tracer:
        exports = Exports.open(tracer.snapshot, tracer.identity, config, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        exports.close()
    exports.exits()
    exports.terminated()
    status = read_run_file(run_file_path(tmp_path, 0))
    assert waits == [600.0]
    assert status is not None
    assert status.state is RunState.OK


def test_a_port_in_use_is_told_with_both_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever scrapes the wanted port reads in the log of the run where the metrics are instead."""
    first = TracerConfig(port=0, log_dir=tmp_path / "a")
    with MemoryTracer(*make(), first) as before:
        taken = port_of(before)
        assert "in use" not in caplog.text
        with MemoryTracer(*make(), TracerConfig(port=taken, log_dir=tmp_path / "b")) as tracer:
            found = port_of(tracer)
    assert found != taken
    assert f"memtrace: port {taken} is in use: the metrics of rank 0 are at port {found}" in caplog.text


def test_the_page_of_an_endpoint_is_about_its_run(tmp_path: Path) -> None:
    """At `/`: run and launch, how it is, the table of its last traced step, and a link to the metrics."""
    config = TracerConfig(port=0, log_dir=tmp_path, run_name="<chat>", run_id="4711", trace_every=1)
    model, optimizer = make()
    with MemoryTracer(model, optimizer, config) as tracer:
        home = f"http://127.0.0.1:{port_of(tracer)}/"
        assert "no step has ended yet" in served(home)
        step(model, optimizer)
        page = served(home)
        assert served(home + "metrics").startswith("# HELP memtrace_up")
    for words in ("&lt;chat&gt;, rank 0 of 1", "running", "1 steps", "launch 4711", "weights", 'href="metrics"'):
        assert words in page


def test_a_training_that_begins_anew_has_not_failed(tmp_path: Path) -> None:
    """Nothing waits for a scrape of the outputs before, whatever is being handled then."""
    config = TracerConfig(port=0, linger_seconds=600.0, log_dir=tmp_path)
    tracer = MemoryTracer(*make(), config)
    tracer.attach()
    try:
        raise ValueError
    except ValueError:
        tracer.give_way()
    status = read_run_file(run_file_path(tmp_path, 0))
    assert status is not None
    assert status.state is RunState.OK


def port_of(tracer: MemoryTracer) -> int:
    assert tracer.url is not None
    return int(tracer.url.rpartition(":")[2].partition("/")[0])


def served(address: str) -> str:
    with urlopen(address, timeout=60) as answer:
        return str(answer.read().decode())
