"""Which metrics and labels an expression uses, and which of them exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memtrace.record.metrics import CATALOGUE, IDENTITY_LABELS

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "integrations" / "prometheus" / "memtrace.rules.yml"

TARGET_LABELS = frozenset({"job", "instance"})
"""What Prometheus itself puts on every series."""
FOREIGN = {
    "up": TARGET_LABELS,
    "ALERTS": TARGET_LABELS | {"alertname", "alertstate", "severity", "run", "run_id", "rank"},
    "DCGM_FI_DEV_FB_USED": frozenset({"UUID"}),
    "node_memory_MemAvailable_bytes": TARGET_LABELS | {"host"},
    "node_memory_MemTotal_bytes": TARGET_LABELS | {"host"},
}
"""Metrics of others that are used, with the labels that are used of them, or made for them."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"(?<![\w:])([A-Za-z_][\w:]*)(?![\w:]|\s*\()\s*(\{[^}]*\})?")
_MATCHER = re.compile(r"([A-Za-z_]\w*)\s*(?:=~|!~|!=|=)")
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "inf", "nan"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """What an expression uses."""

    selectors: tuple[tuple[str, frozenset[str]], ...]
    """Each metric with the labels that it is selected by."""
    grouping: frozenset[str]


def uses(expression: str) -> Uses:
    """Returns the metrics and labels of a PromQL expression, with Grafana's variables in it or not."""
    text = _STRING.sub('""', expression)
    text = re.sub(r"\$\{?\w+(?::\w+)?\}?", "1", text)
    grouping = {label.strip() for _, labels in _GROUPING.findall(text) for label in labels.split(",")}
    text = _GROUPING.sub(" ", text)
    text = re.sub(r"\[[^\]]*\]", " ", text)
    text = re.sub(r"\boffset\s+\S+", " ", text)
    selectors = tuple(
        (name, frozenset(_MATCHER.findall(matchers)))
        for name, matchers in _SELECTOR.findall(text)
        if name not in _WORDS
    )
    return Uses(selectors=selectors, grouping=frozenset(grouping - {""}))


def rules() -> Iterator[dict[str, Any]]:
    """Yields every rule of the shipped file."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def known() -> dict[str, frozenset[str]]:
    """Returns every metric that may be used, with its labels: the catalogue, the recording rules, a few of others."""
    in_files = {"run", "run_id"}
    metrics = {metric.name: TARGET_LABELS | {*IDENTITY_LABELS, *metric.labels, *in_files} for metric in CATALOGUE}
    recorded = {
        rule["record"]: TARGET_LABELS | {*IDENTITY_LABELS, "run", "run_id", "state"}
        if rule["record"].startswith("rank:")
        else frozenset({"job", "run", "run_id"})
        for rule in rules()
        if "record" in rule
    }
    return metrics | recorded | FOREIGN


def unknown(expression: str) -> list[str]:
    """Returns what an expression uses and nobody exports; empty where all is well."""
    metrics = known()
    found = uses(expression)
    labels = {label for name, _ in found.selectors for label in metrics.get(name, ())}
    wrong = [name for name, _ in found.selectors if name not in metrics]
    wrong += [f"{name}{{{label}}}" for name, by in found.selectors if name in metrics for label in by - metrics[name]]
    return wrong + [f"by {label}" for label in found.grouping - labels]
