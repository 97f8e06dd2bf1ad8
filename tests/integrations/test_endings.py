"""How runs end: real Trainers, scraped by a real Prometheus up to their end, and what the shipped alerts say of it.

Nothing here waits for time to pass. Each process waits for the test, the test for the scrape that has seen it, and the
process for the scrape that sees its end. What Prometheus has taken in of each is then told at the shipped interval,
over hours, and judged by the shipped rules as they are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
from histories import INTERVAL, Labels, Sample, Scenario, Story, judge
from promql import RULES
from servers import Webhook, alertmanager, ask, free_port, prometheus
from test_end_to_end import ALERTMANAGER, faster

from memtrace.exporters.run_directory.run_file import read_run_file

pytestmark = pytest.mark.timeout(600)

CHILDREN = Path(__file__).with_name("endings.py")
CONFIG = """
global: {{scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 250ms}}
rule_files: [{rules}]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ["{alertmanager}"]}}]}}]}}
scrape_configs:
  - job_name: training
    static_configs: [{{targets: [{targets}]}}]
"""
MINUTE, HOUR = 60, 3600
MOVED = ("memtrace_last_step_timestamp_seconds", "memtrace_last_traced_step_timestamp_seconds")
Taken = Sequence[tuple[str, Labels, float]]
"""The samples of a scrape."""
ENDS = {
    "forward": "forward",
    "backward": "backward",
    "sigterm": "well",
    "killed near the limit": "well",
    "killed far from it": "well",
    "well near the limit": "well",
    "hang": "hangs",
    "rerun": "well",
    "twin": "forward",
    "other twin": "well",
}
"""The runs, and how each would end if it were let."""
NEAR = ("killed near the limit", "well near the limit")
QUICK = ("forward", *NEAR)
ALL = tuple(ENDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What a run is worth to those who watch it."""

    code: int | None
    """Exit code of its process; None where it does not end."""
    scraped: Sequence[str]
    """What its target says, one after the other; `gone` where it does not answer."""
    raises: frozenset[str] = frozenset()
    """Pages and tickets."""
    words: str = "ended"
    """What `memtrace show` says of it afterwards."""


OUT_OF_MEMORY = Worth(
    code=1,
    scraped=("running", "out_of_memory", "gone"),
    raises=frozenset({"MemtraceOutOfMemory"}),
    words="ended out of memory",
)
KILLED = Worth(code=-9, scraped=("running", "gone"), words="gone without a sign of its end")
WELL = Worth(code=0, scraped=("running", "ok", "gone"))
WORTH = {
    "forward": OUT_OF_MEMORY,
    "backward": OUT_OF_MEMORY,
    "sigterm": Worth(code=-15, scraped=("running", "signal", "gone"), words="ended by a signal"),
    "killed near the limit": replace(KILLED, raises=frozenset({"MemtraceTrainerVanishedNearLimit"})),
    "killed far from it": replace(KILLED, raises=frozenset({"MemtraceTrainerGone"})),
    "well near the limit": WELL,
    "hang": Worth(code=None, scraped=("running",), raises=frozenset({"MemtraceNoFirstStep"}), words="running"),
    "rerun": replace(WELL, scraped=("running", "gone", *WELL.scraped)),
    "twin": OUT_OF_MEMORY,
    "other twin": WELL,
}


