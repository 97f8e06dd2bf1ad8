"""Writes the manifests that wrap the rules and the dashboards: `python build_manifests.py [DIRECTORY]`.

The PrometheusRule holds the groups of `prometheus/memtrace.rules.yml`; the ConfigMap holds the dashboards, with the
label by which Grafana's sidecar finds them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE.parent / "prometheus" / "memtrace.rules.yml"
DASHBOARDS = HERE.parent / "grafana" / "dashboards"
RELEASE = "kube-prometheus-stack"
"""Label by which that chart's Prometheus selects rules and monitors: the name of its Helm release."""


def prometheus_rule() -> dict[str, Any]:
    """Returns the rules as Prometheus Operator reads them."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "memtrace", "labels": {"app.kubernetes.io/name": "memtrace", "release": RELEASE}},
        "spec": yaml.safe_load(RULES.read_text()),
    }


def dashboards() -> dict[str, Any]:
    """Returns the dashboards as Grafana's sidecar finds them."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "memtrace-dashboards",
            "labels": {"app.kubernetes.io/name": "memtrace", "grafana_dashboard": "1"},
        },
        "data": {path.name: path.read_text() for path in sorted(DASHBOARDS.glob("*.json"))},
    }


MANIFESTS = {"prometheusrule.yml": prometheus_rule, "dashboards.yml": dashboards}


def main(directory: Path) -> None:
    """Writes every manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in MANIFESTS.items():
        text = yaml.safe_dump(make(), sort_keys=False, width=120, allow_unicode=True)
        (directory / name).write_text("# Written by build_manifests.py; do not edit.\n" + text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
