"""What the dashboards of one run have in common: variables, marks in time, links between them."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as words
from panels import ALARM, SOURCE, WATCH, highest_first, variable
from queries import RUN, fullest, of

from memtrace.record import metrics

HIDDEN = words.VariableHide.HIDE_VARIABLE
Panels = Sequence[board.Row | Builder[words.Panel]]
"""A row and the panels below it, as builders."""


def base(title: str, uid: str, description: str) -> board.Dashboard:
    """Returns a dashboard with what both have: variables, annotations, links between them."""
    of_job = 'memtrace_run_info{job=~"$job"}'
    of_run = 'memtrace_run_info{job=~"$job",run="$run"}'
    of_instance = 'memtrace_run_info{job=~"$job",run="$run",run_id=~"$run_id",instance=~"$instance"}'
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
        .with_variable(highest_first("run", "Run", f"max by (run) (min_over_time(timestamp({of_job})[$__range:1m]))"))
        .with_variable(
            highest_first(
                "run_id", "Launch", f"max by (run_id) (min_over_time(timestamp({of_run})[$__range:1m]))", multi=True
            )
        )
        .with_variable(variable("instance", "Instance", f"label_values({RUN}, instance)"))
        .with_variable(variable("rank", "Rank", f"label_values({of_instance}, rank)"))
        .with_variable(highest_first("fullest", "Fullest rank", fullest(), values_of="instance").hide(HIDDEN))
        .annotation(annotation("Out of memory", f"changes({of(metrics.OOMS)}[$__rate_interval:15s]) > 0", ALARM))
        .annotation(
            annotation(
                "Alerts",
                'ALERTS{alertname=~"Memtrace.*",alertstate="firing",job=~"$job",run="$run",run_id=~"$run_id|"}',
                WATCH,
            )
        )
    )


def annotation(name: str, expression: str, colour: str) -> board.AnnotationQuery:
    """Returns marks in time wherever an expression has a value."""
    return board.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour).expr(expression)


def filled(dashboard: board.Dashboard, panels: Panels) -> board.Dashboard:
    """Returns a dashboard with these rows and panels, in this order."""
    for panel in panels:
        dashboard = dashboard.with_row(panel) if isinstance(panel, board.Row) else dashboard.with_panel(panel)
    return dashboard
