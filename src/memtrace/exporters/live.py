"""The metrics of one rank as a view for a terminal: what the last scrape says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memtrace.errors import LogFormatError
from memtrace.exporters.table import CompositionBar, Scale, category_name, printable
from memtrace.record import metrics
from memtrace.record.categories import Category, Moment
from memtrace.record.metric import Metric
from memtrace.record.metrics import EXPORTED_MOMENTS
from memtrace.record.snapshot import RunState
from memtrace.record.units import format_bytes
from memtrace.risk import WARN_AT


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """The samples of one scrape."""

    samples: Mapping[str, list[tuple[Mapping[str, str], float]]]
    """Labels and value of each sample, by name of the metric."""

    def value(self, metric: Metric) -> float | None:
        """Returns the value of a metric without labels of its own; None where it has no series."""
        found = self.samples.get(metric.name)
        return found[0][1] if found else None

    def label(self, metric: Metric, name: str) -> str:
        """Returns a label of the first series of a metric; empty where there is none."""
        found = self.samples.get(metric.name)
        return found[0][0].get(name, "") if found else ""

    def by_category(self, moment: Moment) -> dict[Category, int]:
        """Returns the bytes of each category at a moment, in the order of `Category`."""
        totals: dict[str, int] = {}
        for labels, size in self.samples.get(metrics.MEMORY.name, []):
            if labels.get("moment") == moment:
                category = labels.get("category", "")
                totals[category] = totals.get(category, 0) + int(size)
        return {category: totals[category] for category in Category if category in totals}


def parse_scrape(text: str, source: str) -> Scrape:
    """Returns the samples of a text in the exposition format.

    Raises:
        LogFormatError: the text is not in that format, or has no metric of memtrace.
    """
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except ValueError as error:
        raise LogFormatError(f"{source}: must serve metrics in the text format, but {error}") from error
    up = metrics.UP.name
    if up not in samples:
        raise LogFormatError(f"{source}: there is no {up}; is this the address of a trainer with memtrace?")
    return Scrape(samples=samples)


def live_view(scrape: Scrape) -> RenderableType:
    """Returns what a scrape says, as a rich renderable: the run, its risk, its composition, its memory."""
    peak = scrape.by_category(Moment.PEAK) or scrape.by_category(Moment.STEP_END)
    parts: list[RenderableType] = [Text(" · ".join(_headline(scrape)), "bold"), _verdict(scrape)]
    if peak:
        parts += [CompositionBar(peak), "", _composition(scrape), ""]
    parts.append(_figures(scrape))
    return Group(*parts)


def _headline(scrape: Scrape) -> Iterator[str]:
    yield printable(scrape.label(metrics.RUN_INFO, "run")) or "run"
    yield f"rank {printable(scrape.label(metrics.UP, 'rank'))}"
    yield printable(scrape.label(metrics.RUN_INFO, "device")) or "device not known"
    steps, traced = scrape.value(metrics.STEPS), scrape.value(metrics.TRACED_STEPS)
    if steps is not None and traced is not None:
        yield f"{steps:.0f} steps, {traced:.0f} traced"
    overhead = scrape.value(metrics.OVERHEAD)
    if overhead is not None:
        yield f"memtrace costs {overhead:.2%}"


def _verdict(scrape: Scrape) -> Text:
    """Returns one line: how the run has ended, or whether memtrace is at work and what it forecasts."""
    state = scrape.label(metrics.RUN_STATE, "state")
    if state in set(RunState) - {RunState.RUNNING}:
        return Text(f"the run has {RunState(state).words}; figures are as of its end", "yellow")
    if not scrape.value(metrics.UP):
        return Text("memtrace has switched itself off; the training log says why", "yellow")
    risk, left = scrape.value(metrics.OOM_RISK), scrape.value(metrics.TIME_TO_LIMIT)
    if risk is None:
        return Text("no forecast yet", "dim")
    words = f"risk to run out of memory {risk:.0%}"
    if left is not None:
        words += f", a leak fills the rest in {left / 60:.0f} min"
    return Text(words, "bold red" if risk >= WARN_AT else "green")


def _composition(scrape: Scrape) -> Table:
    sizes = {moment: scrape.by_category(moment) for moment in EXPORTED_MOMENTS}
    largest = max(sum(found.values()) for found in sizes.values())
    scale = Scale(largest)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(f"sizes in {scale.unit}", min_width=20)
    for moment in EXPORTED_MOMENTS:
        table.add_column(moment.replace("_", " "), justify="right", min_width=10)
    for category in Category:
        row = [sizes[moment].get(category, 0) for moment in EXPORTED_MOMENTS]
        if any(row):
            table.add_row(category_name(category), *(scale.cell(size) for size in row))
    return table


def _figures(scrape: Scrape) -> Text:
    shown = {
        "peak of a step": metrics.STEP_PEAK,
        "largest batch to come": metrics.PREDICTED_PEAK,
        "capacity": metrics.CAPACITY,
        "headroom now": metrics.HEADROOM,
        "reserved": metrics.RESERVED,
        "outside torch": metrics.NON_TORCH,
    }
    known = {words: scrape.value(metric) for words, metric in shown.items()}
    return Text(" · ".join(f"{words} {format_bytes(size)}" for words, size in known.items() if size is not None))
