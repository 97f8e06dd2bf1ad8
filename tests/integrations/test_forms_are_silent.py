"""The alert for unattributed memory over the figures of real trainings of every form: only a leak raises it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import other_forms
import pytest
import torch
import yaml
from documented import ROOT
from engines import test_further_loops
from laws.loop_forms import FORMS, Form, Training, one, rows, update
from laws.test_loop_forms import EVERY_STEP, train
from promql import RULES
from torch import nn
from tracing import test_updates

from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.tracing.tracer import Tracer

from test_rules import promtool  # isort: skip

MINUTES = 240
ALERT = "MemtraceUnattributedGrowth"
ROOM = 1.5
"""Capacity, as a share of the highest peak: a run that fills two thirds of its device."""


def leaks(training: Training) -> Iterator[torch.Tensor]:
    """Keeps what the model makes of each batch."""
    kept = []
    while True:
        output = training.model(rows())
        kept.append(output.detach())
        yield update(output.square().mean(), *training.optimizers)


LEAK = Form("a leak", lambda: one(nn.Linear(16, 16)), leaks, iterations=20)


@pytest.fixture(scope="module")
def records() -> Mapping[str, Sequence[StepRecord]]:
    """The traced steps of each form, by its name."""
    found = {}
    for form in (*FORMS, LEAK):
        _, _, tracer = train(form, EVERY_STEP)
        assert tracer is not None
        found[form.name] = tracer.history
    for name, form in test_updates.FORMS.items():
        _, tracer = test_updates.train(form, partial(Tracer, config=EVERY_STEP))
        found[name] = tracer.history
    found |= other_forms.records()
    return {name: [record for record in history if record.traced] for name, history in found.items()}


def series(run: str, history: Sequence[StepRecord], *, keeps: bool) -> Iterator[dict[str, str]]:
    """Yields what a run exports for the alert: each traced step is the newest one for an equal part of four hours.

    A trace on a CPU has what its own step leaves behind. What earlier steps have left, less what is gone of it, is
    added where the loop keeps something, as the allocator of a GPU lists it. Loops whose copies are gone when their
    step returns keep nothing, and a trace on a CPU would tell so by chance: where another block takes the place.
    """
    of_run = f'job="train",instance="{run}:1",rank="0"'
    peaks = [record.moments[Moment.PEAK] for record in history]
    left = [record.moments[Moment.STEP_END][Category.UNATTRIBUTED] - record.replaced_bytes for record in history]
    before = [0, *accumulate(left)] if keeps else [0] * len(left)
    levels = [peak[Category.UNATTRIBUTED] + kept for peak, kept in zip(peaks, before, strict=False)]
    unclaimed = [max(0, levels[minute * len(levels) // MINUTES]) for minute in range(MINUTES)]
    kind = 'category="unattributed",component="outside",dtype="",moment="peak"'
    values = {
        f'memtrace_run_info{{{of_run},run="{run}",device="cpu",local_rank="0",world_size="1"}}': f"1x{MINUTES}",
        f"memtrace_run_start_timestamp_seconds{{{of_run}}}": f"0x{MINUTES}",
        f"memtrace_capacity_bytes{{{of_run}}}": f"{ROOM * max(peak.total_bytes for peak in peaks):.0f}x{MINUTES}",
        f"memtrace_memory_bytes{{{of_run},{kind}}}": " ".join(map(str, unclaimed)),
    }
    yield from ({"series": name, "values": value} for name, value in values.items())


def test_no_form_raises_the_alert_and_a_leak_does(records: Mapping[str, Sequence[StepRecord]], tmp_path: Path) -> None:
    """Evaluated by Prometheus's own tool with the shipped rules, at every tenth minute."""
    assert len(records) == sum(map(len, (FORMS, test_updates.FORMS, other_forms.LOOPS, test_further_loops.LOOPS))) + 3
    runs = {name: f"run{number}" for number, name in enumerate(records)}
    silent = [name for name in records if name != LEAK.name]
    fired = f'count(ALERTS{{alertname="{ALERT}",alertstate="firing"}})'
    of_the_leak = f'count(ALERTS{{alertname="{ALERT}",alertstate="firing",run="{runs[LEAK.name]}"}})'

    def expect(name: str, expression: str, times: range, samples: list[object]) -> dict[str, object]:
        return {
            "name": name,
            "interval": "1m",
            "input_series": [
                line
                for form in (silent if name == "silent" else [LEAK.name])
                for line in series(runs[form], records[form], keeps=form not in other_forms.KEEP_NOTHING)
            ],
            "promql_expr_test": [
                {"expr": expression, "eval_time": f"{minute}m", "exp_samples": samples} for minute in times
            ],
        }

    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            expect("silent", fired, range(60, MINUTES, 10), []),
            expect("leak", of_the_leak, range(150, 200, 10), [{"labels": "{}", "value": 1}]),
        ],
    }
    path = tmp_path / "forms.yml"
    path.write_text(yaml.safe_dump(document))
    result = promtool("test", "rules", str(path))
    assert result.returncode == 0, f"{runs}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"


def rows_of_the_page() -> Iterator[str]:
    """Yields the first cell of each row of the tables of loop forms and of what is beside them in docs/engines.md."""
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    section = page.partition("## Loop forms\n")[2].partition("## Around the model\n")[0]
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith(("| form |", "| --- |")):
            yield line.split("|")[1].strip()


def test_every_row_of_the_page_is_silent_or_says_why_not(records: Mapping[str, Sequence[StepRecord]]) -> None:
    """Its figures are among those that are evaluated, or a test holds what nobody claims below half of what raises the
    alert, or it has no figures."""
    (threshold,) = [
        float(line.partition("expr: vector(")[2].partition(")")[0])
        for line in RULES.read_text(encoding="utf-8").splitlines()
        if "memtrace_threshold:unattributed_growth:ratio, expr" in line
    ]
    assert threshold >= 2 * other_forms.UNCLAIMED
    for test in other_forms.BOUNDED.values():
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"{other_forms.UNCLAIMED} * peak" in text and f"def {name}" in text
    known = (*other_forms.BOUNDED, *other_forms.NOT_TRACED)
    found = [*rows_of_the_page()]
    assert len(found) > 40
    assert {form.name for form in FORMS} <= {row.rpartition(": ")[2] for row in found}, "a form without a row"
    for row in found:
        names = [row.rpartition(": ")[2], *(run for begin, run in other_forms.HERE.items() if row.startswith(begin))]
        is_run = any(run.startswith(name) for name in names for run in records)
        assert is_run or any(row.startswith(begin) for begin in known), row
