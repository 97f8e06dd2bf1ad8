"""PromQL over what the variables of a dashboard choose: the building blocks of its queries."""

from __future__ import annotations

from memtrace.record import metrics
from memtrace.record.categories import Category
from memtrace.record.metric import Metric

RANK = "job, instance, rank"
SELECTOR = 'job=~"$job",instance=~"$instance",rank=~"$rank"'
RUN = 'memtrace_run_info{job=~"$job",run="$run",run_id=~"$run_id"}'
"""One run's name is chosen, as it is; Grafana writes the other variables as regular expressions."""


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
    """Returns the series of a metric for the rank that the variable `fullest` names by its instance."""
    return of(metric, **labels).replace('instance=~"$instance"', 'instance="$fullest"')


def fullest() -> str:
    """Returns the chosen rank with the highest peak of the time shown; what other runs have had on its port is not it.

    Of ranks that are equally full the first one by name, each time: an operation keeps the order of its left side, and
    series that are read are in the order of their labels.
    """
    in_order = f"0 * max by (instance) (last_over_time({selected(metrics.STEP_PEAK)}[$__range]))"
    peaks = f"max by (instance) (max_over_time({of(metrics.STEP_PEAK)}[$__range:15s]))"
    return f"topk(1, {in_order} + on (instance) {peaks})"


def of_highest(ranks: int, metric: Metric, **labels: str) -> str:
    """Returns the series of a metric for so many of the chosen ranks: those with the highest peaks now."""
    return f"({selected(metric, **labels)} and on ({RANK}) topk({ranks}, {of(metrics.STEP_PEAK)}))"


def highest(metric: Metric) -> str:
    """Returns the highest value of a metric between two points of a graph, for each chosen rank of the run."""
    return f"max_over_time({of(metric)}[$__interval:15s])"


def composition(moment: str) -> list[tuple[str, str]]:
    """Returns one query a category, in the stacking order; no series where the rank holds none of it."""
    return [
        (f"sum({of_fullest(metrics.MEMORY, category=category, moment=moment)}) > 0", category.value)
        for category in Category
    ]


def by_category_with_total(expression: str) -> str:
    """Returns the sums by category, and their total as one more."""
    total = f'label_replace(sum({expression}), "category", "total", "", "")'
    return f"sum by (category) ({expression}) or {total}"


def rate(metric: Metric) -> str:
    """Returns the growth of a counter a second, for each chosen rank, within the run alone."""
    return chosen(f"rate({of(metric)}[$__rate_interval:15s])")


def counted(metric: Metric) -> str:
    """Returns how often something happened between two points of a graph, on the chosen ranks; a whole number.

    A rate extrapolates, so that one event comes out as a little more or less than one.
    """
    lately = f"{of(metric)}[$__interval:15s]"
    before = f"last_over_time({of(metric)}[15s:15s] offset $__interval)"
    return f"sum(clamp_min(max_over_time({lately}) - ({before} or min_over_time({lately})), 0))"


def of_capacity(metric: Metric) -> str:
    """Returns a metric as a share of the capacity, for each chosen rank."""
    return chosen(f"{selected(metric)} / ({selected(metrics.CAPACITY)} > 0)")


def highest_of_capacity() -> str:
    """Returns the highest share of the capacity that a peak took between two points of a graph, by chosen rank."""
    return f"max_over_time({of_capacity(metrics.STEP_PEAK)}[$__interval:15s])"


def unused_share() -> str:
    """Returns the share of what torch has reserved, private pools apart, that the peak does not use."""
    reserved, pools = selected(metrics.RESERVED), selected(metrics.PRIVATE_POOL)
    held = f"({reserved} - ({pools} or 0 * {reserved}) > 0)"
    return f"clamp_min(1 - {highest(metrics.STEP_PEAK)} / on ({RANK}) {chosen(held)}, 0)"


def host_memory() -> str:
    """Returns the share of memory in use of each host of the chosen ranks, as node_exporter tells it."""
    used = "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"
    return f"max by (host) ({_with_host(used)}) and on (host) {_with_host(RUN)}"


def _with_host(expression: str) -> str:
    """Returns an expression with the label `host`, the address of each target without its port."""
    return f'label_replace({expression}, "host", "$1", "instance", "(.*):[0-9]+")'
