"""PromQL over what the variables of a dashboard choose: the building blocks of its queries."""

from __future__ import annotations

from memtrace import metrics
from memtrace.categories import Category
from memtrace.metric import Metric

RANK = "job, instance, rank"
SELECTOR = 'job=~"$job",instance=~"$instance",rank=~"$rank"'
RUN = 'memtrace_run_info{job=~"$job",run=~"$run"}'


def selected(metric: Metric, **labels: str) -> str:
    """Returns the series of a metric that the variables select, of any run."""
    more = "".join(f',{name}="{value}"' for name, value in labels.items())
    return f"{metric.name}{{{SELECTOR}{more}}}"


def chosen(expression: str) -> str:
    """Returns what of an expression belongs to the ranks of the run that were chosen.

    A choice reads one more series of every rank and joins the two: a query makes one, around everything.
    """
    return f"({expression} and on ({RANK}) {RUN})"


def of(metric: Metric, **labels: str) -> str:
    """Returns the series of a metric for the ranks of the run that were chosen."""
    return chosen(selected(metric, **labels))


def of_fullest(metric: Metric, **labels: str) -> str:
    """Returns the series of a metric for one of the chosen ranks: that with the highest peak of the time shown."""
    peaks = f"max_over_time({selected(metrics.STEP_PEAK)}[$__range] @ end())"
    fullest = f"topk(1, {peaks} and on ({RANK}) last_over_time({RUN}[$__range] @ end()))"
    return f"({selected(metric, **labels)} and on ({RANK}) {fullest})"


def of_highest(ranks: int, metric: Metric, **labels: str) -> str:
    """Returns the series of a metric for so many of the chosen ranks: those with the highest peaks now."""
    return f"({selected(metric, **labels)} and on ({RANK}) topk({ranks}, {of(metrics.STEP_PEAK)}))"


def composition(moment: str) -> list[tuple[str, str]]:
    """Returns one query a category, in the stacking order; 0 where the rank holds none of it."""
    none = f"0 * max({of_fullest(metrics.STEP_PEAK)})"
    return [
        (f"sum({of_fullest(metrics.MEMORY, category=category, moment=moment)}) or {none}", category.value)
        for category in Category
    ]


def rate(metric: Metric) -> str:
    """Returns the growth of a counter a second, of any run."""
    return f"rate({selected(metric)}[$__rate_interval])"


def counted(metric: Metric) -> str:
    """Returns how often something happened between two points of a graph, on the chosen ranks; a whole number.

    A rate extrapolates, so that one event comes out as a little more or less than one.
    """
    return f"sum(round({rate(metric)} * $__interval_ms / 1000))"


def of_capacity(metric: Metric) -> str:
    """Returns a metric as a share of the capacity, for each chosen rank."""
    return chosen(f"{selected(metric)} / ({selected(metrics.CAPACITY)} > 0)")
