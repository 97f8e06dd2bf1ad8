"""The metric catalogue keeps the rules of Prometheus, and the documentation page is made from it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from memtrace.record.metric import Metric, MetricType, Unit
from memtrace.record.metrics import CATALOGUE, IDENTITY_LABELS

DOCS = Path(__file__).parents[2] / "docs"

each = pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)


def test_names_are_unique() -> None:
    """No metric is listed twice."""
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)


@each
def test_names_say_type_and_unit(metric: Metric) -> None:
    """A counter ends in `_total`, information in `_info`, and anything else in its unit where it has one."""
    assert re.fullmatch(r"memtrace_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.type is MetricType.COUNTER)
    assert metric.name.endswith("_info") == (metric.type is MetricType.INFO)
    bare = metric.name.removesuffix("_total")
    assert metric.unit is Unit.NONE or bare.endswith(f"_{metric.unit}")
    assert metric.unit is not Unit.NONE or not re.search(r"_(bytes|seconds|ratio|watts|celsius)$", bare)


@each
def test_help_is_a_sentence(metric: Metric) -> None:
    """HELP lines begin with a capital or a figure, end with a stop and stay on one line."""
    assert re.fullmatch(r"[A-Z0-9][^\n]*\.", metric.help)
    assert not metric.absent.endswith(".")


@each
def test_labels_keep_the_cardinality_low(metric: Metric) -> None:
    """No label names a step, a tensor, a layer or a process, and none is one of those of every series."""
    assert not {"step", "tensor", "layer", "parameter", "pid", "name"} & set(metric.labels)
    assert not set(IDENTITY_LABELS) & set(metric.labels)


def test_the_page_is_up_to_date() -> None:
    """docs/metrics.md is what docs/build_metrics.py makes of the catalogue."""
    page = runpy.run_path(str(DOCS / "build_metrics.py"))["render"]()
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == page, "run python docs/build_metrics.py"
