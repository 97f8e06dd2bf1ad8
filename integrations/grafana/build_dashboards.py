"""Writes the dashboards: `python integrations/grafana/build_dashboards.py [DIRECTORY]`.

Needs `grafana-foundation-sdk==1769699379!11.6.0`; the JSON works in Grafana 11.6 and later. Names, labels, order and
colours come from the vocabulary and the metric catalogue of memtrace.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from fleet import fleet_dashboard
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as words
from panels import (
    ALARM,
    CALM,
    CAPACITY_COLOUR,
    FORECAST_COLOUR,
    HALF,
    NEUTRAL,
    PEAK_COLOUR,
    SOURCE,
    THIRD,
    WATCH,
    WIDE,
    bars,
    graph,
    newest_first,
    number,
    rows,
    scatter,
    transformation,
    variable,
)
from queries import (
    RUN,
    by_category_with_total,
    chosen,
    composition,
    counted,
    highest,
    highest_of_capacity,
    of,
    of_capacity,
    of_fullest,
    of_highest,
    rate,
    selected,
    unused_share,
)

from memtrace import metrics
from memtrace.categories import COLOURS, Category

Panels = Sequence[board.Row | Builder[words.Panel]]
"""A row and the panels below it, as builders."""

HERE = Path(__file__).resolve().parent
COLOUR_OF = {category.value: colour for category, colour in COLOURS.items()}
PART_COLOURS = {
    "tensors": PEAK_COLOUR,
    "allocator slack": "#a9c9f7",
    "private pools": "#7a8fb8",
    "outside torch": "#c15c9a",
    "other processes": "#b0936b",
    "free": "#dfe5ec",
}


def base(title: str, uid: str, description: str) -> board.Dashboard:
    """Returns a dashboard with what both have: variables, annotations, links between them."""
    of_job = 'memtrace_run_info{job=~"$job"}'
    of_instance = 'memtrace_run_info{job=~"$job",run=~"$run",instance=~"$instance"}'
    return (
        board.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["memtrace"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(words.DashboardCursorSync.CROSSHAIR)
        .link(
            board.DashboardLink("memtrace")
            .type(words.DashboardLinkType.DASHBOARDS)
            .tags(["memtrace"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(board.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Job", "label_values(memtrace_run_info, job)"))
        .with_variable(newest_first("run", "Run", f"max by (run) (min_over_time(timestamp({of_job})[$__range:1m]))"))
        .with_variable(variable("instance", "Instance", f"label_values({RUN}, instance)"))
        .with_variable(variable("rank", "Rank", f"label_values({of_instance}, rank)"))
        .annotation(annotation("Out of memory", f"changes({of(metrics.OOMS)}[$__rate_interval:15s]) > 0", ALARM))
        .annotation(
            annotation("Alerts", 'ALERTS{alertname=~"Memtrace.*",alertstate="firing",job=~"$job",run=~"$run"}', WATCH)
        )
    )


def annotation(name: str, expression: str, colour: str) -> board.AnnotationQuery:
    """Returns marks in time wherever an expression has a value."""
    return board.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour).expr(expression)


def run_dashboard() -> board.Dashboard:
    """Returns the dashboard of one run: is there room, what takes it, what is to come."""
    made = base("memtrace / Run", "memtrace-run", "What the memory of one training run is for, and whether it will do.")
    for panel in (*glance(), *peak(), *forecast(), *below_the_tensors(), *memtrace_itself()):
        made = made.with_row(panel) if isinstance(panel, board.Row) else made.with_panel(panel)
    return made


def glance() -> Panels:
    """Returns the row of single figures."""
    risk = [(None, CALM), (0.25, WATCH), (0.5, ALARM)]
    left = [(None, ALARM), (0.05, WATCH), (0.15, CALM)]
    plain = [(None, NEUTRAL)]
    return [
        board.Row("At a glance"),
        number(
            "Out-of-memory risk",
            "The highest of the chosen ranks. From one half on the run is more likely than not to fail.",
            (f"max({of(metrics.OOM_RISK)})", "risk"),
            unit="percentunit",
            levels=risk,
        ),
        number(
            "Left at the peak",
            "Share of the capacity that the peak of a step leaves, on the fullest rank. Cached memory counts as left.",
            (f"min(1 - {of_capacity(metrics.STEP_PEAK)})", "left"),
            unit="percentunit",
            levels=left,
        ),
        number(
            "Peak of a step",
            "The highest of the chosen ranks.",
            (f"max({highest(metrics.STEP_PEAK)})", "peak"),
            unit="bytes",
            levels=plain,
        ),
        number(
            "Largest batch to come",
            "What the largest batch to come is expected to take, as a share of the capacity.",
            (f"max({of_capacity(metrics.PREDICTED_PEAK)})", "expected"),
            unit="percentunit",
            levels=[(None, CALM), (0.9, WATCH), (1.0, ALARM)],
        ),
        number(
            "A leak fills the rest in",
            "Only where what outlives steps grows steadily.",
            (f"min({of(metrics.TIME_TO_LIMIT)})", "time left"),
            unit="s",
            levels=[(None, ALARM), (3600, WATCH), (86400, NEUTRAL)],
            none="no leak",
        ),
        number(
            "Ranks seen",
            "How many ranks of the run are scraped, of those that it has.",
            (f"count(count by (rank) ({of(metrics.UP)}))", "seen"),
            unit="none",
            levels=plain,
        ),
        number(
            "Ranks expected",
            "How many ranks the run says that it has.",
            (f"max({of(metrics.WORLD_SIZE)})", "expected"),
            unit="none",
            levels=plain,
        ),
        number(
            "Since the last step",
            "The rank that has waited longest.",
            (f"max(time() - {of(metrics.LAST_STEP)})", "since the last step"),
            unit="s",
            levels=[(None, NEUTRAL), (600, WATCH), (2700, ALARM)],
        ),
        number(
            "Steps an hour",
            "The pace of the slowest chosen rank.",
            (f"min({chosen(rate(metrics.STEPS))}) * 3600", "steps"),
            unit="none",
            levels=plain,
        ),
    ]


def peak() -> Panels:
    """Returns the row of the peak: its composition, and the plan beside it."""
    planned = by_category_with_total(of_fullest(metrics.PLAN))
    measured = by_category_with_total(of_fullest(metrics.MEMORY, moment="peak"))
    difference = f"({measured} or 0 * ({planned})) - (({planned}) or 0 * ({measured})) and on () ({planned})"
    return [
        board.Row("What the peak is made of"),
        graph(
            "Composition of the peak",
            "On the fullest of the chosen ranks, at the moment of a step at which most is allocated. The dashed line "
            "is what tensors may take in all.",
            [*composition("peak"), (f"max({of_fullest(metrics.CAPACITY)})", "capacity")],
            unit="bytes",
            width=16,
            colours=COLOUR_OF | {"capacity": CAPACITY_COLOUR},
            stacked=True,
            lines=["capacity"],
        ),
        rows(
            "Plan against measured",
            "At the peak of the fullest chosen rank, by category and in all; the difference is measured minus planned.",
            [(planned, "planned"), (measured, "measured"), (difference, "difference")],
            unit="bytes",
            width=8,
            transformations=[
                transformation("merge"),
                transformation(
                    "organize",
                    excludeByName={"Time": True},
                    renameByName={"Value #A": "planned", "Value #B": "measured", "Value #C": "difference"},
                ),
            ],
        ),
    ]


def forecast() -> Panels:
    """Returns the row of what is foreseen: the largest batch, and growth."""
    expected, band = selected(metrics.PREDICTED_PEAK), selected(metrics.PREDICTED_PEAK_BAND)
    return [
        board.Row("What is to come"),
        graph(
            "Left at the peak, and risk",
            "Share of the capacity that the highest peak leaves on the fullest rank; highest risk of the chosen ranks.",
            [
                (f"1 - max({highest_of_capacity()})", "left"),
                (f"max({of(metrics.OOM_RISK)})", "risk"),
            ],
            unit="percentunit",
            width=WIDE,
            colours={"left": CALM, "risk": ALARM},
        ),
        graph(
            "Forecast against capacity",
            "Expected peak of the largest batch to come with its 95 % band, and the peaks so far; the highest of the "
            "chosen ranks.",
            [
                (f"max({highest(metrics.STEP_PEAK)})", "peak of a step"),
                (f"max({chosen(expected)})", "expected"),
                (f"max({chosen(f'{expected} + {band}')})", "expected, upper"),
                (f"max({chosen(f'{expected} - {band}')})", "expected, lower"),
                (f"min({of(metrics.CAPACITY)})", "capacity"),
            ],
            unit="bytes",
            width=THIRD,
            colours={
                "peak of a step": PEAK_COLOUR,
                "expected": FORECAST_COLOUR,
                "expected, upper": "#f2d79b",
                "expected, lower": "#f2d79b",
                "capacity": CAPACITY_COLOUR,
            },
            lines=["capacity"],
        ),
        scatter(
            "Peak against tokens",
            "Each point is a step of the fullest chosen rank: the tokens of its largest micro batch, and its peak. "
            "Points on a line: the batch decides the peak. Points above it: something else does.",
            (f"max({of_fullest(metrics.STEP_PEAK_TOKENS)})", "tokens of the largest micro batch"),
            (f"max({of_fullest(metrics.STEP_PEAK)})", "peak of a step"),
            units=("short", "bytes"),
            colour=PEAK_COLOUR,
        ),
        graph(
            "What outlives steps",
            "At the end of a step, on the fullest of the chosen ranks. A steady rise is a leak.",
            composition("step_end"),
            unit="bytes",
            width=THIRD,
            colours=COLOUR_OF,
            stacked=True,
        ),
    ]


def below_the_tensors() -> Panels:
    """Returns the row of the allocator and the device."""
    parts = {
        "tensors": metrics.ALLOCATED,
        "allocator slack": metrics.SLACK,
        "private pools": metrics.PRIVATE_POOL,
        "outside torch": metrics.NON_TORCH,
        "other processes": metrics.DEVICE_OTHERS,
        "free": metrics.DEVICE_FREE,
    }
    return [
        board.Row("Allocator and device"),
        graph(
            "The device",
            "What the fullest chosen rank's device holds, at the ends of steps. Slack is what torch can use again; "
            "what CUDA graphs hold in private pools, nobody else can. "
            "The series of DCGM exporter for the same device are a click on a legend away.",
            [(f"max by (gpu_uuid) ({of_fullest(metric)})", name) for name, metric in parts.items()],
            unit="bytes",
            colours=PART_COLOURS,
            stacked=True,
        ).data_links([dcgm_link()]),
        graph(
            "Retries and failures of the allocator",
            "Allocations that worked only after the cache was given back, and those that failed; in the time that a "
            "column stands for, a minute or more.",
            [(counted(metrics.RETRIES), "retries"), (counted(metrics.OOMS), "out of memory")],
            unit="short",
            width=6,
            colours={"retries": WATCH, "out of memory": ALARM},
            columns=True,
        ),
        graph(
            "Reserved by torch and used by no peak",
            "Share of what torch holds of the device that the peaks do not use, on the rank that wastes most; private "
            "pools are not counted.",
            [(f"max({unused_share()})", "unused")],
            unit="percentunit",
            width=6,
            colours={"unused": NEUTRAL},
        ),
        graph(
            "Power",
            "By rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_POWER)})", "rank {{rank}}")],
            unit="watt",
            width=6,
        ),
        graph(
            "Temperature",
            "By rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_TEMPERATURE)})", "rank {{rank}}")],
            unit="celsius",
            width=6,
        ),
        graph(
            "Utilisation",
            "Share of time in which a kernel ran, by rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_UTILIZATION)})", "rank {{rank}}")],
            unit="percentunit",
            width=6,
        ),
    ]


def dcgm_link() -> board.DashboardLink:
    """Returns a link to what DCGM exporter says of the fullest rank's device, found by its UUID."""
    query = {"refId": "A", "expr": 'DCGM_FI_DEV_FB_USED{UUID="${__field.labels.gpu_uuid}"}'}
    pane = {
        "datasource": "${datasource}",
        "queries": [query],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    panes = quote(json.dumps({"a": pane}), safe="${}")
    return board.DashboardLink("DCGM exporter").url(f"/explore?schemaVersion=1&panes={panes}").target_blank(True)


def memtrace_itself() -> Panels:
    """Returns the row of what memtrace costs and how fresh its figures are."""
    return [
        board.Row("memtrace itself"),
        graph(
            "What memtrace costs",
            "Share of wall time, memtrace's own and that of slower steps. The budget is 0.5 % unless set otherwise.",
            [
                (
                    f"max({chosen(f'{rate(metrics.SELF_SECONDS)} + {rate(metrics.SLOWED_SECONDS)}')})",
                    "share of time",
                )
            ],
            unit="percentunit",
            width=HALF,
            colours={"share of time": NEUTRAL},
        ),
        graph(
            "Age of the last exact breakdown",
            "Time since the last traced step; the oldest of the chosen ranks.",
            [(f"max(time() - {of(metrics.LAST_TRACED_STEP)})", "age")],
            unit="s",
            width=HALF,
            colours={"age": NEUTRAL},
        ),
    ]


def ranks_dashboard() -> board.Dashboard:
    """Returns the dashboard that compares the ranks of a run."""
    share = [(None, CALM), (0.85, WATCH), (0.95, ALARM)]
    made = base("memtrace / Ranks", "memtrace-ranks", "How the ranks of one training run differ in memory and pace.")
    panels: Panels = [
        board.Row("Spread over the ranks"),
        graph(
            "Peak over the ranks",
            "Highest, middle and lowest peak of the chosen ranks, against the smallest capacity.",
            [
                (f"max({highest(metrics.STEP_PEAK)})", "highest"),
                (f"quantile(0.5, {of(metrics.STEP_PEAK)})", "median"),
                (f"min({of(metrics.STEP_PEAK)})", "lowest"),
                (f"min({of(metrics.CAPACITY)})", "capacity"),
            ],
            unit="bytes",
            colours={"highest": FORECAST_COLOUR, "median": PEAK_COLOUR, "lowest": CALM, "capacity": CAPACITY_COLOUR},
            lines=["capacity"],
        ),
        graph(
            "Ranks that lag behind",
            "Time between the newest step of any rank and that of the slowest five.",
            [
                (
                    f"scalar(max({of(metrics.LAST_STEP)})) - bottomk(5, max by (rank) ({of(metrics.LAST_STEP)}))",
                    "rank {{rank}}",
                )
            ],
            unit="s",
        ),
        board.Row("The worst ranks"),
        bars(
            "Fullest ranks",
            "By number of the rank: its peak as a share of the capacity; at most sixteen.",
            (f"sort_desc(topk(16, max by (rank) ({of_capacity(metrics.STEP_PEAK)})))", "{{rank}}"),
            levels=share,
        ),
        bars(
            "Highest risks",
            "By number of the rank: its risk to run out of memory; at most sixteen.",
            (f"sort_desc(topk(16, max by (rank) ({of(metrics.OOM_RISK)})))", "{{rank}}"),
            levels=[(None, CALM), (0.25, WATCH), (0.5, ALARM)],
        ),
        board.Row("Each rank"),
        rows(
            "Composition of each rank's peak",
            "At most 64 ranks, those with the highest peaks.",
            [
                (f"sum by (rank, category) ({of_highest(64, metrics.MEMORY, moment='peak')})", ""),
            ],
            unit="bytes",
            width=WIDE,
            transformations=[
                transformation(
                    "groupingToMatrix", rowField="rank", columnField="category", valueField="Value", emptyValue="zero"
                ),
                transformation(
                    "organize",
                    indexByName={"rank\\category": 0, **{c.value: i for i, c in enumerate(Category, 1)}},
                    renameByName={"rank\\category": "rank"},
                ),
            ],
        ),
    ]
    for panel in panels:
        made = made.with_row(panel) if isinstance(panel, board.Row) else made.with_panel(panel)
    return made


DASHBOARDS = {
    "memtrace-fleet.json": fleet_dashboard,
    "memtrace-run.json": run_dashboard,
    "memtrace-ranks.json": ranks_dashboard,
}


def main(directory: Path) -> None:
    """Writes the JSON of each dashboard; panels are numbered, so that Grafana keeps links to them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        dashboard = make().build()
        for position, panel in enumerate(dashboard.panels or (), 1):
            panel.id_val = position
        text = json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True)
        (directory / name).write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
