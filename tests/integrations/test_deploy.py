"""What an operator deploys, as far as it can be checked without the servers that run it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml
from cloudcoil.models.kubernetes.core.v1 import ConfigMap, Pod
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from promql import ROOT, RULES, rules
from pydantic import BaseModel, ValidationError
from servers import alertmanager, prometheus

INTEGRATIONS = ROOT / "integrations"
KUBERNETES = INTEGRATIONS / "kubernetes"
FILES = sorted(path for path in INTEGRATIONS.rglob("*.yml") if "node_modules" not in path.parts)
KINDS: dict[str, type[BaseModel]] = {
    "ConfigMap": ConfigMap,
    "Pod": Pod,
    "PodMonitor": PodMonitor,
    "PrometheusRule": PrometheusRule,
}
"""Models made from the OpenAPI description of Kubernetes 1.32 and from the CRDs of prometheus-operator 0.80."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_accepts_its_configuration() -> None:
    """The scrape jobs, the rules they load and the discovered targets are valid."""
    run("promtool", "check", "config", str(INTEGRATIONS / "prometheus" / "prometheus.yml"))


def test_every_rank_is_scraped_once() -> None:
    """One job has the ports of the eight ranks of a machine, each once."""
    (job,) = load(INTEGRATIONS / "prometheus" / "prometheus.yml")["scrape_configs"]
    (static,) = job["static_configs"]
    assert static["targets"] == [f"127.0.0.1:{port}" for port in range(16368, 16376)]


def test_the_runbook_is_where_the_alerts_say(tmp_path: Path) -> None:
    """A real Prometheus serves the page that is built, and each alert's address is an anchor of it."""
    built = tmp_path / "built"
    run(sys.executable, str(INTEGRATIONS / "prometheus" / "build_runbook.py"), str(built))
    name = "memtrace-runbook.html"
    consoles = INTEGRATIONS / "prometheus" / "consoles"
    assert (consoles / name).read_text() == (built / name).read_text()
    command = load(INTEGRATIONS / "compose" / "compose.yml")["services"]["prometheus"]["command"]
    assert "--web.console.templates=/etc/prometheus/consoles" in command
    with prometheus(tmp_path, options=(f"--web.console.templates={consoles}",)) as url:
        for group in load(RULES)["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    address = rule["annotations"]["runbook_url"].replace("{{ $externalURL }}", url)
                    page, anchor = address.split("#")
                    assert f'id="{anchor}"' in served(page)


@cache
def served(address: str) -> str:
    """Returns a page."""
    with urlopen(address, timeout=60) as answer:
        return str(answer.read().decode())


def test_prometheus_accepts_the_job_behind_tls(tmp_path: Path) -> None:
    """The job that is shipped as a comment is valid once it is none, and a mistake in it would be found."""
    text = (INTEGRATIONS / "prometheus" / "prometheus.yml").read_text()
    head, comment = text.split("  # - job_name: training-protected\n")
    job = "  - job_name: training-protected\n" + re.sub(r"^  # ", "  ", comment, flags=re.MULTILINE)
    shutil.copy(RULES, tmp_path)
    config = tmp_path / "prometheus.yml"
    config.write_text(head + job)
    names = [job["job_name"] for job in load(config)["scrape_configs"]]
    assert names == ["training", "training-protected"]
    run("promtool", "check", "config", str(config))
    config.write_text(head + job.replace("ca_file", "ca_fill"))
    with pytest.raises(AssertionError, match="ca_fill"):
        run("promtool", "check", "config", str(config))


def test_alertmanager_accepts_its_configuration() -> None:
    """The routing and the inhibitions are valid."""
    run("amtool", "check-config", str(INTEGRATIONS / "alertmanager" / "alertmanager.yml"))


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (["alertname=MemtraceOutOfMemory", "severity=critical"], "on-call"),
        (["alertname=MemtraceHeadroomLow", "severity=warning"], "training"),
        (["alertname=MemtraceDown", "severity=info"], "training"),
    ],
)
def test_alerts_are_routed_by_severity(labels: list[str], receiver: str) -> None:
    """What is critical goes to whoever is on call, the rest to those who train."""
    config = f"--config.file={INTEGRATIONS / 'alertmanager' / 'alertmanager.yml'}"
    run("amtool", "config", "routes", "test", config, f"--verify.receivers={receiver}", *labels)


