"""The main job, end to end: a real checkpoint under Trainer, scraped by a real Prometheus."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from finetune_trainer import build_trainer, parse_options
from prometheus_server import PrometheusServer, Sample
from transformers import Trainer, TrainerCallback

from memtrace import Category, MemTraceCallback, Moment, StepRecord
from memtrace.exporters.run_directory.steplog import read_step_log, step_log_path
from memtrace.record.metrics import MAX_SERIES

STEPS = 5
COUNT = "count({__name__=~'memtrace_.+'})"


class AskPrometheus(TrainerCallback):
    """At the last step, while the endpoint is still up, waits until Prometheus has scraped it, and asks."""

    def __init__(self, memtrace: MemTraceCallback, directory: Path) -> None:
        self.memtrace = memtrace
        self.directory = directory
        self.answers: dict[str, list[Sample]] = {}
        self.exposition = ""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != STEPS:
            return
        url = self.memtrace.tracer.url
        jobs = [{"job_name": "train", "static_configs": [{"targets": [urlsplit(url).netloc]}]}]
        with PrometheusServer(self.directory, jobs) as prometheus:
            prometheus.wait_for(f"memtrace_steps_total == {STEPS}")
            for query in (*map(by_category, Moment), "memtrace_step_peak_bytes", "memtrace_up", COUNT):
                self.answers[query] = prometheus.query(query)
        with urlopen(url) as response:
            self.exposition = response.read().decode()


def by_category(moment: Moment) -> str:
    return f'sum by (category) (memtrace_memory_bytes{{moment="{moment}"}})'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[AskPrometheus, StepRecord]:
    """One fine-tune of MiniLM with every step traced: what Prometheus said, and the last line of the step log."""
    output = tmp_path_factory.mktemp("minilm")
    short = ["--max-steps", str(STEPS), "--batch-size", "8", "--max-tokens", "32", "--learning-rate", "1e-4"]
    options = parse_options([*short, "--no-memtrace", "--output-dir", str(output)])
    trainer: Trainer = build_trainer(options)
    memtrace = MemTraceCallback(port=0, trace_every=1, strict=True)
    asking = AskPrometheus(memtrace, tmp_path_factory.mktemp("prometheus"))
    trainer.add_callback(memtrace)
    trainer.add_callback(asking)
    trainer.train()
    asking.model = trainer.model
    return asking, list(read_step_log(step_log_path(output / "memtrace", 0)))[-1]


@pytest.mark.parametrize("moment", [Moment.PEAK, Moment.STEP_END])
def test_prometheus_answers_what_the_step_log_says(run, moment: Moment) -> None:
    """`sum by (category)` over the last step equals the last line of the log, category by category, to the byte."""
    asking, record = run
    assert record.step == STEPS
    assert record.traced
    answer = {sample.labels["category"]: int(sample.value) for sample in asking.answers[by_category(moment)]}
    assert answer == record.moments[moment].by_category()
    assert answer[Category.WEIGHTS] == sum(p.nbytes for p in asking.model.parameters()) > 22_700_000 * 4


def test_the_sum_is_the_peak(run) -> None:
    """The categories add up to the peak that is exported, and to what the allocator counted."""
    asking, record = run
    (peak,) = asking.answers["memtrace_step_peak_bytes"]
    assert peak.value == record.moments[Moment.PEAK].allocated_bytes == record.moments[Moment.PEAK].total_bytes
    assert [sample.value for sample in asking.answers["memtrace_up"]] == [1]


def test_series_are_few_and_carry_their_rank(run) -> None:
    """At most 80 series a rank."""
    asking, _ = run
    (count,) = asking.answers[COUNT]
    assert 20 < count.value <= MAX_SERIES
    samples = [line for line in asking.exposition.splitlines() if not line.startswith("#")]
    assert len(samples) == count.value
    assert all('rank="0"' in line for line in samples)


def test_promtool_accepts_the_exposition(run) -> None:
    """`promtool check metrics` has nothing to say about the text that was served."""
    asking, _ = run
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=asking.exposition, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout.strip(), checked.stderr.strip()) == (0, "", "")
