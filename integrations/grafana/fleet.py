"""The dashboard of all runs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import table
from panels import WIDE, graph, rows, transformation, variable

from memtrace import metrics


def fleet_dashboard() -> board.Dashboard:
    """Returns the dashboard of all runs: which are in danger, and which alerts fire."""
    made = (
        board.Dashboard("memtrace / Fleet")
        .uid("memtrace-fleet")
        .description("All runs by risk: how much memory is left, whether ranks are missing, whether steps go on.")
        .tags(["memtrace"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(board.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Job", "label_values(memtrace_run_info, job)"))
    )
    by_run, of_run = "by (job, run)", 'job=~"$job"'
    name = f"on (job, instance, rank) group_left (run) memtrace_run_info{{{of_run}}}"
    share = f"{metrics.STEP_PEAK.name}{{{of_run}}} / ({metrics.CAPACITY.name}{{{of_run}}} > 0)"
    columns = {
        "risk": f"max {by_run} ({metrics.OOM_RISK.name}{{{of_run}}} * {name})",
        "left at the peak": f"1 - max {by_run} ({share} * {name})",
        "since the last step": f"max {by_run} ((time() - {metrics.LAST_STEP.name}{{{of_run}}}) * {name})",
        "ranks seen": f"count {by_run} (count by (job, run, rank) (memtrace_run_info{{{of_run}}}))",
        "ranks expected": f"max {by_run} ({metrics.WORLD_SIZE.name}{{{of_run}}} * {name})",
        "alerts firing": f'count {by_run} (ALERTS{{alertname=~"Memtrace.*",alertstate="firing",{of_run}}})',
    }
    panels = [
        board.Row("Runs"),
        fleet_table(columns),
        rows(
            "Firing alerts",
            "What fires now. A click leads to its words, and to the address of the runbook.",
            [(f'ALERTS{{alertname=~"Memtrace.*",alertstate="firing",{of_run}}}', "")],
            unit="none",
            width=WIDE,
            transformations=[
                transformation("organize", excludeByName={"Time": True, "Value": True, "alertstate": True})
            ],
            none="nothing fires",
            links={"alertname": runbook_link()},
        ),
        board.Row("Over time"),
        graph(
            "Left at the peak",
            "Share of the capacity, of the fullest rank of each run.",
            [(columns["left at the peak"], "{{run}}")],
            unit="percentunit",
        ),
        graph(
            "Out-of-memory risk",
            "The highest of the ranks of each run.",
            [(columns["risk"], "{{run}}")],
            unit="percentunit",
        ),
    ]
    for panel in panels:
        made = made.with_row(panel) if isinstance(panel, board.Row) else made.with_panel(panel)
    return made


def fleet_table(columns: dict[str, str]) -> table.Panel:
    """Returns the table of all runs, the highest risk first; a click on a run leads to its dashboard."""
    named = {f"Value #{letter}": column for letter, column in zip("ABCDEF", columns, strict=True)}
    return rows(
        "Runs by risk",
        "Each run that is scraped, with its worst rank.",
        [(expression, "") for expression in columns.values()],
        unit="none",
        width=WIDE,
        transformations=[
            transformation("merge"),
            transformation("organize", excludeByName={"Time": True}, renameByName=named),
            transformation("sortBy", sort=[{"field": "risk", "desc": True}]),
        ],
        units={"risk": "percentunit", "left at the peak": "percentunit", "since the last step": "s"},
        links={"run": run_link()},
    )


def run_link() -> dict[str, object]:
    """Returns a link to the dashboard of the run in a row."""
    url = "/d/memtrace-run?var-job=${__data.fields.job}&var-run=${__data.fields.run}&${__url_time_range}"
    return {"title": "The run", "url": url}


def runbook_link() -> dict[str, object]:
    """Returns a link to the alerts that fire, where each has its section of the runbook."""
    return {"title": "Alert", "url": "/alerting/list?search=${__data.fields.alertname}"}