def test_inhibitions_name_alerts_that_exist() -> None:
    """An alert that was renamed does not stay behind in an inhibition."""
    known = {rule["alert"] for group in load(RULES)["groups"] for rule in group["rules"] if "alert" in rule}
    text = (INTEGRATIONS / "alertmanager" / "alertmanager.yml").read_text()
    named = set(re.findall(r"\bMemtrace\w+", text))
    assert named
    assert named <= known


CONSEQUENCES = {
    "OutOfMemory": "RankMissing TrainerGone RunFailed Stalled OomPredicted HeadroomLow LimitSoon OutOfMemorySurvived",
    "TrainerVanishedNearLimit": "RankMissing TrainerGone RunFailed Stalled OomPredicted HeadroomLow AllocatorRetries",
    "RankMissing": "Stalled NoFirstStep RunFailed RankImbalance",
    "TrainerGone": "Stalled NoFirstStep RunFailed RankImbalance",
    "RunFailed": "Stalled NoFirstStep RankImbalance",
    "OomPredicted": "HeadroomLow",
    "LimitSoon": "OomPredicted HeadroomLow MemoryLeak UnattributedGrowth",
    "MemoryLeak": "UnattributedGrowth HeadroomLow",
    "NonTorchGrowth": "HeadroomLow",
    "FragmentationHigh": "AllocatorRetries",
}
"""What follows from what, in the same run."""
PAGES = {rule["alert"] for rule in rules() if rule.get("labels", {}).get("severity") == "critical"}


def silences(cause: str, consequence: str) -> bool:
    """Whether an inhibition silences the second alert while the first one fires for the same rank of a run."""

    def fits(matchers: list[str], alert: str) -> bool:
        patterns = (re.fullmatch(r'alertname=~?"(.*)"', matcher.strip()) for matcher in matchers)
        return all(pattern is not None and re.fullmatch(pattern[1], alert) is not None for pattern in patterns)

    return any(
        fits(rule["source_matchers"], cause) and fits(rule["target_matchers"], consequence)
        for rule in load(INTEGRATIONS / "alertmanager" / "alertmanager.yml")["inhibit_rules"]
    )


@pytest.mark.parametrize("cause", CONSEQUENCES)
def test_a_cause_silences_its_consequences(cause: str) -> None:
    """Whoever is told of the cause is not told of what follows from it."""
    loud = [name for name in CONSEQUENCES[cause].split() if not silences(f"Memtrace{cause}", f"Memtrace{name}")]
    assert loud == []


def test_no_ticket_silences_a_page() -> None:
    """What must wake somebody is silenced by a page alone."""
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert [(c, p) for c in alerts for p in PAGES if c not in PAGES and silences(c, p)] == []


def test_no_alerts_silence_each_other() -> None:
    """Of two alerts that fire together one at least is heard."""
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert [(one, other) for one in alerts for other in alerts if silences(one, other) and silences(other, one)] == []


def test_causes_silence_their_consequences(tmp_path: Path) -> None:
    """A real Alertmanager mutes what a cause brings in its own run, and in no other run; the cause is heard.

    How a run ended is told by its text file here, under the job of node_exporter.
    """
    expected: dict[tuple[str, str, str], str] = {}
    for cause, brought in CONSEQUENCES.items():
        expected |= {(cause, "1", cause): "active"}
        expected |= {(cause, "1", name): "suppressed" for name in brought.split()}
        expected |= {(cause, "2", name): "active" for name in brought.split() if name not in CONSEQUENCES}
    jobs = dict.fromkeys(("OutOfMemory", "RunFailed"), "node")
    alerts = [
        {
            "labels": {
                "alertname": f"Memtrace{name}",
                "job": jobs.get(name, "training"),
                "run": run,
                "run_id": run_id,
                "rank": "0",
            }
        }
        for run, run_id, name in expected
    ]
    with alertmanager(tmp_path, (INTEGRATIONS / "alertmanager" / "alertmanager.yml").read_text()) as url:
        address, headers = f"{url}/api/v2/alerts", {"Content-Type": "application/json"}
        with urlopen(Request(address, json.dumps(alerts).encode(), headers), timeout=60):
            pass
        muted, deadline = {alert: state == "suppressed" for alert, state in expected.items()}, time.monotonic() + 60
        while (told := inhibited(address)) != muted and time.monotonic() < deadline:
            time.sleep(0.05)  # causes are taken up by a thread of their own
    assert told == muted


