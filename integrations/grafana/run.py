"""The dashboard of one run: is there room, what takes it, what is to come."""

from __future__ import annotations

import json
from urllib.parse import quote

from grafana_foundation_sdk.builders import dashboard as board
from page import Panels, base, filled
from panels import (
    ALARM,
    CALM,
    CAPACITY_COLOUR,
    FORECAST_COLOUR,
    HALF,
    NEUTRAL,
    PEAK_COLOUR,
    THIRD,
    WATCH,
    WIDE,
    graph,
    number,
    rows,
    scatter,
    transformation,
)
from queries import (
    by_category_with_total,
    chosen,
    composition,
    counted,
    highest,
    highest_of_capacity,
    host_memory,
    of,
    of_capacity,
    of_fullest,
    rate,
    selected,
    unused_share,
)

from memtrace.record import metrics
from memtrace.record.categories import COLOURS

COLOUR_OF = {category.value: colour for category, colour in COLOURS.items()}
PART_COLOURS = {
    "tensors": PEAK_COLOUR,
    "allocator slack": "#a9c9f7",
    "private pools": "#7a8fb8",
    "outside torch": "#c15c9a",
    "other processes": "#b0936b",
    "free": "#dfe5ec",
}

NOT_TOLD = "the driver does not tell, or the run is on a CPU"


def run_dashboard() -> board.Dashboard:
    """Returns the dashboard of one run: is there room, what takes it, what is to come."""
    made = base("memtrace / Run", "memtrace-run", "What the memory of one training run is for, and whether it will do.")
    return filled(made, (*glance(), *peak(), *forecast(), *below_the_tensors(), *memtrace_itself()))


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
            "Headroom at the peak",
            "Share of the capacity that the peak of a step leaves, on the fullest rank. What torch has cached counts "
            "as headroom.",
            (f"min(1 - {of_capacity(metrics.STEP_PEAK)})", "headroom"),
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
            "Forecast for the largest batch",
            "The peak that the largest batch to come is expected to have, as a share of the capacity.",
            (f"max({of_capacity(metrics.PREDICTED_PEAK)})", "forecast"),
            unit="percentunit",
            levels=[(None, CALM), (0.9, WATCH), (1.0, ALARM)],
        ),
        number(
            "Time until a leak fills the memory",
            "Only where persistent memory grows steadily.",
            (f"min({of(metrics.TIME_TO_LIMIT)})", "time to out-of-memory"),
            unit="s",
            levels=[(None, ALARM), (3600, WATCH), (86400, NEUTRAL)],
            none="no leak",
        ),
        number(
            "Ranks seen of expected",
            "How many ranks of the run are scraped, of those that it says that it has.",
            (f"count(count by (rank) ({of(metrics.UP)}))", "seen"),
            (f"max({of(metrics.WORLD_SIZE)})", "expected"),
            unit="none",
            levels=plain,
            none="no rank answers",
            now=True,
        ),
        number(
            "Time since the last step",
            "The rank that has waited longest.",
            (f"max(time() - {of(metrics.LAST_STEP)})", "since the last step"),
            unit="s",
            levels=[(None, NEUTRAL), (600, WATCH), (2700, ALARM)],
            none="no rank answers",
            now=True,
        ),
        number(
            "Steps an hour",
            "The pace of the slowest chosen rank.",
            (f"min({rate(metrics.STEPS)}) * 3600", "steps"),
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
            width=HALF,
            colours=COLOUR_OF | {"capacity": CAPACITY_COLOUR},
            stacked=True,
            lines=["capacity"],
        ),
        rows(
            "Plan against measured",
            "At the peak of the newest step of the fullest chosen rank, by category and in all; the difference is "
            "measured minus planned.",
            [(planned, "planned"), (measured, "measured"), (difference, "difference")],
            unit="bytes",
            width=HALF,
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
    """Returns the row of what is forecast: the largest batch, and growth."""
    expected, band = selected(metrics.PREDICTED_PEAK), selected(metrics.PREDICTED_PEAK_BAND)
    return [
        board.Row("What is to come"),
        graph(
            "Headroom at the peak, and risk",
            "Share of the capacity that the highest peak leaves on the fullest rank; highest risk of the chosen ranks.",
            [
                (f"1 - max({highest_of_capacity()})", "headroom"),
                (f"max({of(metrics.OOM_RISK)})", "risk"),
            ],
            unit="percentunit",
            width=WIDE,
            colours={"headroom": CALM, "risk": ALARM},
            top=1,
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
            "Persistent memory",
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
            "Memory of the device",
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
            width=HALF,
            colours={"retries": WATCH, "out of memory": ALARM},
            columns=True,
        ),
        graph(
            "Fragmentation: reserved, but unused",
            "Share of what torch holds of the device that the peaks do not use, on the rank that wastes most; private "
            "pools are not counted.",
            [(f"max({unused_share()})", "unused")],
            unit="percentunit",
            width=THIRD,
            colours={"unused": NEUTRAL},
        ),
        graph(
            "Memory of each process",
            "What each rank's process holds of its GPU; on a CPU of the host's memory, its resident set. The dashed "
            "line is all that there is.",
            [
                (f"max by (rank) ({of(metrics.DEVICE_PROCESS)})", "rank {{rank}}"),
                (f"max({of(metrics.DEVICE_TOTAL)})", "total"),
            ],
            unit="bytes",
            width=THIRD,
            colours={"total": CAPACITY_COLOUR},
            lines=["total"],
        ),
        graph(
            "Host memory in use",
            "Share of the memory of each host of the chosen ranks that is in use, by node_exporter on that host. The "
            "kernel ends processes where it runs out: data loader workers, pinned memory, offloaded states.",
            [(host_memory(), "{{host}}")],
            unit="percentunit",
            width=THIRD,
            top=1,
            none="no node_exporter on the hosts of these ranks",
        ),
        graph(
            "Power",
            "By rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_POWER)})", "rank {{rank}}")],
            unit="watt",
            width=THIRD,
            none=NOT_TOLD,
        ),
        graph(
            "Temperature",
            "By rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_TEMPERATURE)})", "rank {{rank}}")],
            unit="celsius",
            width=THIRD,
            none=NOT_TOLD,
        ),
        graph(
            "Utilisation",
            "Share of time in which a kernel ran, by rank.",
            [(f"max by (rank) ({of(metrics.DEVICE_UTILIZATION)})", "rank {{rank}}")],
            unit="percentunit",
            width=THIRD,
            none=NOT_TOLD,
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
                (f"max({rate(metrics.SELF_SECONDS)} + {rate(metrics.SLOWED_SECONDS)})", "share of time"),
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
