"""The dashboard that compares the ranks of a run."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board
from page import Panels, base, filled
from panels import (
    ALARM,
    CALM,
    CAPACITY_COLOUR,
    FORECAST_COLOUR,
    PEAK_COLOUR,
    WATCH,
    WIDE,
    bars,
    graph,
    rows,
    transformation,
)
from queries import (
    highest,
    of,
    of_capacity,
    of_highest,
)

from memtrace.record import metrics
from memtrace.record.categories import Category


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
    return filled(made, panels)
