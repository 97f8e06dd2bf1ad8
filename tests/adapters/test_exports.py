"""The outputs of a run, where their end is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_training import make

from memtrace import TracerConfig
from memtrace.adapters.exports import Exports
from memtrace.exporters.run_file import read_run_file, run_file_path
from memtrace.exporters.server import Scrapes
from memtrace.snapshot import RunState
from memtrace.tracer import Tracer


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
