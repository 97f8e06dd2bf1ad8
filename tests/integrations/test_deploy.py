"""What an operator deploys, as far as it can be checked without the servers that run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import ROOT, RULES

INTEGRATIONS = ROOT / "integrations"
KUBERNETES = INTEGRATIONS / "kubernetes"
FILES = sorted(path for path in INTEGRATIONS.rglob("*.yml") if "node_modules" not in path.parts)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_accepts_its_configuration() -> None:
    """The scrape jobs, the rules they load and the discovered targets are valid."""
    run("promtool", "check", "config", str(INTEGRATIONS / "prometheus" / "prometheus.yml"))


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


def test_committed_manifests_are_those_that_are_built(tmp_path: Path) -> None:
    """The manifests hold the rules and the dashboards as they are now."""
    run(sys.executable, str(KUBERNETES / "build_manifests.py"), str(tmp_path))
    for path in tmp_path.iterdir():
        assert (KUBERNETES / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yml")), ids=lambda path: path.stem)
def test_manifest_has_what_kubernetes_asks_for(path: Path) -> None:
    """Each is one object with a version, a kind, a name of a valid form, and labels that are text."""
    manifest = load(path)
    assert re.fullmatch(r"v1|monitoring\.coreos\.com/v1", manifest["apiVersion"])
    assert manifest["kind"] in {"Pod", "PodMonitor", "PrometheusRule", "ConfigMap"}
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    assert all(isinstance(value, str) for value in manifest["metadata"]["labels"].values())
    assert len(path.read_bytes()) < 2**20  # a larger ConfigMap is refused


def test_pod_monitor_finds_the_ports_of_the_trainer() -> None:
    """The example's label and port names are those that the PodMonitor selects."""
    monitor, pod = load(KUBERNETES / "podmonitor.yml")["spec"], load(KUBERNETES / "trainer-example.yml")
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert monitor["jobLabel"] in pod["metadata"]["labels"]
    scraped = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert {port["name"] for port in pod["spec"]["containers"][0]["ports"]} <= scraped
    assert all(len(port) <= 15 for port in scraped)  # IANA_SVC_NAME, as Kubernetes demands


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