class Children:
    """The processes that `endings.py` forks; a context manager that ends them."""

    def __enter__(self) -> Self:
        path = os.pathsep.join((str(CHILDREN.parents[1]), *sys.path))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "6"}
        self._process = subprocess.Popen(
            [sys.executable, str(CHILDREN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:  # closes the pipes: the parent ends, and ends its children
            pass

    def tell(self, do: str, name: str, **more: Any) -> Any:
        """Returns the answer to a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "name": name, **more}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """One scrape as Prometheus took it in, told at another time."""

    at: float
    instance: str
    started: float
    """When the run began, in the history."""
    last_step: float
    taken: Taken

    def target(self) -> Labels:
        """Returns the labels of the target."""
        return {"instance": self.instance}

    def samples(self) -> Iterator[Sample]:
        """Yields all samples of the scrape, its times moved to those of the history."""
        for name, labels, value in self.taken:
            if name in MOVED:
                yield name, labels, self.last_step
            else:
                yield name, labels, self.started if name == "memtrace_run_start_timestamp_seconds" else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a target says as long as it says the same."""

    state: str
    """`gone` where it does not answer."""
    run_id: str
    taken: Taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is left of the runs when they have ended."""

    directory: Path
    codes: Mapping[str, int]
    phases: Mapping[str, Sequence[Phase]]
    told: Sequence[dict[str, Any]]
    """What has come to the webhook."""

    def log(self, name: str) -> str:
        """Returns what a process has printed."""
        return (self.directory / directory_of(name) / "log").read_text()


def directory_of(name: str) -> str:
    """Returns the name of a run, and of its output directory."""
    return "twins" if "twin" in name else name.replace(" ", "-")


def phases(url: str, instance: str) -> list[Phase]:
    """Returns what Prometheus has taken in of a target, the last scrape of each phase.

    Left out is what not every run has: a scrape between a failed allocation and the end that it brings, and one that
    fails though the process goes on.
    """
    query = f'{{job="training", instance="{instance}", __name__=~"memtrace_.*|up"}}[1h]'
    scrapes: dict[float, list[tuple[str, Labels, float]]] = {}
    for series in ask(url, "query", query=query)["result"]:
        labels = {name: text for name, text in series["metric"].items() if name not in ("job", "instance")}
        name = labels.pop("__name__")
        for at, value in series["values"]:
            scrapes.setdefault(at, []).append((name, labels, float(value)))
    found: list[Phase] = []
    for _, taken in sorted(scrapes.items()):
        told = {name: labels for name, labels, _ in taken}
        failed = any(value for name, _, value in taken if name == "memtrace_ooms_total")
        state = told.get("memtrace_run_state", {}).get("state", "gone")
        run_id = told.get("memtrace_run_info", {}).get("run_id", "")
        if state == "running" and failed:
            continue
        if len(found) > 1 and found[-1].state == "gone" and found[-2].run_id == run_id:
            found.pop()
        if found and (found[-1].state, found[-1].run_id) == (state, run_id):
            found.pop()
        found.append(Phase(state=state, run_id=run_id, taken=taken))
    return found


def failing(running: Phase) -> Phase:
    """Returns what a scrape says that comes between a failed allocation and the end that it brings."""
    counted = [(name, labels, 1.0 if name == "memtrace_ooms_total" else value) for name, labels, value in running.taken]
    return replace(running, state="failing", taken=counted)


def story(instance: str, told: Sequence[Phase]) -> Story:
    """Returns a history of phases: half an hour of each run, one scrape of its end, and nothing from then on.

    A run that comes back does so after three minutes, and one that does not end goes on.
    """
    parts: list[tuple[float, float, float, Phase]] = []
    until = started = ended = 0.0
    for at, phase in enumerate(told):
        if phase.state == "running":
            started, ended = until, until + HOUR / 2
        length = {"running": HOUR / 2, "gone": 3 * MINUTE}.get(phase.state, INTERVAL)
        until = until + length if at < len(told) - 1 else float("inf")
        parts.append((until, started, ended, phase))

    def tells(at: int) -> Iterator[Exposed]:
        _, started, ended, phase = next(part for part in parts if at < part[0])
        last = at if phase.state == "running" else ended
        yield Exposed(at=at, instance=instance, started=started, last_step=last, taken=phase.taken)

    return tells


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until something is so; fails where it never is."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module", params=[QUICK, pytest.param(ALL, marks=pytest.mark.long)], ids=["quick", "all"])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """The runs, side by side, from their first step to their end."""
    names: Sequence[str] = request.param
    directory = tmp_path_factory.mktemp("endings")
    ports = {name: free_port() for name in names}
    instances: dict[str, str] = {}
    codes: dict[str, int] = {}
    webhook = Webhook()
    routing = faster(ALERTMANAGER.read_text()).replace("http://127.0.0.1:9094", webhook.url)

    def start(name: str) -> None:
        run = directory_of(name)
        port = ports["twin" if "twin" in name else name]
        told = {"directory": str(directory / run), "run_name": run, "port": port}
        children.tell("start", name, end=ENDS[name], near=name in NEAR, **told)

    def wait_for(name: str) -> None:
        address = children.tell("ready", name)
        assert address, (directory / directory_of(name) / "log").read_text()
        instances[name] = address.split("/")[2]

    def has(count: int, query: str) -> None:
        until(lambda: len(ask(url, "query", query=query)["result"]) == count, query)

    def scraped_since(which: Sequence[str]) -> None:
        now = time.time()
        for name in which:
            has(1, f'timestamp(up{{instance="{instances[name]}"}}) > {now}')

    with ExitStack() as stack:
        stack.callback(webhook.close)
        children = stack.enter_context(Children())
        for name in names:
            if name == "other twin":
                wait_for("twin")  # which has the port, then
            start(name)
        for name in names:
            if name not in instances:
                wait_for(name)
        alerts = stack.enter_context(alertmanager(directory, routing)).removeprefix("http://")
        targets = ", ".join(f'"{instance}"' for instance in instances.values())
        config = CONFIG.format(rules=RULES, alertmanager=alerts, targets=targets)
        url = stack.enter_context(prometheus(directory, config))
        has(len(names), 'memtrace_run_state{state="running"}')
        for name in names:
            if name.startswith("killed") or name == "rerun":
                children.tell("signal", name, number=signal.SIGKILL)
            elif name == "sigterm":
                children.tell("signal", name, number=signal.SIGTERM)
            elif name != "hang":
                children.tell("go", name)
        codes |= {name: children.tell("wait", name) for name in names if name != "hang"}
        scraped_since(names)
        if "rerun" in names:
            start("rerun")
            wait_for("rerun")
            has(1, f'memtrace_run_state{{instance="{instances["rerun"]}", state="running"}}')
            children.tell("go", "rerun")
            codes["rerun"] = children.tell("wait", "rerun")
            scraped_since(["rerun"])
        full = {directory_of(name) for name in names if WORTH[name] is OUT_OF_MEMORY}
        until(lambda: full <= {alert["labels"]["run"] for alert in webhook.firing()}, "the pages")
        yield Ended(
            directory=directory,
            codes=codes,
            phases={name: phases(url, instance) for name, instance in instances.items()},
            told=webhook.firing(),
        )


def test_each_end_is_scraped_as_what_it_is(ended: Ended) -> None:
    """The last scrape of a run says how it ended, but for a kill; exit codes are the script's own."""
    for name, found in ended.phases.items():
        assert [phase.state for phase in found] == list(WORTH[name].scraped), name
        assert ended.codes.get(name) == WORTH[name].code, ended.log(name)


def test_each_end_raises_its_alerts_and_no_other(ended: Ended, tmp_path: Path) -> None:
    """What was scraped, told at the shipped interval: the shipped rules see every failure, and nothing beside it."""
    scenarios = []
    for name, found in ended.phases.items():
        told = [*found[:1], failing(found[0]), *found[1:]] if WORTH[name] is OUT_OF_MEMORY else found
        tells = story(f"{name}:0", told)
        scenarios.append(Scenario(name=name, tells=tells, raises=WORTH[name].raises, minutes=2 * HOUR // MINUTE))
    assert judge(scenarios, tmp_path, every=INTERVAL) == {each.name: set(each.raises) for each in scenarios}


def test_who_is_on_call_hears_of_each_run_out_of_memory(ended: Ended) -> None:
    """Through Alertmanager to the webhook: the launch that failed, and no other one, of its name neither."""
    heard = {alert["labels"]["run_id"] for alert in ended.told if alert["path"] == "/on-call"}
    assert {alert["labels"]["alertname"] for alert in ended.told} == {"MemtraceOutOfMemory"}
    assert heard == {found[0].run_id for name, found in ended.phases.items() if WORTH[name] is OUT_OF_MEMORY}


def test_the_run_directory_says_how_each_has_ended(ended: Ended) -> None:
    """Whoever looks there afterwards reads the same."""
    for name, found in ended.phases.items():
        logs = ended.directory / directory_of(name) / "memtrace"
        home = logs / f"run-{found[0].run_id}" if name == "other twin" else logs
        status = read_run_file(home / "run-rank0.json")
        assert status is not None
        assert status.run_id == [phase.run_id for phase in found if phase.run_id][-1]
        assert status.words.startswith(WORTH[name].words), name
        if name == "other twin":
            first, second = (ended.phases[twin][0] for twin in ("twin", "other twin"))
            assert first.run_id != second.run_id
            assert f"this one's files are in {home}" in ended.log(name)
