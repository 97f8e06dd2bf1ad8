"""The dashboard of all runs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import table
from panels import ALARM, CALM, NEUTRAL, PEAK_COLOUR, WATCH, WIDE, graph, rows, transformation, variable

from memtrace.record import metrics
from memtrace.record.snapshot import RunState

STATES = (RunState.OK, RunState.RUNNING, RunState.SIGNAL, RunState.EXCEPTION, RunState.OUT_OF_MEMORY, "gone")
"""From good to bad; a run has that of its worst rank. The last one neither answers nor has said that it ends."""

COLOURS = {
    RunState.OK: CALM,
    RunState.RUNNING: PEAK_COLOUR,
    RunState.SIGNAL: NEUTRAL,
    RunState.EXCEPTION: WATCH,
    RunState.OUT_OF_MEMORY: ALARM,
    "gone": ALARM,
}
ALERT_COLUMNS = ("severity", "alertname", "job", "run", "run_id", "rank", "instance")


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
    by_run, of_run = "by (job, run, run_id)", 'job=~"$job"'
    name = f"on (job, instance, rank) group_left (run, run_id) memtrace_run_info{{{of_run}}}"
    share = f"{metrics.STEP_PEAK.name}{{{of_run}}} / ({metrics.CAPACITY.name}{{{of_run}}} > 0)"
    firing = f'ALERTS{{alertname=~"Memtrace.*",alertstate="firing",{of_run}}}'
    columns = {
        "state": state(by_run, of_run, name),
        "risk": f"max {by_run} ({metrics.OOM_RISK.name}{{{of_run}}} * {name})",
        "headroom": f"1 - max {by_run} ({share} * {name})",
        "last step ago": f"max {by_run} ((time() - {metrics.LAST_STEP.name}{{{of_run}}}) * {name})",
        "ranks seen": f"count {by_run} (count by (job, run, run_id, rank) (memtrace_run_info{{{of_run}}}))",
        "of expected": f"max {by_run} ({metrics.WORLD_SIZE.name}{{{of_run}}} * {name})",
        "alerts firing": f"count {by_run} ({firing}) or 0 * max {by_run} (memtrace_run_info{{{of_run}}})",
    }
    panels = [
        board.Row("Runs"),
        fleet_table(columns),
        rows(
            "Firing alerts",
            "What fires now. A click leads to its words, and to the address of the runbook.",
            [(firing, "")],
            unit="none",
            width=WIDE,
            transformations=[
                transformation(
                    "organize",
                    excludeByName={"Time": True, "Value": True, "alertstate": True, "state": True},
                    indexByName={name: at for at, name in enumerate(ALERT_COLUMNS)},
                )
            ],
            none="nothing fires",
            links={"alertname": runbook_link(), "run": run_link()},
            widths={"alertname": 280},
        ),
        board.Row("Over time"),
        graph(
            "Headroom at the peak",
            "Share of the capacity that the peaks of a step leave, on the fullest rank of each run.",
            [(columns["headroom"], "{{run}} {{run_id}}")],
            unit="percentunit",
            top=1,
        ),
        graph(
            "Out-of-memory risk",
            "The highest of the ranks of each run.",
            [(columns["risk"], "{{run}} {{run_id}}")],
            unit="percentunit",
            top=1,
        ),
    ]
    for panel in panels:
        made = made.with_row(panel) if isinstance(panel, board.Row) else made.with_panel(panel)
    return made


def state(by_run: str, of_run: str, name: str) -> str:
    """Returns the number of each run's state, that of its worst rank; what has ended is remembered by the rules."""
    live, ended = [], []
    for number, is_so in enumerate(STATES[:-1], 1):
        live.append(f'{number} * {metrics.RUN_STATE.name}{{{of_run},state="{is_so}"}}')
        if is_so is not RunState.RUNNING:
            ended.append(f'{number} * (rank:memtrace_ended:timestamp_seconds{{{of_run},state="{is_so}"}} > bool 0)')
    gone = f"{len(STATES)} * (rank:memtrace_gone:seconds{{{of_run}}} >= bool 0)"
    return f"max {by_run} (({' or '.join(live)}) * {name} or {' or '.join(ended)} or {gone})"


def fleet_table(columns: dict[str, str]) -> table.Panel:
    """Returns the table of all runs, the highest risk first; a click on a run leads to its dashboard."""
    named = {f"Value #{letter}": column for letter, column in zip("ABCDEFG", columns, strict=True)}
    return rows(
        "Runs by risk",
        "Each launch with its worst rank; how it ended stays for an hour.",
        [(expression, "") for expression in columns.values()],
        unit="none",
        width=WIDE,
        transformations=[
            transformation("merge"),
            transformation("organize", excludeByName={"Time": True}, renameByName=named),
            transformation("sortBy", sort=[{"field": "risk", "desc": True}]),
        ],
        units={"risk": "percentunit", "headroom": "percentunit", "last step ago": "s"},
        links={"run": run_link()},
        texts={"state": dict(enumerate(((state.replace("_", " "), COLOURS[state]) for state in STATES), 1))},
        height=12,
        none="no run is scraped, and none has ended within the hour",
    )


def run_link() -> dict[str, object]:
    """Returns a link to the dashboard of the run in a row."""
    chosen = "&".join(f"var-{name}=${{__data.fields.{name}:percentencode}}" for name in ("job", "run", "run_id"))
    url = f"/d/memtrace-run?{chosen}&${{__url_time_range}}"
    return {"title": "The run", "url": url}


def runbook_link() -> dict[str, object]:
    """Returns a link to the alerts that fire, where each has its section of the runbook."""
    return {"title": "Alert", "url": "/alerting/list?search=${__data.fields.alertname:percentencode}"}