def inhibited(address: str) -> dict[tuple[str, ...], bool]:
    """Returns whether each alert of an Alertmanager is muted by another one, by run, launch and name."""
    with urlopen(address, timeout=60) as answer:
        return {
            tuple(alert["labels"][name].removeprefix("Memtrace") for name in ("run", "run_id", "alertname")): bool(
                alert["status"]["inhibitedBy"]
            )
            for alert in json.load(answer)
        }


def test_the_operator_of_kube_prometheus_stack_takes_up_what_is_shipped() -> None:
    """Its Helm chart selects monitors and rules by the label `release`, and dashboards by `grafana_dashboard`."""
    for name in ("podmonitor", "prometheusrule"):
        assert load(KUBERNETES / f"{name}.yml")["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert load(KUBERNETES / "dashboards.yml")["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_committed_manifests_are_those_that_are_built(tmp_path: Path) -> None:
    """The manifests hold the rules and the dashboards as they are now."""
    run(sys.executable, str(KUBERNETES / "build_manifests.py"), str(tmp_path))
    for path in tmp_path.iterdir():
        assert (KUBERNETES / path.name).read_text() == path.read_text()


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raises where a value is wrong, or a field is unknown and would be dropped without a word."""
    known = KINDS[manifest["kind"]].model_validate(manifest)
    assert known.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yml")), ids=lambda path: path.stem)
def test_manifest_is_what_its_kind_describes(path: Path) -> None:
    """Each is one object of a kind that its server knows, with no field that the kind has not, and a valid name."""
    manifest = load(path)
    check_manifest(manifest)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    assert len(path.read_bytes()) < 2**20  # a larger ConfigMap is refused


def test_wrong_manifests_are_found() -> None:
    """A field that is misspelt and a value of another type do not pass."""
    misspelt, mistyped = load(KUBERNETES / "podmonitor.yml"), load(KUBERNETES / "podmonitor.yml")
    misspelt["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    with pytest.raises(AssertionError):
        check_manifest(misspelt)
    mistyped["spec"]["podMetricsEndpoints"] = "metrics"
    with pytest.raises(ValidationError):
        check_manifest(mistyped)


def test_pod_monitor_finds_the_ports_of_the_trainer() -> None:
    """The example's label and port names are those that the PodMonitor selects."""
    monitor, pod = load(KUBERNETES / "podmonitor.yml")["spec"], load(KUBERNETES / "trainer-example.yml")
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert monitor["jobLabel"] in pod["metadata"]["labels"]
    scraped = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert {port["name"] for port in pod["spec"]["containers"][0]["ports"]} <= scraped
    assert all(len(port) <= 15 for port in scraped)  # IANA_SVC_NAME, as Kubernetes demands


def compose_is_valid(path: Path) -> bool:
    """Returns whether a file is one of the Compose specification, by the schema that check-jsonschema ships."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_compose_is_valid(tmp_path: Path) -> None:
    """The file keeps the schema of the Compose specification; with a misspelt field it would not."""
    path = INTEGRATIONS / "compose" / "compose.yml"
    assert compose_is_valid(path)
    misspelt = tmp_path / "compose.yml"
    misspelt.write_text(path.read_text().replace("network_mode:", "network_modes:"))
    assert not compose_is_valid(misspelt)


def test_compose_mounts_what_is_there() -> None:
    """Every directory that a container mounts exists, and every volume that it names is declared."""
    path = INTEGRATIONS / "compose" / "compose.yml"
    compose = load(path)
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (path.parent / source).is_dir() if source.startswith(".") else source in compose["volumes"]


def test_grafana_finds_the_dashboards_where_they_are_mounted() -> None:
    """Provisioning, the mount and the home page agree on one directory."""
    grafana = load(INTEGRATIONS / "compose" / "compose.yml")["services"]["grafana"]
    provider = load(INTEGRATIONS / "grafana" / "provisioning" / "dashboards" / "memtrace.yml")["providers"][0]
    directory = provider["options"]["path"]
    assert f"../grafana/dashboards:{directory}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == directory
    assert (INTEGRATIONS / "grafana" / "dashboards" / home.name).is_file()


def test_readme_names_files_that_exist() -> None:
    """Every path in the README's code is there."""
    text = (INTEGRATIONS / "README.md").read_text()
    named = re.findall(r"`((?:prometheus|alertmanager|grafana|compose|kubernetes)/[\w./-]*)`", text)
    assert named
    assert [path for path in named if not (INTEGRATIONS / path).exists()] == []


def test_every_file_is_valid_yaml() -> None:
    """No file has a mistake that only its server would find."""
    assert FILES
    for path in FILES:
        assert load(path) is not None
